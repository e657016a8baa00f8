"""The last lines of a run say how many cases of the settings test there were, and which were left out."""

from __future__ import annotations

from typing import Any

from tests.engine.settings import bench, release


def pytest_terminal_summary(terminalreporter: Any) -> None:
    told = bench.told()
    left = [f"{count} cases left out, {why}" for why, count in sorted(release.left_out.items())]
    if told or left:
        terminalreporter.write_sep("-", "settings test")
        for line in (*told, *left):
            terminalreporter.write_line(line)
