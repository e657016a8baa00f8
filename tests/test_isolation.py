"""Other users and other containers on the same machine: what they plant, what they can read, what is told apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.discovery.cleaning import HISTORY_PREFIX, MARK_PREFIX
from kvhook.discovery.rings import ALIVE, DEAD, find_rings
from kvhook.errors import KvhookError
from kvhook.records.core_files import open_cores
from kvhook.ring.place import ring_named
from kvhook.ring.trace_file import header_of, pack_meta
from tests.conftest import Python, give_away
from tests.hostile import DATA
from tests.ring.synthetic import Recording
from tests.standin import fake_vllm, step_stats

RING = "4194999-77-0.ring"


def record_one(trace: Path) -> kvhook.Session:
    with fake_vllm() as vllm:
        session = kvhook.install(trace=trace)
        engine = vllm.engine()
        engine.plan += [step_stats(kv_cache_usage=0.5) for _ in range(3)]
        for _ in range(3):
            engine.step()
        assert len(session.steps()) == 3
        return session


# ---- planted files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "directory", "file"])
def test_what_is_planted_at_the_trace_s_name_is_not_touched(fresh: Path, what: str):
    trace, victim = fresh / "run.kvh", fresh / "victim"
    victim.write_text("dear")
    if what.endswith("link"):
        trace.symlink_to(victim if what == "link" else fresh / "nowhere")
    elif what == "pipe":
        os.mkfifo(trace)
    elif what == "directory":
        trace.mkdir()
    else:
        trace.write_text("theirs")
    session = record_one(trace)
    (written,) = session.files
    assert written != trace
    assert written.parent == fresh
    assert victim.read_text() == "dear"
    assert not (fresh / "nowhere").exists()
    kvhook.uninstall()
    assert len(kvhook.open(written).steps()) == 3


def test_an_export_does_not_write_through_a_planted_temporary_file(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("dear")
    out = tmp_path / "run.csv"
    (tmp_path / f".{out.name}.{os.getpid()}.part").symlink_to(victim)
    kvhook.open(DATA / "baseline.kvh").dump(out)
    assert victim.read_text() == "dear"
    assert (tmp_path / "run.csv").stat().st_size > 1000


@pytest.mark.parametrize("verb", ["summary", "autopsy", "recover", "report", "whatif"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
):
    pipe = tmp_path / "run.kvh"
    os.mkfifo(pipe)
    began = time.process_time()
    assert main([verb, str(pipe)]) == 1
    assert time.process_time() - began < 60, "nobody ever writes to it"
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a file" in line


def test_a_pipe_and_a_link_among_the_rings_are_passed_over(tmp_path: Path):
    rings = tmp_path / "rings"
    recording = Recording(rings)
    recording.step(0.5)
    os.mkfifo(rings / RING)
    (rings / "4194998-77-0.ring").symlink_to(recording.path)
    (ring,) = find_rings([rings])
    assert ring.path == recording.path


# ---- files that name other files -----------------------------------------------------------------------------------


def forged_core(folder: Path, ring: str) -> Path:
    """A trace of an engine core whose facts name a ring."""
    data = (DATA / "baseline.core0-32109.kvh").read_bytes()
    path = folder / "run.core0-32109.kvh"
    path.write_bytes(data)
    header = header_of(path)
    path.write_bytes(data + pack_meta(header.layout, 0, {"ring": ring}).tobytes())
    return path


def test_a_trace_cannot_make_a_reader_open_what_is_no_ring_of_this_user(tmp_path: Path):
    pipe = tmp_path / "4194999-77-0.core"
    os.mkfifo(pipe)
    plain = len(open_cores([forged_core(tmp_path, "")], "x").steps())
    names = [str(pipe), "/etc/passwd", str(tmp_path), "../../etc/passwd", "x" * 10_000, "a\0b", str(tmp_path / "no")]
    for name in names:
        assert len(open_cores([forged_core(tmp_path, name)], "x").steps()) == plain


def test_a_trace_that_names_the_ring_of_another_run_gets_nothing_of_it(tmp_path: Path):
    other = Recording(tmp_path / "rings")
    other.step(0.5)
    ring = tmp_path / "rings/4194999-77-0.core"
    other.path.rename(ring)
    assert ring_named(str(ring)) == ring
    cores = open_cores([forged_core(tmp_path, str(ring))], "x")
    assert len(cores.steps()) == len(open_cores([forged_core(tmp_path, "")], "x").steps())


def test_the_ring_of_another_user_is_none_that_a_trace_can_name(tmp_path: Path):
    ring = tmp_path / "4194999-77-0.core"
    ring.write_bytes(b"")
    assert ring_named(str(ring)) == ring
    give_away(ring, 12345)
    assert ring_named(str(ring)) is None


# ---- another user --------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
import numpy, kvhook.trace, kvhook.text.summary, kvhook.analysis.summarize, kvhook.cli.ls, kvhook.discovery.rings
from kvhook.cli import main, make_parser
make_parser()
try:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
except OSError:
    sys.exit(print("there is no other user"))
trace, rings = sys.argv[1:]
print(main(["summary", trace]), main(["ls", "--dir", rings]), main(["clean", "--all", "--dir", rings]))
"""


