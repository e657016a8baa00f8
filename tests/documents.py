"""Runs the code of README.md and docs/, page by page, and compares what a page shows with what is printed.

What is done with a fenced block depends on its language:

- ``python`` runs, in one namespace per page and in a folder of the page's own. If its first line is ``# NAME.py``, it
  is a file instead: it is written there for the commands after it;
- ``text`` directly after it (prose may stand between) is what it prints;
- ``console`` holds commands after ``$`` and what they print: they run. ``[exit code N]`` in a line of its own is what a
  command gives that fails on purpose;
- ``sh`` is for commands that install, start servers or take long: they do not run, but a verb of kvhook must have these
  options, a target of make and a file must exist.

``<!-- skip: next "reason" -->`` before a block keeps it from running. A line ``...`` in an output stands for lines that
are left out. Times, rates, sizes, process numbers, paths and versions differ between runs and are not compared.

With ``REWRITE_DOCS=1`` (``make docs-outputs``) an output that differs is replaced by what was printed.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import SkipTest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from sybil import Document, Example

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: What differs between two runs -> what is compared instead. In this order.
VARIABLE = (
    (re.compile(r"/[\w.~-]+(?:/[\w.~-]+)+"), "PATH"),
    (re.compile(r"\b\d+\.\d+\.\d+(?:\.post\d+)?\b"), "VERSION"),
    (re.compile(r" \(\d+:\d\d:\d\d\)"), ""),  # pytest says longer times in hours and minutes as well
    (re.compile(r"\b\d\d:\d\d:\d\d(?:\.\d+)?"), "CLOCK"),
    (re.compile(r"-?[\d.,]+(?:e-?\d+)? ?(?:ns|us|ms|s|min|h|d)\b"), "TIME"),
    (re.compile(r"[\d.,]+ ?[kMG]i?B\b"), "SIZE"),
    (re.compile(r"[\d.,]+ per second"), "RATE"),
    (re.compile(r"[\d.]+ ?% of (?:it|the time)\b"), "SHARE"),
    (re.compile(r"(made for it: .*; )[\d.]+ %"), r"\1SHARE"),
    (re.compile(r"(per s in steps)[ \d,.]+"), r"\1 RATES"),
    (re.compile(r"\b\d+ records added"), "RECORDS added"),
    (re.compile(r"\b(process|pid|PID) \d+"), r"\1 NUMBER"),
    (re.compile(r"^ *\d+( +(?:core |blocks )?\d+ +(?:alive|dead|closed)\b)"), r"NUMBER\1"),
    (re.compile(r"\b(core|blocks)(\d+)-\d+"), r"\1\2-NUMBER"),
    (re.compile(r"[ \t]+"), " "),
)
#: A line of vLLM's log, which goes to standard output.
LOG_LINE = re.compile(r"(\(\w+ pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR) \d\d-\d\d \d\d:\d\d:\d\d ")
_COMMAND = "$ "
_EXIT_CODE = re.compile(r"\[exit code (-?\d+)\]")
_PRINTED = "_printed by the block before"


class Shown(NamedTuple):
    """An output in a page that is not what was printed: where it begins, what stands there, and what should."""

    start: int
    old: str
    new: str


def needs_engine(page: Path) -> bool:
    """Whether a page's Python code uses vLLM."""
    return re.search(r"^(from|import) vllm", page.read_text(encoding="utf-8"), re.MULTILINE) is not None


def run(page: Path, folder: Path) -> None:
    """Run a page's blocks in a folder of its own. An exception or a wrong output is an AssertionError with its line."""
    __tracebackhide__ = True
    document = parse(page)
    wrong: list[Shown] = []
    document.namespace["__name__"] = "__main__"
    before = Path.cwd()
    os.chdir(folder)
    try:
        for example in document.examples():
            with contextlib.suppress(SkipTest):
                example.evaluate()
            wrong += document.namespace.pop("_wrong", [])
    finally:
        os.chdir(before)
        document.namespace.clear()
    if wrong and os.environ.get("REWRITE_DOCS"):
        rewrite(page, wrong)
    elif wrong:
        raise AssertionError("\n\n".join(difference(page, document.text, one) for one in wrong))


def parse(page: Path) -> Document:
    """A page's blocks in order."""
    from sybil import Sybil
    from sybil.parsers.markdown import CodeBlockParser, SkipParser

    evaluators = {"python": _python, "text": _text, "console": _console, "sh": _sh}
    parsers: list[Any] = [SkipParser(), *(CodeBlockParser(language, run) for language, run in evaluators.items())]
    return Sybil(parsers=parsers).parse(page)


def _python(example: Example) -> None:
    from sybil.evaluators.python import PythonEvaluator

    if name := re.match(r"# (\w+\.py)\n", str(example.parsed)):
        Path(name[1]).write_text(str(example.parsed), encoding="utf-8")
        compile(str(example.parsed), name[1], "exec")
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace[_PRINTED] = printed.getvalue()


def _text(example: Example) -> None:
    printed = example.namespace.pop(_PRINTED, None)
    if printed is not None:
        _compare(example, str(example.parsed), printed, 0)


def _console(example: Example) -> None:
    example.namespace.pop(_PRINTED, None)
    at = 0
    for command, shown in transcript(str(example.parsed)):
        at += len(f"{_COMMAND}{command}\n")
        expected = _EXIT_CODE.search(shown)
        printed, code = execute(command)
        wanted = int(expected[1]) if expected else 0
        assert code == wanted, f"{example.path}:{example.line}: {command}: exit code {code}, not {wanted}\n{printed}"
        _compare(example, shown, printed + (f"[exit code {code}]\n" if expected else ""), at)
        at += len(shown)


