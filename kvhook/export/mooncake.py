"""The requests of a run with the digests of their blocks, in the form of the Mooncake project's traces."""

from __future__ import annotations

from pathlib import Path

from kvhook.files import check_target, written_beside
from kvhook.whatif.mooncake import lines
from kvhook.whatif.requests import BlockRequests


def write(requests: BlockRequests, path: Path, *, overwrite: bool = False) -> list[Path]:
    """One line for each request; see `kvhook.whatif.mooncake`. Ids count up from 0: not even the digests are in it.

    Returns:
        The files written.

    Raises:
        ExportError: the file exists and `overwrite` is not set, or there is no such folder.
        OSError: it cannot be written. What was there is untouched.
    """
    check_target(path, overwrite=overwrite)
    with written_beside() as (opener, names):
        file = opener(path)
        for line in lines(requests):
            file.write(line.encode() + b"\n")
    return names
