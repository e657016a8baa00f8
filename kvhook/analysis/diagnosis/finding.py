"""A finding: something that a run suffers from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

#: Where the evidence comes from: the engine core's own account, or what can be told from outside of it.
RECORDED, INFERRED = "recorded", "inferred"


class Finding(NamedTuple):
    """Something that a run suffers from.

    Args:
        name: for programs, such as ``"cache_too_small"``.
        text: what it is, with the numbers that show it.
        setting: what acts on it: settings of vLLM, or what the program can do.
        evidence: the numbers by name.
        basis: "recorded" (the engine core's own account) or "inferred" (told from outside of it).
    """

    name: str
    text: str
    setting: str
    evidence: Mapping[str, float]
    basis: str = RECORDED


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def milliseconds(value: float) -> str:
    """A time."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"
