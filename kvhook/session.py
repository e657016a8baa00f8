"""What `install` builds and `Session.close` takes down."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook import hooks
from kvhook.adapters.config import engine_facts
from kvhook.errors import KvhookError, StatsOffError
from kvhook.guard import Guard
from kvhook.recorder import Recorder
from kvhook.ring.layout import MAX_CAPACITY
from kvhook.ring.place import find_directory, history_root, process_start
from kvhook.rings import HISTORY_PREFIX, prune_histories
from kvhook.spool import TRACE_SUFFIX, Spool

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.adapters.compiler import PublishStep, Record
    from kvhook.adapters.table import Adapter
    from kvhook.analysis.summary import Summary
    from kvhook.trace import Trace

log = logging.getLogger("kvhook")

#: Slots of a ring: some 3 MB. In containers /dev/shm is often 64 MiB in all.
RING_SLOTS = 8192
#: Bytes of history on disk: 2.7 million steps.
HISTORY = "1GiB"
#: A slot with every column of the schema takes less than this; used to try out the ring's directory.
_MOST_SLOT_BYTES = 512

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
    ) -> None:
        self._guard = Guard()
        self._slots = _power_of_two(ring_slots)
        self._ring_dir = find_directory(ring_dir, self._slots * _MOST_SLOT_BYTES)
        self._recorders: dict[int, Recorder] = {}
        self._by_engine: dict[int, Recorder] = {}
        #: an engine with several engine cores (data-parallel ranks) has a recorder for each
        self._ranks: dict[int, list[Recorder]] = {}
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
                self._hook_ns = hooks.call_overhead_ns()
            facts = engine_facts(adapter, engine) | facts
            facts |= {"hook_call_ns": self._hook_ns, "engine_class": type(engine).__qualname__}
            recorder = Recorder(self._made, adapter, facts, self._ring_dir, self._slots, hooks.clock)
            self._made += 1
            self._recorders[recorder.number] = recorder
            self._by_engine.setdefault(id(engine), recorder)
            self._ranks.setdefault(id(engine), []).append(recorder)
            self._spool.add(recorder)
            return recorder.record, recorder.publish

    def close_engine(self, engine_id: int) -> None:
        """An engine was deleted; see `kvhook.hooks.Owner`."""
        with _lock:
            self._by_engine.pop(engine_id, None)
            for recorder in self._ranks.pop(engine_id, []):
                if not self._closed:
                    self._spool.remove(recorder.number)
                    recorder.close()

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Something in kvhook failed; see `kvhook.hooks.Owner`."""
        self._guard.fault(where, error, then)

    # ---- files -----------------------------------------------------------------------------------------------------

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

    Raises:
        RingDirectoryError: there is no place for the ring; the message gives each place that was tried.
        KvhookError: an argument is not usable; the message says which and why.
    """
    global _current
    with _lock:
        if _current is None or _current._pid != os.getpid():
            _current = Session(ring_dir=ring_dir, ring_slots=ring_slots, history=history, trace=trace)
            atexit.register(_at_exit, _current)
        elif trace is not None and _current._trace_path != Path(trace):
            log.warning("kvhook is installed already; trace=%r has no effect. kvhook.uninstall() first.", str(trace))
        if not hooks.armed():
            _warn_if_slow()
            hooks.arm(_current)
        return _current


def for_logger() -> Session:
    """The session that a `kvhook.StatLogger` records into: the one that is there, or a new one that patches nothing."""
    global _current
    with _lock:
        if _current is None or _current._pid != os.getpid():
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
    if getattr(engine, "log_stats", None) is False:
        raise StatsOffError(
            "this engine was built with its stats off (the default of vllm.LLM). Its scheduler, in a process of its "
            "own, then never makes any, and that cannot be changed any more. Call kvhook.install() before LLM(...), "
            "or build the engine with LLM(..., disable_log_stats=False)"
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
