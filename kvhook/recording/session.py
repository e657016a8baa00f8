"""What `install` builds and `Session.close` takes down."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook import hooks
from kvhook.adapters import BY_LEVEL
from kvhook.adapters.compiler import STATS_FOR_KVHOOK, no_sample
from kvhook.adapters.config import engine_facts
from kvhook.discovery.rings import HISTORY_PREFIX, prune_histories
from kvhook.errors import KvhookError, StatsOffError
from kvhook.faults import Guard
from kvhook.recording.budget import Cost, probe_of
from kvhook.recording.overhead import call_overhead_ns
from kvhook.recording.recorder import Recorder
from kvhook.recording.spool import Spool
from kvhook.ring.layout import MAX_CAPACITY
from kvhook.ring.place import find_directory, history_root, process_start
from kvhook.ring.trace_file import TRACE_SUFFIX

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.adapters.compiler import Counters, PublishStep, Record
    from kvhook.adapters.table import Adapter
    from kvhook.analysis.summary import Summary
    from kvhook.recording.budget import Level
    from kvhook.trace import Trace

log = logging.getLogger("kvhook")

#: Slots of a ring: some 3.7 MB. In containers /dev/shm is often 64 MiB in all.
RING_SLOTS = 8192
#: Bytes of history on disk: 2.4 million steps.
HISTORY = "1GiB"
#: A slot with every column of the schema takes less than this; used to try out the ring's directory.
_MOST_SLOT_BYTES = 512

NO_LIGHT = "V0 makes all its stats in one piece: there is nothing to leave out, so it is recorded in full"
AS_IT_COMES = "a kvhook.StatLogger is given what vLLM makes, and records it in full"

_lock = threading.RLock()
_current: Session | None = None


class Session:
    """A recording: every engine that is made while it is installed, step by step.

    Made by `install`. Everything that reads covers the whole run since then and may be called at any time, also while
    an engine works and after `close`.
    """

    def __init__(
        self,
        *,
        ring_dir: str | os.PathLike[str] | None,
        ring_slots: int,
        history: int | str,
        trace: str | os.PathLike[str] | None,
        level: str = "full",
        max_overhead: float | None = None,
    ) -> None:
        if level not in BY_LEVEL:
            raise KvhookError(f"level={level!r}: there are {', '.join(map(repr, BY_LEVEL))}")
        self.level = level
        self._max_overhead = _share(max_overhead)
        self._guard = Guard()
        self._slots = _power_of_two(ring_slots)
        self._ring_dir = find_directory(ring_dir, self._slots * _MOST_SLOT_BYTES)
        self._recorders: dict[int, Recorder] = {}
        self._by_engine: dict[int, Recorder] = {}
        #: an engine with several engine cores (data-parallel ranks) has a recorder for each
        self._ranks: dict[int, list[Recorder]] = {}
        self._costs: list[Cost] = []
        self._made = 0
        self._pid = os.getpid()
        self._closed = False
        self._history_dir: Path | None = None
        self._trace_path = Path(trace) if trace is not None else None
        if self._trace_path is not None:
            _check_trace_path(self._trace_path)
        limit = None if self._trace_path else parse_size(history)
        self._spool = Spool(self._next_file, limit, self._guard.fault)
        self._hook_ns = 0

    # ---- reading ---------------------------------------------------------------------------------------------------

    def steps(self, engine: int | None = None) -> npt.NDArray[np.void]:
        """One row per engine step so far: a structured array, see `kvhook.Trace.steps`."""
        return self.trace().steps(engine)

    def requests(self, engine: int | None = None) -> npt.NDArray[np.void]:
        """One row per finished request so far: a structured array, see `kvhook.Trace.requests`."""
        return self.trace().requests(engine)

    def latencies(
        self, series: str, engine: int | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Every single TTFT or inter-token latency so far, see `kvhook.Trace.latencies`."""
        return self.trace().latencies(series, engine)

    def summary(self, engine: int | None = None) -> Summary:
        """The run so far in numbers: ``print`` it for people, ``.as_dict()`` for programs."""
        return self.trace().summary(engine)

    def dump(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write the run so far to ``path``; the suffix says how (.jsonl, .csv, .kvh). See `kvhook.Trace.dump`."""
        return self.trace().dump(path, overwrite=overwrite)

    def trace(self) -> Trace:
        """The run so far as a `kvhook.Trace`. Later steps are not in it."""
        from kvhook.trace import open_files

        if self._pid != os.getpid():
            raise KvhookError(
                f"this session belongs to process {self._pid}, of which this one is a fork; it is not recorded. "
                "kvhook.install() makes a session of its own"
            )
        if not self._closed:
            self._spool.drain()
        more = {"faults": dict(self._guard.first), "hook_call_ns": self._hook_ns}
        try:
            paths, opened, counts = self._spool.open()
        except OSError as error:
            raise KvhookError(f"what was recorded is gone: {error.filename}: {error.strerror}") from None
        return open_files(paths, self._name(), more, counts, opened)

    @property
    def meta(self) -> dict[str, Any]:
        """Facts about the run: versions, engines, which columns are absent and why, records lost."""
        return self.trace().meta

    @property
    def rings(self) -> list[Path]:
        """The ring file of each engine so far: what other processes read live, and what is left after a crash."""
        return [recorder.ring.path for recorder in self._recorders.values()]

    @property
    def faults(self) -> dict[str, int]:
        """What failed inside kvhook, and how often. Empty in a healthy run."""
        return dict(self._guard.faults)

    # ---- life ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop recording: the rings are closed, the trace is completed. What was recorded can still be read.

        The patches in vLLM are taken out with `uninstall`, which also closes.
        """
        with _lock:
            if self._closed or self._pid != os.getpid():
                return
            self._spool.close()
            for recorder in self._recorders.values():
                recorder.close()
            self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if _current is self:
            uninstall()
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "recording"
        return f"<kvhook.Session {state}: {self._made} engines, {len(self._guard.faults)} faults>"

    # ---- called by the hooks ---------------------------------------------------------------------------------------

    def open_engine(self, engine: Any, adapter: Adapter, facts: dict[str, Any]) -> tuple[Record, PublishStep] | None:
        """A new engine was built; see `kvhook.hooks.Owner`."""
        with _lock:
            if self._closed:
                return None
            if not self._hook_ns:
                self._hook_ns = call_overhead_ns()
            facts = engine_facts(adapter, engine) | facts
            facts |= {"hook_call_ns": self._hook_ns, "engine_class": type(engine).__qualname__}
            if self._max_overhead is not None:
                facts["max_overhead"] = self._max_overhead
            timed = facts["timed_steps"]
            wanted = timed and not facts["stats_on"]
            probe = probe_of(engine, adapter, self._probe_failed) if wanted else None
            facts[STATS_FOR_KVHOOK] = probe is not None
            less = timed and adapter.family != "v0"  # whether it can be recorded for less
            budget = self._max_overhead if less else None
            cost = Cost(self._hook_ns, adapter.level, budget, self._step_down_of(engine, self._made))
            cost.probe = probe
            self._costs.append(cost)
            if self._max_overhead is not None and not less:
                self._say_no_budget(timed)
            sample = cost.sample if timed else no_sample
            recorder = Recorder(self._made, adapter, facts, self._ring_dir, self._slots, hooks.clock, sample)
            if adapter.level != self.level:
                why = NO_LIGHT if adapter.family == "v0" else AS_IT_COMES
                recorder.meta["levels"] = [{"step": 0, "level": adapter.level, "why": why}]
                log.warning("kvhook: level=%r: %s", self.level, why)
            self._made += 1
            self._recorders[recorder.number] = recorder
            self._by_engine.setdefault(id(engine), recorder)
            self._ranks.setdefault(id(engine), []).append(recorder)
            self._spool.add(recorder)
            return recorder.record, recorder.publish

    def _step_down_of(self, engine: Any, number: int) -> Callable[[Level, Counters, float], bool]:
        """What changes an engine over to a level that costs less; it runs in the engine's thread, between two steps."""
        alive = weakref.ref(engine)

        def step_down(level: Level, counters: Counters, share: float) -> bool:
            engine, recorder = alive(), self._recorders.get(number)
            if engine is None or recorder is None:
                return False
            try:
                functions = functools.partial(recorder.go_on, level=level.name, start=counters)
                done = hooks.step_down(engine, level.every, functions)
            except Exception as error:
                self._guard.fault("stepping down to a level that costs less", error, "the level stays as it is")
                return False
            why = f"kvhook took {share:.2%} of the time inside steps, {self._max_overhead:.2%} are allowed"
            change = {"step": counters.step, "level": level.name, "every": level.every, "share": share, "why": why}
            if not done:
                change = recorder.meta["levels"][-1] | {"why": f"{why}; this engine cannot be recorded for less"}
            recorder.meta["levels"] = [*recorder.meta["levels"], change]
            self._spool.tell_again(number)
            log.warning("kvhook: %s; from step %d on the level is %s", change["why"], counters.step, change["level"])
            return done

        return step_down

    def _probe_failed(self, error: Exception) -> None:
        self._guard.fault("measuring what vLLM's stats take", error, "it is not measured any more")

    def stop_measuring(self) -> None:
        """Leave nothing in the engines that waits for their next step."""
        for cost in self._costs:
            cost.stop()

    def _say_no_budget(self, timed: bool) -> None:
        why = (
            "V0 makes all its stats in one piece, so there is nothing to leave out"
            if timed
            else "on an event loop (AsyncLLM) there is no step whose time the cost could be a share of"
        )
        log.warning("kvhook: max_overhead has no effect on this engine: %s", why)

    def close_engine(self, engine_id: int) -> None:
        """An engine was deleted; see `kvhook.hooks.Owner`. It is called by a finalizer, and must wait for no lock."""
        self._by_engine.pop(engine_id, None)
        for recorder in self._ranks.pop(engine_id, []):
            self._spool.leave(recorder.number)

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Something in kvhook failed; see `kvhook.hooks.Owner`."""
        self._guard.fault(where, error, then)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _warn_of_other(self, *, trace: Any, level: str, max_overhead: Any) -> None:
        """Say which arguments of another `install` have no effect."""
        other = {}
        if trace is not None and self._trace_path != Path(trace):
            other["trace"] = str(trace)
        if level not in ("full", self.level):
            other["level"] = level
        if max_overhead not in (None, self._max_overhead):
            other["max_overhead"] = max_overhead
        for name, value in other.items():
            log.warning("kvhook is installed already; %s=%r has no effect. kvhook.uninstall() first.", name, value)

    def _name(self) -> str:
        return str(self._trace_path or "this session")

    def _next_file(self, number: int) -> Path:
        if self._trace_path is not None:
            path = self._trace_path
            return path if not number else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")
        if self._history_dir is None:
            pid = os.getpid()
            prefix = f"{HISTORY_PREFIX}{pid}-{process_start(pid)}-"
            prune_histories(history_root())
            self._history_dir = Path(tempfile.mkdtemp(prefix=prefix, dir=history_root()))
        return self._history_dir / f"{number:06}{TRACE_SUFFIX}"

    def _remove_history(self) -> None:
        if self._history_dir is not None and self._pid == os.getpid():
            shutil.rmtree(self._history_dir, ignore_errors=True)


def install(
    *,
    trace: str | os.PathLike[str] | None = None,
    history: int | str = HISTORY,
    ring_dir: str | os.PathLike[str] | None = None,
    ring_slots: int = RING_SLOTS,
    level: str = "full",
    max_overhead: float | None = None,
) -> Session:
    """Record every vLLM engine that is made from now on.

    Call it before ``LLM(...)``; before or after ``import vllm`` does not matter, and vLLM need not even be
    installed. Installing twice is installing once: the second call gives the session that is there.

    Args:
        trace: stream the run to this ``.kvh`` file. Without it, the run is kept in a temporary file until the
            process ends.
        history: how much of the run is kept on disk without `trace`: bytes, or text such as ``"500MB"``. Beyond it
            the oldest part is dropped, and counted.
        ring_dir: directory of the ring, instead of shared memory; also ``KVHOOK_DIR``.
        ring_slots: records the ring holds, rounded up to a power of two. It is what other processes see live, and
            what is left after a crash.
        level: ``"full"``, or ``"light"``: the scheduler's stats and exact token counts of every step, without latencies
            and single requests (`Summary.not_recorded`). vLLM's front end then works as it does without kvhook.
        max_overhead: the most that kvhook may take, as a share of the time inside steps, 0.01 say, what vLLM takes to
            make stats for it included. When that is exceeded for long (three times 256 steps), kvhook steps down to
            level light, and then counts the outputs of every 4th, 16th, 64th step only; the trace says when and why.

    Raises:
        RingDirectoryError: there is no place for the ring; the message gives each place that was tried.
        KvhookError: an argument is not usable; the message says which and why.
    """
    global _current
    with _lock:
        if _current is not None and _current._closed:
            hooks.disarm()  # closed by hand: it records nothing any more
            _current = None
        if _current is None or _current._pid != os.getpid():
            _current = Session(
                ring_dir=ring_dir,
                ring_slots=ring_slots,
                history=history,
                trace=trace,
                level=level,
                max_overhead=max_overhead,
            )
            atexit.register(_at_exit, _current)
        else:
            _current._warn_of_other(trace=trace, level=level, max_overhead=max_overhead)
        if not hooks.armed():
            _warn_if_slow()
            hooks.arm(_current, _current.level)
        return _current


def for_logger() -> Session:
    """The session that a `kvhook.StatLogger` records into: the one that is there, or a new one that patches nothing."""
    global _current
    with _lock:
        if _current is None or _current._closed or _current._pid != os.getpid():
            _current = Session(ring_dir=None, ring_slots=RING_SLOTS, history=HISTORY, trace=None)
            atexit.register(_at_exit, _current)
        return _current


def uninstall() -> None:
    """Take kvhook out of vLLM: the patched names are the very objects they were, the session is closed.

    Its data can still be read. Without a session, nothing happens.
    """
    global _current
    with _lock:
        session, _current = _current, None
        if session is not None:
            session.stop_measuring()
        hooks.disarm()
        if session is not None:
            session.close()


def attach(llm: Any) -> Session:
    """Record an engine that exists already; installs kvhook if that has not happened.

    Args:
        llm: a ``vllm.LLM``, its ``llm_engine``, or an ``AsyncLLM``.

    Raises:
        StatsOffError: the engine was built with its stats off (``LLM``'s default).
        KvhookError: it is not a vLLM engine that this kvhook knows.
    """
    # LLM has its engine in `llm_engine`, V0's AsyncLLMEngine in `engine`; V1's AsyncLLM is one
    engine = getattr(llm, "llm_engine", getattr(llm, "engine", llm))
    if not hasattr(engine, "step") and not hasattr(engine, "add_request"):
        raise KvhookError(f"attach() takes a vllm.LLM or its llm_engine, not {type(llm).__name__}")
    if _current is not None and _current._pid == os.getpid() and hooks.is_recorded(engine):
        return _current
    if getattr(engine, "log_stats", None) is False:
        raise StatsOffError(
            "this engine makes no stats, and that cannot be changed any more: it was built with them off (the default "
            "of vllm.LLM), or kvhook turned them off again when it was uninstalled. Call kvhook.install() before "
            "LLM(...), or build the engine with LLM(..., disable_log_stats=False)"
        )
    session = install()
    if hooks.adapter_of(engine) is None:
        raise KvhookError("the engine's class is not from a vLLM that this kvhook knows, so it cannot be recorded")
    hooks.watch(engine, stats_were_on=True)
    return session


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text like ``"500MB"``, ``"1GiB"`` or ``"2g"``.

    Raises:
        KvhookError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b|)\s*", str(size), re.IGNORECASE)
    if not match or isinstance(size, (float, bool)):
        raise KvhookError(f"{size!r} is not a size; say bytes, or text like '500MB' or '1GiB'")
    number, unit, rest = match.groups()
    factor = 1000 if rest.lower() == "b" else 1024
    return int(float(number) * factor ** " kmgt".index(unit.lower() or " "))


def _share(max_overhead: Any) -> float | None:
    if max_overhead is None:
        return None
    if isinstance(max_overhead, bool) or not isinstance(max_overhead, (int, float)) or not 0 < max_overhead <= 1:
        raise KvhookError(f"max_overhead is a share of the step time, above 0 and up to 1 (0.01), not {max_overhead!r}")
    return float(max_overhead)


def _power_of_two(slots: Any) -> int:
    if not isinstance(slots, int) or isinstance(slots, bool) or not 1 <= slots <= MAX_CAPACITY:
        raise KvhookError(f"ring_slots is a number from 1 to {MAX_CAPACITY}, not {slots!r}")
    return max(64, 1 << (slots - 1).bit_length())


def _check_trace_path(path: Path) -> None:
    if path.suffix != TRACE_SUFFIX:
        raise KvhookError(f"trace={str(path)!r}: a trace ends in {TRACE_SUFFIX}; other formats: session.dump()")
    if path.exists():
        raise KvhookError(f"trace={str(path)!r} exists, and kvhook does not overwrite: take another name or remove it")
    if not path.parent.is_dir():
        raise KvhookError(f"trace={str(path)!r}: there is no directory {path.parent}; make it first")


def _warn_if_slow() -> None:
    import wrapt

    if wrapt.FunctionWrapper.__module__ == "wrapt.wrappers":
        log.warning(
            "kvhook: wrapt runs without its C extension here, which makes each step some 2 us dearer. "
            "pip install --force-reinstall wrapt brings it back"
        )


def _at_exit(session: Session) -> None:
    """The interpreter ends: complete what was recorded, remove what was temporary."""
    session.close()
    session._remove_history()
