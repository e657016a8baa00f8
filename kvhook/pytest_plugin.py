"""The pytest plug-in: assert on what the KV cache did in a test.

    def test_the_prompt_is_shared(kvhook, llm):
        llm.generate(...)
        assert kvhook.summary().prefix_cache_hit_rate > 0.8

kvhook is installed once the tests have been collected, if one of them wants it: before any fixture makes an engine.
Where such a test fails, the summary stands in its report, and the trace is kept if ``--kvhook-trace-dir`` is given.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os

    import numpy as np
    import numpy.typing as npt

    from kvhook.recording.session import Session
    from kvhook.text.summary import PrintedSummary
    from kvhook.trace import Trace

FIXTURE = "kvhook"
MARKER = "kvhook_session"

_MARKER_HELP = (
    f"{MARKER}(whole=False): record this test although it does not take the `{FIXTURE}` fixture. "
    "whole=True: show everything since the session began, and not only this test"
)


class Recording:
    """What vLLM's engines did during a test. Each call reads what there is at that moment.

    Attributes:
        session: the `kvhook.Session` behind it, of the whole pytest session.
    """

    def __init__(self, session: Session, *, whole: bool = False) -> None:
        from kvhook.window import position

        self.session = session
        self._after = {} if whole else session.ask(lambda so_far: position(so_far.run))
        self._whole = whole

    def trace(self) -> Trace:
        """This test's part of the run, as a `kvhook.Trace`."""
        from kvhook.window import Window

        trace = self.session.trace()
        return trace if self._whole else Window(trace, self._after)

    def summary(self) -> PrintedSummary:
        """This test in numbers."""
        return self.trace().summary()

    def steps(self, *, complete: bool = False) -> npt.NDArray[np.void]:
        """One row per engine step. For states (usage, requests that run or wait) use ``complete=True``: it leaves out
        steps in which they are not known. See `kvhook.Trace.steps`."""
        return self.trace().steps(complete=complete)

    def requests(self) -> npt.NDArray[np.void]:
        """One row per finished request, see `kvhook.Trace.requests`."""
        return self.trace().requests()

    def latencies(self, series: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Every single TTFT or inter-token latency, see `kvhook.Trace.latencies`."""
        return self.trace().latencies(series)

    def dump(self, path: str | os.PathLike[str], *, overwrite: bool = False, compress: bool = False) -> list[Path]:
        """Write this test's part to a file, see `kvhook.Trace.dump`."""
        return self.trace().dump(path, overwrite=overwrite, compress=compress)


_RECORDING = pytest.StashKey[Recording]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--kvhook-trace-dir``."""
    group = parser.getgroup("kvhook", "what vLLM's KV cache did")
    group.addoption(
        "--kvhook-trace-dir",
        type=Path,
        metavar="DIR",
        help="keep the trace of every failed test that was recorded, as DIR/TEST.kvh",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _MARKER_HELP)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A marked test is recorded as if it took the fixture."""
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        if item.get_closest_marker(MARKER) and FIXTURE not in names:
            names.append(FIXTURE)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install kvhook if a test wants it, before the first fixture of any makes an engine."""
    if not session.config.option.collectonly and any(FIXTURE in getattr(i, "fixturenames", ()) for i in session.items):
        _install()


@pytest.fixture(name=FIXTURE)
def _recording(request: pytest.FixtureRequest) -> Recording:
    """What vLLM's KV cache does in this test: summary(), steps(), requests(), latencies(series), dump(path)."""
    marker = request.node.get_closest_marker(MARKER)
    whole = bool(marker and marker.kwargs.get("whole"))
    recording = Recording(_install(), whole=whole)
    request.node.stash[_RECORDING] = recording
    return recording


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the summary into a failed test's report, and keep its trace."""
    report = yield
    recording = item.stash.get(_RECORDING, None)
    if recording is not None and report.failed:  # the test itself, or a fixture of it
        try:
            text = str(recording.summary())
            folder = item.config.getoption("--kvhook-trace-dir")
            if folder is not None:
                text += f"\n  trace           {_keep(recording, folder, item.nodeid)}"
        except Exception as error:  # the report of the failure matters more
            text = f"{type(error).__name__}: {error}"
        report.sections.append(("kvhook", text))
    return report


def _keep(recording: Recording, folder: Path, nodeid: str) -> Any:
    if not len(recording.steps()):
        return "none: no engine made a step in this test"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.=-]+", "-", nodeid).strip("-")[-200:]
    return recording.dump(folder / f"{name}.kvh", overwrite=True)[0]


def _install() -> Session:
    import kvhook

    return kvhook.install()
