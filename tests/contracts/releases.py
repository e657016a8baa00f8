"""Which releases there are facts of, and spans of them."""

from __future__ import annotations

from tests.contracts.extracting.stored import version_key
from tests.contracts.loader import releases

ALL = releases()


def between(release: str, first: str, last: str | None = None) -> bool:
    low, high = version_key(first), version_key(last or ALL[-1])
    return low <= version_key(release) <= high


def since(first: str, last: str | None = None) -> list[str]:
    return [release for release in ALL if between(release, first, last)]
