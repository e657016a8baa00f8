"""Recipes of the documentation: the code blocks themselves, as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PAGE = ROOT / "docs/howto/stream.md"
FRAMEWORKS = ROOT / "docs/howto/frameworks.md"


def recipe(heading: str, page: Path = PAGE, language: str = "python") -> str:
    """The first code of that language below a heading of the page."""
    pattern = rf"^## {re.escape(heading)}$(?:(?!^## ).)*?^```{language}\n(.*?)^```$"
    found = re.search(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def run(heading: str, **names: Any) -> dict[str, Any]:
    """Run a recipe; gives its names."""
    import kvhook

    space: dict[str, Any] = {"kvhook": kvhook, **names}
    exec(compile(recipe(heading), f"{PAGE}: {heading}", "exec"), space)
    return space
