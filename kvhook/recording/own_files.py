"""Names of the files of one process, where several processes run the same script.

Ranks of one job (torchrun, a trainer with an engine in each rank), forked and spawned children all get the same
``trace="run.kvh"``. Each records into a file of its own::

    run.kvh             the only process, or the first that came
    run-rank1.kvh       rank 1 of a job with several ranks; rank 0 has run-rank0.kvh
    run-pid4711.kvh     a forked child, or a process that found run.kvh taken

``kvhook.open("run*.kvh")`` opens them together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

#: What launchers set: rank, and number of ranks. torchrun and most trainers; Open MPI; PMI (MPICH, Intel MPI); Slurm.
RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def rank_of(environment: Mapping[str, str]) -> int | None:
    """The rank of this process, if its launcher started several; None if it is the only one or that is not known."""
    for rank, size in RANKS:
        number, total = environment.get(rank, ""), environment.get(size, "")
        if all(text.isdecimal() and len(text) < 10 for text in (number, total)) and int(total) > 1:
            return int(number)
    return None


def candidates(path: Path, number: int, *, forked: bool) -> Iterator[Path]:
    """The names a process may give to its file, the best first. Without end: the caller takes the first that is free.

    Args:
        path: what the user asked for.
        number: number of the file in this process: 0, or more where one process needs several.
        forked: this process was forked after `kvhook.install`.
    """
    rank, own = rank_of(os.environ), f"-pid{os.getpid()}"
    first = own if forked else "" if rank is None else f"-rank{rank}"
    part = f"-{number + 1}" if number else ""
    yield path.with_name(f"{path.stem}{first}{part}{path.suffix}")
    again = own if rank is None else f"-rank{rank}{own}"
    if again != first:
        yield path.with_name(f"{path.stem}{again}{part}{path.suffix}")
    attempt = 2
    while True:
        yield path.with_name(f"{path.stem}{again}{part}-{attempt}{path.suffix}")
        attempt += 1
