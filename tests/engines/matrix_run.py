"""Runs one entry of the matrix: its tests, then the workload, each under a limit; and what came out."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from matrix_environments import home
from matrix_places import HERE, ROOT, cache, place
from matrix_releases import ACCOUNT, OF_VENV, RELEASES, Entry

WORKLOAD = HERE / "workload.py"
#: One release's tests take some minutes; 0.20 to 0.22, where each engine has a worker process, up to an hour or more.
TIMEOUT_S = 7200


class Outcome(NamedTuple):
    """What came out of one entry."""

    entry: str
    date: str
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    #: why it could not run, or what failed
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.passed and not self.failed:
            return "passed"
        return "FAILED" if self.failed else "cannot run"


def run_entry(entry: Entry, model: Path, under: list[str], pytest: list[str]) -> Outcome:
    """The tests, and then the one workload that is the same everywhere, recorded."""
    if entry.reason:
        return Outcome(entry.name, today(), note=entry.reason)
    began = time.monotonic()
    python = str(home(entry.release) / "bin" / "python")
    log, report = place("logs", f"{entry.name}.txt"), place("results", f"{entry.name}.xml")
    report.unlink(missing_ok=True)
    tests = [python, "-m", "pytest", *entry.tests, "-p", "no:cacheprovider", f"--junitxml={report}", *pytest]
    trace = place("traces", f"{entry.name}.kvh")
    trace.unlink(missing_ok=True)
    workload = [python, str(WORKLOAD), str(model), str(trace)]
    codes = []
    with log.open("w", encoding="utf-8") as out:
        for command in (tests,) if entry.process == ACCOUNT else (tests, workload):
            out.write(f"$ {shlex.join(command)}\n")
            out.flush()
            codes.append(call_with_limit([*under, *command], entry.environment(), out))
    outcome = read_report(report, entry, codes[0])
    if any(codes[1:]):
        outcome = outcome._replace(failed=outcome.failed + 1, note=joined(outcome.note, "the workload failed"))
    outcome = outcome._replace(seconds=round(time.monotonic() - began, 1))
    return outcome


def call_with_limit(command: list[str], environment: dict[str, str], out: Any) -> int:
    """Run a command in a process group of its own, of which nothing is left afterwards."""
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def read_report(path: Path, entry: Entry, code: int) -> Outcome:
    """What pytest's JUnit file says."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome(entry.name, today(), failed=1, note=f"pytest made no report (exit code {code})")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    note = ", ".join(str(case.get("name")) for case in bad)
    if code and not bad:
        note = f"pytest ended with exit code {code}"
    return Outcome(
        entry.name,
        today(),
        passed=len(cases) - len(bad) - len(skipped),
        failed=max(len(bad), int(code != 0)),
        skipped=len(skipped),
        note=note,
    )


def joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def today() -> str:
    return datetime.date.today().isoformat()


def tiny_model() -> Path:
    """The model, made by the environment of the newest release: `tokenizers` is needed for it."""
    code = (
        "import sys, pathlib; from kvhook.demo.model import make_tiny_model as m; print(m(pathlib.Path(sys.argv[1])))"
    )
    python = home(RELEASES[OF_VENV]) / "bin" / "python"
    done = subprocess.run([python, "-c", code, cache() / "model"], cwd=ROOT, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())
