"""What can be read of a recording, in terms of its trace and of its engine cores."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.records.core import CoreRecords
    from kvhook.text.summary import PrintedSummary
    from kvhook.trace import Trace


class Readings(abc.ABC):
    """The part of `kvhook.Session` that reads. Nothing here changes the recording."""

    @abc.abstractmethod
    def trace(self) -> Trace:
        """The run so far as a `kvhook.Trace`."""

    @abc.abstractmethod
    def cores(self) -> CoreRecords:
        """The engine cores of this run so far."""

    def steps(
        self, engine: int | None = None, *, complete: bool = False, columns: Sequence[str] | None = None
    ) -> npt.NDArray[np.void]:
        """One row per engine step so far. For states (usage, requests that run or wait) use ``complete=True``: it
        leaves out steps in which they are not known. `columns`: only these. A structured array, see
        `kvhook.Trace.steps`."""
        return self.trace().steps(engine, complete=complete, columns=columns)

    def requests(self, engine: int | None = None, *, columns: Sequence[str] | None = None) -> npt.NDArray[np.void]:
        """One row per finished request so far: a structured array, see `kvhook.Trace.requests`."""
        return self.trace().requests(engine, columns=columns)

    def latencies(
        self, series: str, engine: int | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Every single TTFT or inter-token latency so far, see `kvhook.Trace.latencies`."""
        return self.trace().latencies(series, engine)

    def summary(self, engine: int | None = None) -> PrintedSummary:
        """The run so far in numbers: ``print`` it for people, ``.as_dict()`` for programs."""
        return self.trace().summary(engine)

    def dump(self, path: str | os.PathLike[str], *, overwrite: bool = False, compress: bool = False) -> list[Path]:
        """Write the run so far to ``path``; the suffix says how (.jsonl, .csv, .kvh). See `kvhook.Trace.dump`."""
        return self.trace().dump(path, overwrite=overwrite, compress=compress)

    def core_steps(self, core: int | None = None) -> npt.NDArray[np.void]:
        """One row per step of an engine core so far, see `kvhook.records.core.CoreRecords.steps`. `cores` says what is
        known of the engine cores, and why there are none if there are none."""
        return self.cores().steps(core)

    def core_requests(self, core: int | None = None) -> npt.NDArray[np.void]:
        """One row per request that has ended, as its engine core saw it: arrived, scheduled, preempted, finished."""
        return self.cores().requests(core)

    def preemptions(self, core: int | None = None) -> npt.NDArray[np.void]:
        """One row per preemption so far: who, when, and what it cost."""
        return self.cores().preemptions(core)

    def lookups(self, core: int | None = None) -> npt.NDArray[np.void]:
        """One row per look-up in the prefix cache that a request was then scheduled with: what was found, and why not
        more."""
        return self.cores().lookups(core)

    def blocks(self, core: int | None = None) -> npt.NDArray[np.void]:
        """One row per event of a KV block so far, if kvhook was installed with ``core="blocks"``: allocated, hit,
        cached, freed, evicted."""
        return self.cores().blocks(core)
