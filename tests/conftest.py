"""What all tests share: nothing they record goes where the user's own recordings are, and of what they inherit from
whoever starts them, that which would change what they test is put right. `tests/surroundings.py` tries it out."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


# How long an example may take depends on what else the machine does.
with contextlib.suppress(ImportError):  # some environments of the matrix do without it
    from hypothesis import HealthCheck, settings

    settings.register_profile("kvhook", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvhook")

#: Variables of the tests' own, which the user may set.
FOR_THE_TESTS = ("KVHOOK_ALL_FAULTS", "KVHOOK_KILLS", "KVHOOK_PURE", "KVHOOK_SEEDS", "KVHOOK_SOAK_SECONDS")
#: A terminal sends these to all that it has started. Whoever starts the tests in the background of a script has them
#: ignored, and means it; a test that sends one to a program of its own sees to it that this program minds it.
OF_THE_TERMINAL = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}


@pytest.fixture(scope="session", autouse=True)
def _private_ring_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("KVHOOK_") and n not in FOR_THE_TESTS]:
            patch.delenv(name)
        patch.setenv("KVHOOK_DIR", str(tmp_path_factory.mktemp("rings")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals_as_usual() -> Iterator[None]:
    """No signal is blocked, and none is ignored that Python does not ignore itself: the programs that tests start
    would inherit it. With SIGCHLD ignored no exit code is known, with SIGALRM blocked no time limit is kept."""
    mine = {signal.SIGPIPE, signal.SIGXFSZ} | OF_THE_TERMINAL
    ignored = [s for s in signal.valid_signals() - mine if signal.getsignal(s) is signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


#: Tests that run over both step paths, the extension's and Python's: files, and folders with all that is in them.
BOTH_PATHS = (
    "contracts/adapters/",
    "contracts/from_core/",
    "contracts/light/",
    "core/test_batches_in_flight.py",
    "core/test_ledger.py",
    "core/test_steps.py",
    "golden/test_golden.py",
    "hooks/",
    "levels/",
    "ring/test_fork.py",
    "ring/test_ring_kill.py",
    "ring/test_spool.py",
    "ring/test_torn.py",
    "test_aborted_requests.py",
    "test_no_silent_loss_engines.py",
    "test_no_silent_loss_processes.py",
    "test_ring_basics.py",
    "test_session.py",
    "test_shared_parts.py",
    "test_stats_turned_off.py",
    "test_unseen_engines.py",
)


#: Tests of the Python path alone: they count its instructions.
PYTHON_PATH = ("test_step_cost.py",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    here = Path(metafunc.module.__file__ or "")
    name = str(here.relative_to(ROOT / "tests")) if here.is_relative_to(ROOT / "tests") else ""
    if name.startswith(BOTH_PATHS):
        metafunc.parametrize("step_path", ("c", "python"), indirect=True)
    elif name in PYTHON_PATH:
        metafunc.parametrize("step_path", ("python",), indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the tests are made of lives as long as they do: without this, each of the thousands of full collections that
    they ask for looks through all of it (0.4 s of a test of 0.5 s)."""
    gc.collect()
    gc.freeze()
    mine, count, freeze = gc.get_freeze_count(), gc.get_freeze_count, gc.freeze
    frozen_again = False

    def freeze_and_note() -> None:
        nonlocal frozen_again
        frozen_again = True
        freeze()

    # kvhook looks closer where somebody has frozen engines, and none is among these; to count them takes 15 ms
    gc.get_freeze_count = lambda: max(0, count() - mine) if frozen_again else 0
    gc.freeze = freeze_and_note


@pytest.fixture(autouse=True)
def step_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The step path that a test runs over. Where a test does not say, it is the one that a user would have."""
    from kvhook import _step

    wanted: str = getattr(request, "param", "")
    if wanted == "c" and _step.native is None:
        pytest.skip(f"no extension here: {_step.why_not}")
    if wanted == "python":
        monkeypatch.setattr(_step, "native", None)
        monkeypatch.setenv(_step.ENV_PURE, "1")
    return wanted


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is installed, and what is recorded goes below this directory; afterwards nothing is installed."""
    import tempfile

    import kvhook

    rings, disk = tmp_path / "rings", tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("KVHOOK_DIR", str(rings))
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    kvhook.uninstall()
    try:
        yield tmp_path
    finally:
        kvhook.uninstall()


def give_away(path: Path, user: int) -> None:
    """Make something somebody else's. A test that needs it is skipped where that is not allowed."""
    try:
        os.chown(path, user, -1)
    except OSError as error:  # not root, or the root of a user namespace that knows no other user
        pytest.skip(f"nothing can be given to another user here: {error.strerror}")


Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Runs a script in a Python of its own, ``python(code, *arguments, **environment)``, which must end well.

    ``launcher``: a command that is to run the Python in its turn.
    """

    def run(
        code: str, *arguments: object, launcher: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*launcher, sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings"), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
