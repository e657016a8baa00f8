"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kvhook.errors import ExportError

#: Opens a file for writing that takes its name only when everything has been written.
Opener = Callable[[Path], IO[bytes]]


def check_target(path: Path, *, overwrite: bool) -> None:
    """Whether a file may be written at this name.

    Raises:
        ExportError: something is there and `overwrite` is not set, or the directory is not there.
        OSError: something is there that is never replaced, see `check_replaceable`.
    """
    if os.path.lexists(path) and not overwrite:
        raise ExportError(f"{path} exists; take another name, or say overwrite=True (--force)")
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no directory {path.parent}; make it first")
    check_replaceable(path)


def check_replaceable(path: Path) -> None:
    """Whether a new file may take the place of what is at this name, if something is. A link, a pipe or a device stays:
    whoever is root would take ``/dev/null`` from all programs.

    Raises:
        OSError: it may not.
    """
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(kind):
        what = next((name for name, is_one in _KINDS.items() if is_one(kind)), "no file")
        raise OSError(errno.EINVAL, f"it is {what}, and only a file is replaced", str(path))


_KINDS: dict[str, Callable[[int], bool]] = {
    "a symbolic link": stat.S_ISLNK,
    "a directory": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda kind: stat.S_ISCHR(kind) or stat.S_ISBLK(kind),
}


@contextlib.contextmanager
def written_beside(*, private: bool = False) -> Iterator[tuple[Opener, list[Path]]]:
    """Write files under temporary names beside their own; they take their names together at the end of the block.

    If the block raises, or a file cannot be completed, nothing is left behind, and what was there before is untouched.

    Args:
        private: nobody else may read the files (0600), and they are on the disk before they take their names.

    Yields:
        The function that opens a file, and the list that holds the names of the files after the block.

    Raises:
        OSError: a file cannot be written or renamed, or there is something else than a file at its name.
    """
    names: list[Path] = []
    opened: list[tuple[IO[bytes], Path, Path]] = []

    def open_beside(path: Path) -> IO[bytes]:
        check_replaceable(path)
        # a new file under a name that nobody can guess: what somebody has planted there is not written through
        # of a long name the beginning alone, since no name may have more than 255 bytes
        begin = os.fsdecode(os.fsencode(path.name)[:200])
        temporary = path.with_name(f".{begin}.{os.urandom(6).hex()}.part")
        file = open(temporary, "xb", opener=_private if private else _usual)  # noqa: SIM115
        opened.append((file, temporary, path))
        return file

    try:
        yield open_beside, names
        for file, _, _ in opened:
            if private:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        for _, _, path in opened:
            check_replaceable(path)
        for _, temporary, path in opened:
            os.replace(temporary, path)
            names.append(path)
    except BaseException:
        for file, temporary, _ in opened:
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)
        raise


def _usual(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
