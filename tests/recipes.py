"""The recipes of docs/howto/stream.md: the code blocks themselves, as text."""

from __future__ import annotations

import re
from typing import Any

from tests.conftest import ROOT

PAGE = ROOT / "docs/howto/stream.md"


def recipe(heading: str) -> str:
    """The code below a heading of the page."""
    found = re.search(
        rf"^## {re.escape(heading)}$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, heading
    return found[1]


def run(heading: str, **names: Any) -> dict[str, Any]:
    """Run a recipe; gives its names."""
    import kvhook

    space: dict[str, Any] = {"kvhook": kvhook, **names}
    exec(compile(recipe(heading), f"{PAGE}: {heading}", "exec"), space)
    return space
