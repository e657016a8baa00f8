"""What can be read of a recording, in terms of its trace and of its engine cores."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvhook.errors import KvhookError
from kvhook.recording.subscription import EVERY, Callback, Subscription

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.faults import Faults
    from kvhook.recording.core_side import CoreSide
    from kvhook.recording.health import Health
    from kvhook.recording.recorder import Recorder
    from kvhook.recording.running import Opened, Running, SoFar
    from kvhook.recording.spool import Spool
    from kvhook.records.core import CoreRecords
    from kvhook.records.engine_events import EngineEvent
    from kvhook.records.events import Scope
    from kvhook.records.part import Interval
    from kvhook.text.summary import PrintedSummary
    from kvhook.text.windows import PrintedWindows
    from kvhook.trace import Trace

T = TypeVar("T")


class Readings(abc.ABC):
    """The part of `kvhook.Session` that reads. Nothing here changes the recording."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What to call the run."""

    @abc.abstractmethod
    def _up_to_date(self) -> dict[str, Any]:
        """Have all that was published in the files; gives what is known of the run beside them."""

    @abc.abstractmethod
    def _opened(self) -> Opened:
        """The files, see `kvhook.recording.running.Opened`."""

    @abc.abstractmethod
    def _check_own(self) -> None:
        """Raise if this session belongs to another process."""

    @abc.abstractmethod
    def _warmups(self) -> Sequence[Interval]:
        """From when to when the session was warming up so far."""

    #: what adds the run up, as soon as somebody needs it
    _running: dict[str, Running]
    _core_side: CoreSide

    def cores(self) -> CoreRecords:
        """The engine cores of this run so far, as `kvhook.records.core.CoreRecords`."""
        self._check_own()
        return self._core_side.records(self.name)

    def request_key(self, request_id: str) -> int:
        """The ``request_key`` of a request in `core_requests`: a digest of its id with this run's key."""
        return self._core_side.request_key(request_id)

    @property
    @abc.abstractmethod
    def is_closed(self) -> bool:
        """Whether nothing is recorded any more."""

    @abc.abstractmethod
    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Something in kvhook failed."""

    #: the recorder of each engine so far
    _recorders: dict[int, Recorder]

    #: what failed, and what the spool has counted
    _faults: Faults
    _spool: Spool

    def health(self) -> Health:
        """How the recording fares: what failed inside kvhook and is switched off, and how many records are lost.

        >>> print(session.health())
        kvhook is healthy: 1 engine, 1,204 records, none lost

        ``session.health().ok`` is for programs, ``.as_dict()`` for their logs.
        """
        from kvhook.recording.health import health_of

        more = self._up_to_date()
        counts = self._spool.counts()
        cores = self.cores()
        return health_of(
            (self._faults, self._core_side.faults),
            cores.facts,
            counts.values(),
            more.get("why_no_steps", ""),
            self._core_side.lost(cores),
        )

    def on_step(self, callback: Callback, *, every: float = EVERY) -> Subscription:
        """Hand every step from now on to a function; see `kvhook.on_step`."""
        if self.is_closed:
            raise KvhookError("this session is closed, so that no step will come: kvhook.install() begins another")
        subscription = Subscription(callback, every, lambda: list(self._recorders.values()), self.fault)
        vars(self).setdefault("_subscriptions", []).append(subscription)
        return subscription

    def end_subscriptions(self) -> None:
        """Hand over what is left, and no more."""
        for subscription in vars(self).get("_subscriptions", ()):
            subscription.close()

    def trace(self) -> Trace:
        """The run so far as a `kvhook.Trace`. Later steps are not in it."""
        from kvhook.trace import open_files

        more = self._up_to_date()
        paths, opened, counts = self._opened()
        trace = open_files(paths, self.name, more, counts, opened)
        trace.of_session = self.cores
        return trace

    @property
    def engine_events(self) -> list[EngineEvent]:
        """What was done to the engines so far: sleep, new weights, an emptied prefix cache, LoRA adapters; see
        `kvhook.Trace.engine_events`."""
        return self.trace().engine_events

    def summary(
        self,
        engine: int | None = None,
        *,
        scope: str | int | Scope | None = None,
        label: str | None = None,
        warmup: bool = False,
    ) -> PrintedSummary:
        """The run so far in numbers: ``print`` it for people, ``.as_dict()`` for programs. Warm-up is left out, which
        the summary says. It is added up while the engine works, so that it takes about as long after ten million steps
        as after a thousand; the summary of a scope or a label reads the run. For the arguments see
        `kvhook.Trace.summary`."""
        from kvhook.analysis.summarize import account_of
        from kvhook.recording.running import summary_so_far
        from kvhook.records.part import outside

        self._check_own()
        if scope is None and label is None:
            left = [] if warmup else self._warmups()
            if engine is None or len(self._recorders) < 2:
                core = account_of(self.cores().part(outside(left))) if left else self._core_side.account()
            else:
                mine = self.trace().cores_of(engine)
                core = account_of(mine.part(outside(left)) if left else mine)
            found = self.ask(lambda so_far: summary_so_far(so_far, engine, core, warmup=warmup))
            if found is not None:
                return found
        return self.trace().summary(engine, scope=scope, label=label, warmup=warmup)

    def windows(self, count: int, engine: int | None = None) -> PrintedWindows:
        """The run so far in so many windows of equal time, see `kvhook.Trace.windows`."""
        return self.trace().windows(count, engine)

    def ask(self, question: Callable[[SoFar], T]) -> T:
        """What a function makes of the run so far, which is only valid inside of it. Reads only what is new."""
        more = self._up_to_date()
        return self._adding_up().ask(question, self.name, more)

    def _adding_up(self) -> Running:
        from kvhook.recording.running import Running

        # no lock: the spool's thread asks as well, and `close` waits for it while it holds one
        return self._running.get("it") or self._running.setdefault("it", Running(self._opened, self._warmups))

    def _keep_up(self) -> None:
        """Add up what has come since; the spool's thread calls it now and then."""
        self._adding_up().keep_up()

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

    def dump(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        compress: bool = False,
        run: str | None = None,
    ) -> list[Path]:
        """Write the run so far to ``path``; the suffix says how: .parquet, .arrow, .jsonl, .csv, .kvh or
        .perfetto.json.gz. See `kvhook.Trace.dump`."""
        return self.trace().dump(path, overwrite=overwrite, compress=compress, run=run)

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

    def block_lives(self, core: int | None = None) -> npt.NDArray[np.void]:
        """One row per content that a KV block held so far, if kvhook was installed with ``core="blocks"``: cached,
        found again how often, evicted, needed again; see `kvhook.records.block_lives`."""
        return self.cores().block_lives(core)

    def prefixes(self, core: int | None = None) -> npt.NDArray[np.void]:
        """The tree of prefixes so far, if kvhook was installed with ``core="blocks"``: how many requests share the
        first blocks, and how often they were found; see `kvhook.records.block_lives`."""
        return self.cores().prefixes(core)
