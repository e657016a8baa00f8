"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

#: Opens a file for writing that takes its name only when everything has been written.
Opener = Callable[[Path], IO[bytes]]


@contextlib.contextmanager
def written_beside(*, private: bool = False) -> Iterator[tuple[Opener, list[Path]]]:
    """Write files under temporary names beside their own; they take their names together at the end of the block.

    If the block raises, or a file cannot be completed, nothing is left behind, and what was there before is untouched.

    Args:
        private: nobody else may read the files (0600), and they are on the disk before they take their names.

    Yields:
        The function that opens a file, and the list that holds the names of the files after the block.

    Raises:
        OSError: a file cannot be written or renamed.
    """
    names: list[Path] = []
    opened: list[tuple[IO[bytes], Path, Path]] = []

    def open_beside(path: Path) -> IO[bytes]:
        # a new file under a name that nobody can guess: what somebody has planted there is not written through
        temporary = path.with_name(f".{path.name[:200]}.{os.urandom(6).hex()}.part")
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
