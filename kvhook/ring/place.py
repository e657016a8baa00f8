"""Where rings live: a directory of the user's own, in memory where there is one, and safe from others.

Order: the directory that was asked for (argument, then ``KVHOOK_DIR``), else ``/dev/shm/kvhook-$UID``, else
``$XDG_RUNTIME_DIR/kvhook``, else ``$TMPDIR/kvhook-$UID``. A default place is made 0700 and refused when it is a link
or belongs to somebody else: its name can be guessed, so anybody could have planted it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

from kvhook.errors import RingDirectoryError

ENV_DIR = "KVHOOK_DIR"
RING_SUFFIX = ".ring"
#: What is recorded -> how its rings are called: of the front end, inside the engine core, and the ledger of blocks.
RING_SUFFIXES = {"": RING_SUFFIX, "core": ".core", "blocks": ".blocks"}
_SUFFIXES = "|".join(map(re.escape, RING_SUFFIXES.values()))
#: The name of a ring: process, its start time, number in the process.
RING_NAME = re.compile(rf"(\d{{1,10}})-(\d{{1,19}})-(\d{{1,9}})(?:-\d{{1,3}})?({_SUFFIXES})")


def default_directories() -> list[Path]:
    """The default places in order of preference; shared memory first (p99 of a store 3.5 us, on disk 33 us)."""
    uid = os.getuid()
    places = [Path(f"/dev/shm/kvhook-{uid}")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(Path(runtime) / "kvhook")
    if (temporary := _temporary()) is not None:
        places.append(temporary / f"kvhook-{uid}")
    return places


def _temporary() -> Path | None:
    """Where temporary files go; None where none of the usual places can be written: a read-only container."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return None


def find_directory(wanted: str | os.PathLike[str] | None = None, need_bytes: int = 0) -> Path:
    """The first directory in line that is safe, writable, and has `need_bytes` free.

    Args:
        wanted: a directory to use and no other; the defaults are not tried then.
        need_bytes: what is about to be written there; tried out with a file that is removed again.

    Raises:
        RingDirectoryError: none will do; the message gives each place with its reason.
    """
    asked = wanted or os.environ.get(ENV_DIR)
    reasons = []
    for place in [Path(asked)] if asked else default_directories():
        try:
            prepare_directory(place, strict=not asked)
            try_out(place, need_bytes)
            return place.absolute()  # the program may go elsewhere
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
    raise RingDirectoryError(
        "there is no place for kvhook's ring:\n  "
        + "\n  ".join(reasons)
        + f"\nName a writable directory with {max(need_bytes / 2**20, 0.1):.1f} MiB free: "
        f"kvhook.install(ring_dir=...) or {ENV_DIR}=..., or make the ring smaller: kvhook.install(ring_slots=1024)"
    )


def prepare_directory(place: Path, *, strict: bool) -> None:
    """Make a directory, 0700, or check the one that is there.

    Args:
        strict: the name can be guessed by others, so a link or somebody else's directory is refused.

    Raises:
        OSError: it cannot be made, or is refused; `strerror` says why.
    """
    try:
        os.makedirs(place.parent, exist_ok=True)
        os.mkdir(place, 0o700)
    except FileExistsError:
        pass
    info = os.lstat(place) if strict else os.stat(place)
    if stat.S_ISLNK(info.st_mode):
        raise PermissionError(0, "it is a symbolic link; refused, since somebody else could have planted it")
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(0, "it is not a directory")
    if strict and info.st_uid != os.geteuid():
        raise PermissionError(0, f"it belongs to user {info.st_uid}; refused")
    if strict and stat.S_IMODE(info.st_mode) & 0o077:
        os.chmod(place, 0o700)


def ring_named(text: str) -> Path | None:
    """The ring that a trace names, if a ring can be called so and it is a file of this user; else None.

    A trace may be somebody else's, and name what it wants.

    Args:
        text: a path, or the name alone, which is then looked for where rings are.
    """
    named = Path(text[:4096].replace("\0", ""))
    if not RING_NAME.fullmatch(named.name):
        return None
    asked = os.environ.get(ENV_DIR)
    places = [Path(asked)] if asked else []
    for path in [named] if named.is_absolute() else [place / named.name for place in [*places, *default_directories()]]:
        try:
            info = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid():
            return path
    return None


def open_regular(path: Path | str, *, follow_links: bool = True) -> int:
    """Open a file for reading, if it is one: opening a pipe would wait for somebody who writes to it.

    Raises:
        OSError: it cannot be opened, or it is a pipe, a device or a directory.
    """
    # O_NONBLOCK does nothing to files
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow_links else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return fd


def create_file(path: Path, size: int = 0) -> int:
    """Make a new file, 0600, and give its descriptor. `size` bytes are really allocated.

    A map over a file that was only ``ftruncate``d kills the process with SIGBUS at the first store once tmpfs is
    full; ``posix_fallocate`` fails here and now instead.

    Raises:
        OSError: it exists, its directory is gone, or the space is not there (then nothing is left behind).
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def history_root() -> Path:
    """Where the temporary history goes: on disk. ``/tmp`` is memory on many systems, ``/var/tmp`` is not. In shared
    memory, where nothing else can be written."""
    if not os.environ.get("TMPDIR") and os.access("/var/tmp", os.W_OK | os.X_OK):
        return Path("/var/tmp")
    return _temporary() or Path("/dev/shm")


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since boot; tells a process from a later one of the same number.

    0 where there is no ``/proc``, and where there is no such process.
    """
    return _process_stat(pid).start


def process_parent(pid: int) -> int:
    """The parent of a process at this moment; 0 where there is no ``/proc``, and where there is no such process."""
    return _process_stat(pid).parent


def is_alive(pid: int, start: int) -> bool:
    """Whether the very process that had this number and start time still runs. One that has ended and only waits for
    its parent to notice (a zombie) does not."""
    if not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there is such a process, of another user
    state, _, now = _process_stat(pid)
    return state not in ("Z", "X") and (not (start and now) or start == now)


def pid_namespace() -> int:
    """The namespace in which this process's number counts; 0 where it cannot be known. Containers that share
    ``/dev/shm`` (``--ipc=host``) each have their own, and say nothing about each other's processes."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class _Stat(NamedTuple):
    """What the system tells of a process: the letter of its state, its parent, its start time."""

    state: str
    parent: int
    start: int


def _process_stat(pid: int) -> _Stat:
    """What the system tells of a process; ("", 0, 0) if that cannot be known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            # fields 3, 4 and 22; the name in field 2 may hold spaces, so count from behind its closing parenthesis
            fields = f.read().rpartition(b")")[2].split()
            return _Stat(fields[0].decode(), int(fields[1]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return _Stat("", 0, 0)


def try_out(place: Path, need_bytes: int = 0) -> None:
    """Make a file in a directory and remove it again.

    Raises:
        OSError: that is not possible.
    """
    probe = place / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    os.close(create_file(probe, max(need_bytes, 1)))
    probe.unlink()