def _sh(example: Example) -> None:
    example.namespace.pop(_PRINTED, None)
    for line in str(example.parsed).splitlines():
        problem = command_problem(line)
        assert not problem, f"{example.path}:{example.line}: {line}: {problem}"


def transcript(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block and what is shown below each."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def execute(command: str) -> tuple[str, int]:
    """What a command prints, both streams, and its exit code. `kvhook` and `python` are those of this Python."""
    python = shlex.quote(sys.executable)
    if rings := os.environ.get("KVHOOK_DIR"):
        # what others have recorded on this machine does not belong into the page
        command = re.sub(r"^kvhook (ls|tail|autopsy|recover|clean)\b", rf"\g<0> --dir {shlex.quote(rings)}", command)
    here = re.sub(r"^kvhook\b", f"{python} -m kvhook", command)
    here = re.sub(r"^python\b", python, here)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    environment.pop("PYTEST_ADDOPTS", None)  # of whoever runs these tests
    done = subprocess.run(
        ["bash", "-c", here],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout, done.returncode


def command_problem(line: str) -> str:
    """Why a command of an ``sh`` block cannot be right; empty if it can. Only kvhook, make and files are known."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["kvhook"]:
        return verb_problem([w for w in words[1:] if w != "&"])
    if words[:1] == ["make"]:
        targets = [w for w in words[1:] if "=" not in w]
        rules = (ROOT / "Makefile").read_text(encoding="utf-8")
        return "".join(f"there is no target {t}" for t in targets if not re.search(rf"^{t}:", rules, re.MULTILINE))
    files = [w for w in words if re.fullmatch(r"(tests|benchmarks|examples|docs|\.ci)/[\w./-]+", w)]
    return "".join(f"there is no {f}" for f in files if "VERSION" not in f and not (ROOT / f).exists())


def verb_problem(words: list[str]) -> str:
    """Why kvhook would not take these arguments."""
    from kvhook.cli import make_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            make_parser().parse_args(words)
    except SystemExit as end:
        return said.getvalue() if end.code else ""
    return ""


def _compare(example: Example, shown: str, printed: str, offset: int) -> None:
    printed = anonymous(printed)
    if not matches(shown, printed):
        # where the block's own text begins: behind the line with the fence
        start = example.document.text.index("\n", example.start) + 1 + offset
        if example.document.text[start : start + len(shown)] != shown:
            raise AssertionError(f"{example.path}:{example.line}: an indented output cannot be compared: {shown}")
        example.namespace.setdefault("_wrong", []).append(Shown(start, shown, elided(shown, printed)))


def anonymous(printed: str) -> str:
    """What was printed, without vLLM's log and without what only this machine has."""
    replaced = {
        os.environ.get("KVHOOK_DIR", "\0"): "/dev/shm/kvhook-1000",
        str(Path.cwd()): "/home/me/project",
        sys.executable: "python",
    }
    for here, there in replaced.items():
        printed = printed.replace(here, there)
    printed = re.sub(r"^bash: line 1: +\d+ Killed .*$", "Killed", printed, flags=re.MULTILINE)
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines() if not LOG_LINE.match(line))


def matches(shown: str, printed: str) -> bool:
    """Whether an output is shown as it is, but for what differs between runs and what is left out with ``...``."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(comparable(line)) + "\n" for line in shown.splitlines()
    )
    return re.fullmatch(pattern, "".join(f"{comparable(line)}\n" for line in printed.splitlines())) is not None


def comparable(line: str) -> str:
    """A line without what differs between two runs."""
    for pattern, instead in VARIABLE:
        line = pattern.sub(instead, line)
    return line.strip()


def elided(shown: str, printed: str) -> str:
    """What was printed, with the same lines left out as before: each line kept is found by how it begins."""
    if "..." not in (line.strip() for line in shown.splitlines()):
        return printed
    rest, out = printed.splitlines(), []
    for line in shown.splitlines():
        if line.strip() == "...":
            out.append(line)
            continue
        at = next((i for i, new in enumerate(rest) if label(new) == label(line)), None)
        if at is None:
            raise AssertionError(f"no line that is printed begins like {line!r}; put this right by hand:\n{printed}")
        out.append(rest[at])
        rest = rest[at + 1 :]
    return "".join(f"{line}\n" for line in out)


def label(line: str) -> str:
    """How a line begins: the words before a gap, or the first word."""
    text = line.strip()
    return text.partition("  " if "  " in text else " ")[0]


def rewrite(page: Path, wrong: list[Shown]) -> None:
    """Put the outputs as they are into the page, the last first, so that the places before it stay."""
    text = page.read_text(encoding="utf-8")
    for one in sorted(wrong, reverse=True):
        text = text[: one.start] + one.new + text[one.start + len(one.old) :]
    page.write_text(text, encoding="utf-8")


def difference(page: Path, text: str, one: Shown) -> str:
    """An output that is wrong, as a diff; `make docs-outputs` puts it right."""
    line = text.count("\n", 0, one.start) + 1
    parts = difflib.unified_diff(one.old.splitlines(), one.new.splitlines(), "shown", "printed", lineterm="")
    return f"{page.relative_to(ROOT)}:{line} (make docs-outputs puts it right)\n" + "\n".join(parts)


def names(pages: list[Path]) -> list[Any]:
    """Pages as pytest parameters, named for their path."""
    import pytest

    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]
