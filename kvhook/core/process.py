"""The engine cores of this process: found when their scheduler is built, recorded according to the plan.

Two names of vLLM's are patched, ``Scheduler.__init__`` and ``EngineCore.shutdown``, and nothing that runs in a step.
The patches stay in a process that is forked off, where they do the same for its own engine cores.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import wrapt

from kvhook import forks
from kvhook.adapters.core import INIT, SHUTDOWN, read_core, too_old
from kvhook.adapters.processes import is_of_a_core
from kvhook.adapters.table import Target, lookup, vllm_version
from kvhook.core.ledger import STREAM as LEDGER
from kvhook.core.ledger import LedgerRing
from kvhook.core.plan import CorePlan
from kvhook.core.recorder import STREAM, CoreRecorder
from kvhook.discovery.cleaning import prune
from kvhook.facts import ANONYMOUS, class_of_vllm, without_names
from kvhook.faults import USERS, Faults, contained, described
from kvhook.recording.spool import Spool
from kvhook.ring.place import prepare_directory

log = logging.getLogger("kvhook")

#: Rings of ended cores that are kept: their traces hold all but the end.
MOST_RINGS = 4
#: Slots of a ledger's ring, of 30 events each: 4 MiB.
LEDGER_SLOTS = 4096
_NOT_RECORDED = "this engine core is not recorded"


class _Recorded(NamedTuple):
    """What is recorded of an engine core: its steps, or its ledger of blocks."""

    recorder: CoreRecorder | LedgerRing
    spool: Spool
    stream: str


class CoreProcess:
    """What this process has to do with engine cores."""

    def __init__(self) -> None:
        self.plan: CorePlan | None = None
        self.faults = Faults()
        #: why the engine cores of this process are not recorded, if they are not
        self.absent = ""
        #: number of an engine core -> its steps and, if that is wanted, its ledger of blocks
        self._recorded: dict[int, list[_Recorded]] = {}
        #: id of an EngineCore's scheduler -> number of its recorder
        self._numbers: dict[int, int] = {}
        self._next = 0
        #: the recording that the cores are of, and what of its cores that have ended was lost: see `lost`
        self._session, self._lost = "", dict[tuple[int, str], int]()
        self._patches: list[tuple[Any, str, Any, Any]] = []
        self._awaited: set[str] = set()

    # ---- patching --------------------------------------------------------------------------------------------------

    def arm(self, plan: CorePlan) -> None:
        """Record the engine cores that are made from now on in this process, and in those forked off from it."""
        self.plan, self.absent, self.faults = plan, "", Faults()
        self._session, self._lost = plan.session, {}
        if not self._recorded:
            self._next = 0
        for target in (INIT, SHUTDOWN):
            module = target.path.partition(":")[0]
            if module in sys.modules:
                self._patch(target)
            elif module not in self._awaited:
                self._awaited.add(module)
                wrapt.register_post_import_hook(self._on_import, module)

    def disarm(self) -> None:
        """Take kvhook out of the engine cores of this process, and of vLLM."""
        self.plan = None
        for number in list(self._recorded):
            try:
                self.end(number)
            except USERS:
                raise
            except BaseException as error:
                self.faults.fault("ending the recording of an engine core", error, "its trace may lack the end")
        for parent, name, original, wrapper in reversed(self._patches):
            if vars(parent).get(name) is wrapper:
                setattr(parent, name, original)
        self._patches.clear()

    def _on_import(self, module: Any) -> None:
        self._awaited.discard(module.__name__)
        if self.plan is not None:
            for target in (INIT, SHUTDOWN):
                if target.path.startswith(f"{module.__name__}:"):
                    self._patch(target)

    def _patch(self, target: Target) -> None:
        if why := too_old():
            self._give_up(f"vLLM {vllm_version()}: {why}")
            return
        wrappers = {INIT.role: self._on_scheduler_init, SHUTDOWN.role: self._on_shutdown}
        try:
            parent_path, _, name = target.path.rpartition(".")
            parent = lookup(parent_path)
            original = vars(parent)[name]
            if any(p[0] is parent and p[1] == name for p in self._patches):
                return
            wrapper = wrapt.FunctionWrapper(original, wrappers[target.role])
            setattr(parent, name, wrapper)
            self._patches.append((parent, name, original, wrapper))
        except (LookupError, AttributeError) as error:
            if target.required:
                self._give_up(f"vLLM {vllm_version()} is not one whose engine core this kvhook knows: {error}")

    def _on_scheduler_init(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        if self.plan is not None:
            self.attach(instance, self.plan)
        return result

    def attach(self, scheduler: Any, plan: CorePlan) -> None:
        """Record an engine core whose scheduler has been built, unless it is recorded already. Nothing is raised."""
        try:
            if id(scheduler) not in self._numbers and plan.is_meant_for_this_process():
                self.begin(scheduler, plan)
        except LookupError as error:
            self._give_up(f"vLLM {vllm_version()}: {error}")
        except USERS:
            raise
        except BaseException as error:
            self.faults.fault("starting to record an engine core", error, _NOT_RECORDED)
            self.absent = self.absent or described(error)

    def _on_shutdown(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        # before vLLM's own: that waits for the workers, and the front end kills a core that takes too long
        try:
            number = self._numbers.get(id(getattr(instance, "scheduler", None)))
            if number is not None:
                self.end(number)
        except USERS:
            raise
        except BaseException as error:
            self.faults.fault("ending the recording of an engine core", error, "its trace may lack the end")
        return wrapped(*args, **kwargs)

    def _give_up(self, why: str) -> None:
        if why != self.absent:
            log.warning("kvhook: %s: %s", _NOT_RECORDED, why)
        self.absent = why

    # ---- engine cores ----------------------------------------------------------------------------------------------

    def begin(self, scheduler: Any, plan: CorePlan) -> None:
        """Record an engine core from now on.

        Raises:
            LookupError: it is of a vLLM that this kvhook does not know.
            OSError: there is no place for the ring or the trace.
        """
        core = read_core(scheduler)
        directory, number = Path(plan.ring_dir), self._next
        with contextlib.suppress(Exception):
            prune(directory, MOST_RINGS, streams=("core", "blocks"))
        facts = {"session": plan.session, "key": plan.key, "hash_ids": plan.hash_ids, "parent": plan.pid}
        # of a forked child's engine the core may be in the child itself
        own = plan.pid != os.getpid() and is_of_a_core(sys._getframe())  # noqa: SLF001 (there is no public way)
        facts |= {"own_process": own, "core_level": plan.level, **({ANONYMOUS: True} if plan.anonymous else {})}
        connector = getattr(scheduler, "connector", None)
        if plan.anonymous and connector is not None:
            facts["connector"] = class_of_vllm(type(connector))
        recorder = CoreRecorder(number, core, directory, plan.ring_slots, facts)
        recorded: list[_Recorded] = []
        try:
            pid = os.getpid()
            prepare_directory(Path(plan.stem).parent, strict=plan.temporary)
            spool = Spool(plan.names(pid, number), plan.limit, self._fault)
            spool.add(recorder)
            recorded.append(_Recorded(recorder, spool, STREAM))
            failed = functools.partial(self._failed, number)
            _ = plan.is_over  # opens its mark, which somebody may remove
            recorder.follow(core, failed, self._open_ledger(recorder, plan, recorded), lambda: plan.is_over)
        except Exception:
            recorder.close()
            for one in recorded:
                one.spool.close()
                one.recorder.close()
            raise
        if multiprocessing.parent_process() is not None and not self._next:
            multiprocessing.util.Finalize(self, self.disarm, exitpriority=10)  # such a process does not run `atexit`
        self._next += 1
        self._recorded[number] = recorded
        self._numbers[id(scheduler)] = number
        weakref.finalize(scheduler, self._gone, id(scheduler), number).atexit = False

    def _open_ledger(self, recorder: CoreRecorder, plan: CorePlan, recorded: list[_Recorded]) -> LedgerRing | None:
        """The ring and the trace of the ledger of blocks, if one is wanted; it goes to what is recorded."""
        if plan.level != "blocks":
            return None
        number, pid = recorder.number, os.getpid()
        facts = {"serial": recorder.serial, "session": plan.session}
        facts |= {ANONYMOUS: True} if plan.anonymous else {}
        ledger = LedgerRing(number, Path(plan.ring_dir), LEDGER_SLOTS, facts)
        spool = Spool(plan.names(pid, number, LEDGER), plan.limit, self._fault)
        spool.add(ledger)
        recorded.append(_Recorded(ledger, spool, LEDGER))
        return ledger

    def _fault(self, where: str, error: BaseException, then: str) -> None:
        """Something failed, unless the session is over: it has taken its temporary files with it."""
        if self.plan is None or not self.plan.is_over:
            self.faults.fault(where, error, then)

    def _failed(self, number: int, error: BaseException) -> None:
        self.faults.fault("counting inside the engine core", error, "this engine core is not recorded any further")
        for recorder, spool, _ in self._recorded.get(number, [])[:1]:
            recorder.meta |= without_names(recorder.meta | {"failed": described(error)})
            spool.write_meta_again(number)

    def end(self, number: int) -> None:
        """Stop recording an engine core, and complete its trace."""
        recorded = self._recorded.pop(number, [])
        self._numbers = {scheduler: n for scheduler, n in self._numbers.items() if n != number}
        for recorder, _, _ in recorded:
            if isinstance(recorder, CoreRecorder):
                with contained(self._not_ended):
                    recorder.stop()
        for recorder, spool, stream in recorded:
            spool.close()
            recorder.close()
            self._lost |= _lost_of(spool, stream)
            if not spool.unwritten[number]:
                with contextlib.suppress(OSError):
                    recorder.ring.path.unlink()  # everything is in the trace

    def _not_ended(self, error: BaseException) -> None:
        self.faults.fault("ending the recording of an engine core", error, "its trace may lack the end")

    def _gone(self, scheduler_id: int, number: int) -> None:
        """The scheduler was deleted. Finalizers call it, so it must not wait."""
        if self._numbers.pop(scheduler_id, None) != number:
            return  # it was not recorded any more
        recorded = self._recorded.get(number, [])
        for one in recorded:
            one.spool.leave(number, functools.partial(self._left, number, recorded))

    def _left(self, number: int, recorded: list[_Recorded]) -> None:
        """A trace of an engine core that is gone is complete: the thread that completed it calls this."""
        if all(one.spool.is_closed for one in recorded) and self._recorded.get(number) is recorded:
            self.end(number)

    def lost(self, session: str) -> dict[tuple[int, str], int]:
        """How many records of each engine core of this process could not be copied or written so far: number and
        stream of a core -> records. Also of those that have ended.

        Args:
            session: the recording that is asked about; empty if this process's cores are of another one.
        """
        if session != self._session:
            return {}
        found = dict[tuple[int, str], int]()
        for recorded in list(self._recorded.values()):
            for one in recorded:
                found |= _lost_of(one.spool, one.stream)
        return self._lost | found

    def drain(self) -> None:
        """Bring the traces of this process up to now."""
        for recorded in list(self._recorded.values()):
            for one in recorded:
                one.spool.drain()

    def in_child(self) -> None:
        """After a fork the engine cores are the parent's; those that this process makes are its own."""
        self._recorded.clear()
        self._numbers.clear()
        self._lost = {}
        self._next = 0


def _lost_of(spool: Spool, stream: str) -> dict[tuple[int, str], int]:
    return {
        (number, stream): counts["records_overrun"] + counts["records_unwritten"]
        for number, counts in spool.counts().items()
    }


#: The one of this process.
process = CoreProcess()

forks.call_in_child(process.in_child)
