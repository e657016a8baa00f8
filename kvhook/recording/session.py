"""A recording: what is made for each engine, what can be read of it, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook import forks, hooks
from kvhook.adapters.table import read_path
from kvhook.discovery.cleaning import HISTORY_PREFIX, prune_histories
from kvhook.errors import KvhookError
from kvhook.faults import LIMITS, NEEDED, Faults, contained
from kvhook.recording import own_files
from kvhook.recording.budget import OverheadMonitor
from kvhook.recording.core_side import CoreSide
from kvhook.recording.launched import tell_runs
from kvhook.recording.notebook import Notebook, check_name
from kvhook.recording.own_steps import OwnSteps
from kvhook.recording.owner import Owner, lock
from kvhook.recording.recorder import Recorder
from kvhook.recording.spool import WRITING, Spool
from kvhook.recording.why_no_steps import not_recorded, why_no_file, why_no_steps
from kvhook.ring.place import find_directory, history_root, process_start
from kvhook.ring.trace_file import TRACE_SUFFIX

if TYPE_CHECKING:
    from kvhook.options import Options
    from kvhook.recording.running import Opened, Running
    from kvhook.records.events import Scope
    from kvhook.records.part import Interval

log = logging.getLogger("kvhook")

#: A slot with every column of the schema takes less than this; used to try out the ring's directory.
_MOST_SLOT_BYTES = 512


class Session(Owner):
    """A recording: every engine that is made while it is installed, step by step.

    Made by `install`. Everything that reads covers the whole run since then and may be called at any time, also while
    an engine works and after `close`.
    """

    #: whether it is only recorded into by `kvhook.StatLogger`, and no name of vLLM is patched
    by_logger = False

    def __init__(self, options: Options, on_exit: Callable[[Session], None] = lambda _: None) -> None:
        self._on_exit = on_exit
        self.begin(options)

    def begin(self, options: Options) -> None:
        """Begin anew, with nothing recorded. For a session that has just been made, or that came into a forked child.

        Raises:
            RingDirectoryError: there is no place for the ring.
            KvhookError: an option is not usable.
        """
        options.check()
        #: whether this process has got the session by a fork, and not by an `install` of its own
        self._inherited = False
        self._ring_dir = find_directory(options.ring_dir, options.ring_capacity * _MOST_SLOT_BYTES)
        self._forget_everything(options)

    def begin_in_child(self) -> None:
        """This process was forked off: what was recorded is the parent's, and engines made here are recorded into files
        of this process. Called at the fork, so it opens no file and waits for no lock."""
        self._inherited = True
        for monitor in self._monitors:
            monitor.stop()  # one may be measuring in the parent's engine, of which this process has a copy
        self._forget_everything(self.options)

    def _forget_everything(self, options: Options) -> None:
        self.options = options
        self._faults = Faults()
        self._recorders: dict[int, Recorder] = {}
        #: id(engine) -> its recorders: one for each engine core (data-parallel rank)
        self._recorders_of: dict[int, list[Recorder]] = {}
        self._monitors: list[OverheadMonitor] = []
        self._next_number = 0
        #: engines that existed before kvhook was installed
        self.unrecorded_engines = 0
        self._made_in = forks.generation
        self._closed = False
        self._history_dir: Path | None = None
        self._core_side = CoreSide(options, self._ring_dir)
        self._core_side.hash_ids()
        #: what adds the run up, as soon as somebody needs it
        self._running: dict[str, Running] = {}
        self._notebook = Notebook(
            self._write_events, options.labels, self._core_side.request_key, nameless=options.anonymous
        )
        self._spool = Spool(self._next_files, options.history_bytes, self.fault, self._keep_up, self._notebook)
        self._own_steps = OwnSteps(self._spool.write_meta_again)
        self._call_overhead_ns = 0

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _up_to_date(self) -> dict[str, Any]:
        """Have all that was published in the files; gives what is known of the run beside them."""
        self._check_own()
        if not self._closed:
            hooks.flush()
            self._spool.drain()
        more: dict[str, Any] = {
            "faults": self._first_errors(),
            "hook_call_ns": self._call_overhead_ns,
        }
        if not any(self._spool.published.values()):
            more["why_no_steps"] = self.why_no_steps()
        elif not self._spool.paths():
            more["why_no_steps"] = why_no_file(
                self.name, self._faults.last_errors.get(WRITING, "unknown"), self._spool.counts().values()
            )
        return more

    def _opened(self) -> Opened:
        try:
            return self._spool.open()
        except OSError as error:
            raise KvhookError(f"what was recorded is gone: {error.filename}: {error.strerror}") from None

    def _warmups(self) -> Sequence[Interval]:
        return self._notebook.warmups()

    def _check_own(self) -> None:
        if self.belongs_to_parent:
            raise KvhookError(
                "this session was closed, or replaced, before this process was forked off: it belongs to the parent. "
                "kvhook.install() makes a session for this process"
            )

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
        """What failed inside kvhook, and how often. Empty in a healthy run. What fails in an engine core of its own
        process is in `cores().facts`, as ``failed``."""
        return dict(self._faults.counts) | self._core_side.faults.counts

    @property
    def level(self) -> str:
        """The level that was asked for."""
        return self.options.level

    @property
    def name(self) -> str:
        """The trace file, if the run is streamed to one."""
        files = self.files
        return str(files[0] if files else self.options.trace_path or "this session")

    @property
    def files(self) -> list[Path]:
        """The trace files of this process so far, where `install(trace=...)` asked for one. Ranks of a job, forked and
        spawned children each have files of their own; see `kvhook.recording.own_files`."""
        return self._spool.paths() if self.options.trace_path is not None else []

    @property
    def is_unused(self) -> bool:
        """Whether this process was forked off and has recorded no engine yet: then it may be given other options."""
        return self._inherited and not self._recorders

    # ---- life ------------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._closed

    @property
    def belongs_to_parent(self) -> bool:
        """Whether this process was forked off since the session was made: then it belongs to the parent process."""
        return self._made_in != forks.generation

    def close(self) -> None:
        """Stop recording: the rings are closed, the trace is completed. What was recorded can still be read.

        The patches in vLLM are taken out with `uninstall`, which also closes.
        """
        with lock:
            if self._closed or self.belongs_to_parent:
                return
            for part in (self.disarm_core, self.end_subscriptions, self._spool.close, self._close_rings):
                with contained(lambda error: self.fault("closing the session", error, "the rest of it is closed")):
                    part()
            self._closed = self._notebook.closed = True
            # what is called at the end of the process stays alive until then: no more than what is still to be done
            atexit.unregister(self.end)
            atexit.register(_remove, self._temporary(), forks.generation)

    def _close_rings(self) -> None:
        if not any(self._spool.published.values()) and (why := self._why_not_recorded()):
            log.warning("kvhook: nothing was recorded: %s", why)
        for recorder in self._recorders.values():
            recorder.close()

    def stop_measuring(self) -> None:
        """Take out of the engines what waits for their next step in order to measure it."""
        for monitor in self._monitors:
            monitor.stop()

    def remove_history(self) -> None:
        """Delete the temporary files. For the end of the interpreter: nothing can be read afterwards."""
        _remove(self._temporary(), self._made_in)

    def _temporary(self) -> list[Path]:
        return [*self._core_side.temporary(), *([self._history_dir] if self._history_dir is not None else [])]

    def end(self) -> None:
        """The process ends: complete what was recorded, remove what was temporary."""
        self._core_side.ends = self.options.trace is None
        self.close()
        self.remove_history()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_exit(self)
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "recording"
        return f"<kvhook.Session {state}: {self._next_number} engines, {len(self._faults.counts)} faults>"

    def scope(self, name: str, *, warmup: bool | None = None) -> contextlib.AbstractContextManager[Scope]:
        """Give a part of the run a name: what happens inside the ``with`` block.

        >>> with session.scope("warm-up"):
        ...     outputs = llm.generate(prompts[:4], params)
        >>> with session.scope("A"):
        ...     outputs = llm.generate(prompts, params)
        >>> print(session.summary(scope="A"))

        Scopes may lie in each other, and a name may come again: then all of its blocks are meant. Each call of
        ``LLM.generate``, ``chat``, ``embed`` and so on is a scope without being asked: ``"generate-0"``,
        ``"generate-1"``; ``"generate"`` means all of them. A step belongs to a scope if it ended inside of it.

        Args:
            name: what to call it.
            warmup: whether a summary leaves it out unless it is asked for. By default it does so if the name is
                ``"warm-up"`` or ``"warmup"``.

        Raises:
            KvhookError: the name is none.
        """
        return self._notebook.scope(check_name(name), warmup)

    @property
    def scopes(self) -> list[Scope]:
        """The scopes so far, in the order in which they began, see `kvhook.Trace.scopes`."""
        return self.trace().scopes

    def _write_events(self) -> None:
        if not self._closed:
            self._spool.write_events()

    def arm_core(self) -> None:
        """Record the engine cores that are made from now on, if they are to be recorded."""
        self._core_side.arm()

    def attach_core(self, engine: Any) -> None:
        """Record the engine core of an engine that exists already, if it is in this process."""
        adapter = hooks.adapter_of(engine)
        scheduler = read_path(engine, adapter.schedulers) if adapter is not None and adapter.schedulers else None
        if hasattr(scheduler, "kv_cache_manager"):
            self._core_side.attach(scheduler)

    def disarm_core(self) -> None:
        """Take kvhook out of the engine cores."""
        self._core_side.disarm()

    def why_no_steps(self) -> str:
        """What to tell a user who sees no steps."""
        # what may fail a hundred times keeps no step from being recorded
        others = [where for where in self._faults.first_errors if LIMITS.get(where, 1) == 1]
        known = self._why_not_recorded() or self._faults.first_of(others)
        return known or why_no_steps(self.unrecorded_engines, self._ring_dir, self.options.trace_path)

    def _why_not_recorded(self) -> str:
        """Why an engine that was made or used is not recorded; "" if there is none."""
        failed = self._faults.first_of(NEEDED)
        # where no name of vLLM is patched, no engine is seen being built, and none is missed
        return failed or ("" if self.by_logger else not_recorded())

    # ---- files -----------------------------------------------------------------------------------------------------

    def _next_files(self, number: int) -> Iterator[Path]:
        """The names of the file that the spool writes to next: of the trace and its successors, or of the history."""
        path = self.options.trace_path
        if path is not None:
            for attempt, name in enumerate(own_files.candidates(path, number, forked=self._inherited)):
                if attempt == 1:
                    log.warning("kvhook: %s is there already, of another process or run; recording into %s", path, name)
                tell_runs(name)
                yield name
            return
        if self._history_dir is None:
            pid = os.getpid()
            prefix = f"{HISTORY_PREFIX}{pid}-{process_start(pid)}-"
            prune_histories(history_root())
            self._history_dir = Path(tempfile.mkdtemp(prefix=prefix, dir=history_root()))
        yield self._history_dir / f"{number:06}{TRACE_SUFFIX}"


def _remove(folders: list[Path], generation: int) -> None:
    """Delete temporary files, unless they are a parent process's."""
    if generation == forks.generation:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