def test_another_user_reads_and_removes_nothing(tmp_path: Path, python: Python):
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        recording = Recording(folder / "rings", pid=4194999)
        recording.step(0.5)
        (folder / "rings").chmod(0o700)
        recording.spool_to(folder / "run.kvh", 10)
        done = python(AS_NOBODY, folder / "run.kvh", folder / "rings")
        assert recording.path.exists()
    if "there is no other user" in done.stdout:
        pytest.skip("this is the root of a user namespace without other users")
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 ")


# ---- processes -----------------------------------------------------------------------------------------------------


def test_a_number_that_a_process_has_again_does_not_make_a_ring_live(tmp_path: Path):
    mine = Recording(tmp_path / "mine")
    mine.step(0.5)
    earlier = Recording(tmp_path / "earlier")
    earlier.step(0.5)
    earlier.patch(start=earlier.start - 100)
    assert [r.state for r in find_rings([tmp_path / "mine"])] == [ALIVE]
    assert [r.state for r in find_rings([tmp_path / "earlier"])] == [DEAD]


#: Records three steps. What follows stands inside of its block.
RECORDS = """
import os, sys
import kvhook
from kvhook.cli import main
from tests.standin import fake_vllm, step_stats
with fake_vllm() as vllm:
    session = kvhook.install()
    engine = vllm.engine()
    engine.plan += [step_stats(kv_cache_usage=0.5) for _ in range(3)]
    for _ in range(3):
        engine.step()
"""
IN_CONTAINER = (
    RECORDS
    + """
    (ring,) = session.rings
    print(os.getpid(), ring, flush=True)
    if sys.argv[1:] == ["wait"]:
        sys.stdin.readline()
    print(main(["clean", "--all"]))
"""
)


def test_containers_that_share_memory_but_not_process_numbers_leave_each_other_s_rings_alone(tmp_path: Path):
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespace can be made here (needs unshare, and the right to use it)")
    history = tmp_path / "history"
    history.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.getcwd(),
        "KVHOOK_DIR": str(tmp_path / "rings"),
        "TMPDIR": str(history),
    }
    command = [*alone, sys.executable, "-c", IN_CONTAINER]
    first = subprocess.Popen(
        [*command, "wait"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None
    assert first.stdout is not None
    pid, ring = first.stdout.readline().rstrip("\n").split(" ", 1)
    kept = {path for path in history.iterdir() if path.name.startswith((HISTORY_PREFIX, MARK_PREFIX))}
    assert {path.is_dir() for path in kept} == {True, False}, "a temporary history, and the mark of the session"
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert second.stdout.split()[0] == pid == "1"
    assert second.stdout.splitlines()[0].split(" ", 1)[1] != ring, "both are process 1, and each has a ring of its own"
    assert kept <= set(history.iterdir()), "the first one's are there still: its engine cores ask for the mark"
    assert Path(ring).exists(), "the second one's `clean --all` has left it alone"
    found = {str(r.path): r for r in find_rings([tmp_path / "rings"])}
    assert (found[ring].state, found[ring].elsewhere, found[ring].steps) == (ALIVE, True, 3)
    first.stdin.write("go on\n")
    first.stdin.close()
    assert first.wait(300) == 0


SMALL_MEMORY = (
    RECORDS
    + """
    print(session.rings[0].parent, len(session.steps()), session.faults)
"""
)


@pytest.mark.parametrize(
    ("option", "at"), [("size=64m", "/dev/shm/kvhook-"), ("ro", "runtime/kvhook"), ("size=64k", "runtime/kvhook")]
)
def test_shared_memory_that_is_small_or_cannot_be_written(tmp_path: Path, python: Python, option: str, at: str):
    mount = f"mount -t tmpfs -o {option} kvhook-test /dev/shm"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("nothing can be mounted over /dev/shm here (needs unshare, and the right to use it)")
    (tmp_path / "runtime").mkdir()
    launcher = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"']
    said = python(SMALL_MEMORY, launcher=launcher, KVHOOK_DIR="", XDG_RUNTIME_DIR=str(tmp_path / "runtime")).stdout
    place, steps, faults = said.rsplit(maxsplit=2)
    assert at in place
    assert (steps, faults.strip()) == ("3", "{}")


# ---- the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_a_clock_that_jumps_changes_no_duration(fresh: Path, monkeypatch: pytest.MonkeyPatch, jump: int):
    with fake_vllm() as vllm:
        session = kvhook.install(trace=fresh / "run.kvh")
        engine = vllm.engine()
        engine.plan += [step_stats(kv_cache_usage=0.5, generated=1) for _ in range(6)]
        real, real_ns = time.time, time.time_ns
        for _ in range(3):
            engine.step()
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + jump * 10**9)
        for _ in range(3):
            engine.step()
        steps, summary = session.steps(), session.summary()
    kvhook.uninstall()
    assert (steps["t_end_ns"] >= steps["t_start_ns"]).all()
    assert (steps["t_end_ns"][1:] > steps["t_end_ns"][:-1]).all()
    assert 0 < summary.wall_time < 3600
    trace = kvhook.open(fresh / "run.kvh")
    assert len(trace.steps()) == 6
    assert trace.meta["records_lost"] == 0


def test_a_message_about_a_file_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(KvhookError) as error:
        kvhook.open(tmp_path / "no.kvh")
    assert "\n" not in str(error.value)
