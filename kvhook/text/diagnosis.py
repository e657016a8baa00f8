"""Findings of a diagnosis as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from kvhook.analysis.diagnosis.finding import INFERRED, Finding

#: Lines are at most so long.
WIDTH = 100


def finding_lines(findings: Sequence[Finding], indent: int) -> Iterator[str]:
    """Each finding, and below it what acts on it, as lines for the right of a name that takes `indent` characters."""
    for finding in findings:
        inferred = " (inferred: the engine core was not recorded)" if finding.basis == INFERRED else ""
        yield from textwrap.wrap(f"{finding.text}{inferred}", WIDTH - indent)
        yield from textwrap.wrap(
            f"-> {finding.setting}", WIDTH - indent, initial_indent="   ", subsequent_indent="      "
        )
