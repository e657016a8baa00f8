"""Shows the matrix: the last results as a table, for the screen or for README.md, and the list of what is built."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from json_files import read_json
from matrix_environments import built_size, is_built, total_size
from matrix_places import cache, place
from matrix_releases import RELEASES, Entry, Release, entries_of
from matrix_run import Outcome
from setup_words import say

TABLE_BEGINS, TABLE_ENDS = "<!-- the table begins -->", "<!-- the table ends -->"
HEADINGS = ["vLLM", "engine", "engine core", "result", "passed", "failed", "skipped", "seconds", "remarks"]


def known(entries: Iterable[Entry]) -> list[Outcome]:
    """The last result of every entry that ever ran."""
    found = []
    for entry in entries:
        kept = read_json(place("results", f"{entry.name}.json"))
        found.append(Outcome(**kept) if kept else Outcome(entry.name, "", note="not run yet"))
    return found


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    """The cells of the table."""
    entries = {entry.name: entry for release in RELEASES.values() for entry in entries_of(release)}
    cells = []
    for outcome in outcomes:
        entry = entries[outcome.entry]
        ran = outcome.passed or outcome.failed
        counts = [str(n) for n in (outcome.passed, outcome.failed, outcome.skipped)] if ran else [""] * 3
        seconds = f"{outcome.seconds:.0f}" if ran else ""
        verdict = outcome.verdict if outcome.date else ""
        cells.append([entry.release.version, entry.engine, entry.process, verdict, *counts, seconds, outcome.note])
    return cells


def plain_table(outcomes: list[Outcome]) -> str:
    table = [HEADINGS, *rows(outcomes)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def markdown_table(outcomes: list[Outcome]) -> str:
    dates = sorted({outcome.date for outcome in outcomes if outcome.date})
    when = dates[-1] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "never"
    lines = [f"{when}, {machine()}", "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows(outcomes)])


def machine() -> str:
    """What it ran on, as far as it matters."""
    model = ""
    with contextlib.suppress(OSError, AttributeError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE).group(1)  # type: ignore[union-attr]
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = (model, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", system, f"Python {platform.python_version()}")
    return ", ".join(part for part in parts if part)


def write_table(path: Path, outcomes: list[Outcome]) -> None:
    """Put the table between its marks in a file, or make a file of nothing else."""
    table = f"{TABLE_BEGINS}\n{markdown_table(outcomes)}\n{TABLE_ENDS}"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begins, rest = old.partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    path.write_text(before + table + after if begins else table + "\n", encoding="utf-8")


def show_list(releases: list[Release]) -> None:
    say(f"{'vLLM':<13}{'environment':<22}entries")
    for release in releases:
        size = f"built, {built_size(release) / 1e9:.1f} GB" if is_built(release) else "not built"
        named = [f"{e.engine} {e.process}" + (f" ({e.reason})" if e.reason else "") for e in entries_of(release)]
        say(f"{release.version:<13}{size:<22}{'; '.join(named)}")
    say(f"{total_size()} in {cache()}")
