"""Where rings go: the place asked for, else the next in line, never a place that is not safe, never a late crash."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

import kvhook
from kvhook.errors import RingDirectoryError
from kvhook.ring import place
from kvhook.ring.place import default_directories, find_directory
from tests.conftest import Python, give_away
from tests.standin import fake_vllm


@pytest.fixture
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVHOOK_DIR", raising=False)


def line_up(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    monkeypatch.setattr(place, "default_directories", lambda: list(places))


def test_argument_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVHOOK_DIR", str(tmp_path / "environment"))
    assert find_directory(tmp_path / "argument") == tmp_path / "argument"
    assert not (tmp_path / "environment").exists()


def test_environment_goes_before_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVHOOK_DIR", str(tmp_path / "a" / "b"))
    assert find_directory() == tmp_path / "a" / "b"


def test_ring_of_an_engine_lies_where_the_environment_says(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVHOOK_DIR", str(fresh / "there"))
    with fake_vllm() as vllm, kvhook.install():
        vllm.engine()
        (ring,) = (fresh / "there").iterdir()
        assert ring.suffix == ".ring"
        assert ring.name.startswith(f"{os.getpid()}-")


@pytest.mark.usefixtures("no_wish")
def test_defaults_are_shared_memory_then_runtime_then_temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first, second, third = default_directories()
    assert first == Path(f"/dev/shm/kvhook-{os.getuid()}")
    assert second == tmp_path / "kvhook"
    assert third.name == f"kvhook-{os.getuid()}"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_directories() == [first, third]


@pytest.mark.usefixtures("no_wish")
def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line_up(monkeypatch, tmp_path / "a")
    assert stat.S_IMODE(find_directory().stat().st_mode) == 0o700


@pytest.mark.usefixtures("no_wish")
def test_a_default_directory_that_others_may_read_is_closed_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o755)
    line_up(monkeypatch, tmp_path / "a")
    assert stat.S_IMODE(find_directory().stat().st_mode) == 0o700


@pytest.mark.usefixtures("no_wish")
def test_the_next_in_line_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    line_up(monkeypatch, tmp_path / "file", tmp_path / "file" / "below", tmp_path / "good")
    assert find_directory() == tmp_path / "good"


@pytest.mark.usefixtures("no_wish")
def test_a_planted_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    line_up(monkeypatch, tmp_path / "link")
    with pytest.raises(RingDirectoryError, match="symbolic link"):
        find_directory()
    line_up(monkeypatch, tmp_path / "link", tmp_path / "good")
    assert find_directory() == tmp_path / "good"
    assert list((tmp_path / "target").iterdir()) == []


def test_a_link_of_the_users_own_is_followed(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert find_directory(tmp_path / "link") == tmp_path / "link"


@pytest.mark.usefixtures("no_wish")
def test_a_default_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    give_away(tmp_path / "a", 12345)
    line_up(monkeypatch, tmp_path / "a")
    with pytest.raises(RingDirectoryError, match="belongs to user 12345"):
        find_directory()


@pytest.mark.usefixtures("no_wish")
def test_error_names_each_place_with_its_reason_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    line_up(monkeypatch, tmp_path / "file", tmp_path / "link")
    with pytest.raises(RingDirectoryError) as error:
        find_directory()
    text = str(error.value)
    assert f"{tmp_path / 'file'}: it is not a directory" in text
    assert f"{tmp_path / 'link'}: it is a symbolic link" in text
    assert "kvhook.install(ring_dir=...)" in text
    assert "KVHOOK_DIR" in text


def test_trying_out_leaves_nothing(tmp_path: Path):
    find_directory(tmp_path / "a", 1 << 20)
    assert list((tmp_path / "a").iterdir()) == []


def test_asked_for_place_that_will_not_do_fails_install(fresh: Path):
    (fresh / "file").write_text("")
    with pytest.raises(RingDirectoryError, match="not a directory"):
        kvhook.install(ring_dir=fresh / "file")
    # and a second try with another place works
    with kvhook.install(ring_dir=fresh / "good"):
        assert (fresh / "good").is_dir()


UNWRITABLE = """
import os, sys
import kvhook, kvhook.recording.session, numpy
from kvhook.errors import RingDirectoryError
if os.access(sys.argv[1], os.W_OK):  # root may write everywhere
    try:
        os.seteuid(65534)
    except OSError:
        sys.exit(print("there is no other user"))
try:
    kvhook.install(ring_dir=sys.argv[1])
except RingDirectoryError as error:
    print(error)
"""


def test_unwritable_directory_fails_install(tmp_path: Path, python: Python):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o555)
    tmp_path.chmod(0o755)
    said = python(UNWRITABLE, tmp_path / "a").stdout
    if "there is no other user" in said:
        pytest.skip("this is the root of a user namespace without other users, who may write everywhere")
    assert f"{tmp_path / 'a'}: Permission denied" in said


def test_no_room_for_the_ring_fails_install(tmp_path: Path, python: Python):
    code = """
import resource, sys
import kvhook
from kvhook.errors import RingDirectoryError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    kvhook.install(ring_dir=sys.argv[1])
except RingDirectoryError as error:
    print(error)
print(kvhook.install(ring_dir=sys.argv[1], ring_slots=1024))
"""
    said = python(code, tmp_path / "a").stdout
    assert f"{tmp_path / 'a'}: File too large" in said
    assert "4.0 MiB free" in said
    assert "<kvhook.Session recording: 0 engines, 0 faults>" in said
    assert list((tmp_path / "a").iterdir()) == []


FULL = """
import sys
import kvhook, kvhook.recording.session
from tests.standin import fake_vllm, step_stats
from kvhook.errors import RingDirectoryError
full = sys.argv[1]
try:
    kvhook.install(ring_dir=full)
except RingDirectoryError as error:
    print(error)
with fake_vllm() as vllm:
    # small enough now; but when the engine comes, somebody else has taken the room
    session = kvhook.install(ring_dir=full, ring_slots=1024)
    with open(full + "/somebody-else", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    engine = vllm.engine()
    engine.plan += [step_stats() for _ in range(3)]
    print([engine.step() for _ in range(3)])
print(session.faults)
"""


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_full_tmpfs_fails_install_and_never_the_engine(tmp_path: Path, python: Python):
    # A map over a file that is not allocated would kill the process with SIGBUS here.
    full = tmp_path / "full"
    full.mkdir()
    mount = f"mount -t tmpfs -o size=1m kvhook-test {shlex.quote(str(full))}"
    # root may mount; others may as the root of a user namespace, where the kernel lets them
    ways = [["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]]
    ways = [way for way in ways if shutil.which("unshare") and succeeds([*way, "sh", "-c", mount])]
    if not ways:
        pytest.skip("a small tmpfs cannot be mounted here (needs unshare, and the right to use it)")
    done = python(FULL, full, launcher=[*ways[0], "sh", "-c", f'{mount} && exec "$0" "$@"'])
    assert f"{full}: No space left on device" in done.stdout
    assert "[['output of the step'], ['output of the step'], ['output of the step']]" in done.stdout
    assert "'starting to record an engine': 1" in done.stdout
    assert "No space left on device" in done.stderr
