"""The state of the hooks: which session is informed about engines, which engines are recorded, and what is patched.

All state of `kvhook.hooks` is in one object, `registry`. The other modules of this package hold functions only.

Two of its dictionaries are read while an engine works, and stay plain dictionaries for that reason: `Registry.steps`
in every step, and `Registry.records` each time stats pass. They are never replaced by new ones, only changed, so that
other modules may keep a reference to them.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from kvhook import forks
from kvhook.adapters.calls import Call
from kvhook.adapters.engine_events import Told
from kvhook.adapters.step_functions import PublishStep, Record, StepFunctions
from kvhook.adapters.table import Adapter, Target
from kvhook.faults import USERS, pass_on
from kvhook.hooks.own_step import OutputCounts
from kvhook.hooks.quiet import do_nothing
from kvhook.hooks.reach import is_of, reaches

log = logging.getLogger("kvhook")

#: In the place of the id of an engine that is not recorded any more.
GONE = -1

#: What happens when recording an engine has failed.
NOT_RECORDED_FURTHER = "this engine is not recorded any further"


class Owner(Protocol):
    """Who is informed about engines: the session."""

    def open_engine(self, engine: Any, adapter: Adapter, facts: dict[str, Any]) -> StepFunctions | None:
        """A new engine was built. Returns the functions that record it, or None if it is not to be recorded."""

    def count_outputs(self, engine: Any, exact: bool, stepped: bool) -> StepFunctions | None:
        """Nobody makes iteration stats of this engine's steps: outputs are to be counted from now on.

        Args:
            engine: an engine that is recorded.
            exact: whether the outputs that came so far can still be counted.
            stepped: whether vLLM's own step has run, and made none.

        Returns:
            The functions that record it now, or None if its outputs cannot be counted.
        """

    def not_counted(self, engine: Any) -> None:
        """Outputs of an engine were recorded whose tokens nobody counted."""

    def label_request(self, engine: Any, request_id: Any, lora_name: str) -> tuple[int, int]:
        """A request was added. Returns the codes of its label and of its LoRA adapter, -1 where it has none."""

    def begin_call(self, engine: Any, call: Call) -> Callable[[], None]:
        """A method of ``LLM`` is about to be called. Returns what is to be called when it has returned or raised."""

    def begin_engine_event(self, engine: Any, told: Told) -> Callable[[str], None]:
        """A call that changes an engine is about to be made. Returns what is to be called with its outcome."""

    def close_engine(self, engine_id: int) -> None:
        """The engine is gone. Called from finalizers, so it must not wait for a lock."""

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Something in kvhook failed."""

    def is_off(self, where: str) -> bool:
        """Whether a seam has failed so often that it is switched off, see `kvhook.faults.LIMITS`."""


class Patch(NamedTuple):
    """A name that was replaced: ``vars(parent)[attribute]`` was `original`, or it was inherited. ``stop`` makes the
    wrapper do nothing any more, for the case that somebody else holds on to it. ``make`` makes another, and its
    ``stop``."""

    parent: Any
    attribute: str
    original: Any
    wrapper: Any
    inherited: bool
    stop: Callable[[], None] = do_nothing
    make: Callable[[Any], tuple[Any, Callable[[], None]]] | None = None


class PatchedAdapter(NamedTuple):
    """An adapter whose targets are patched: the class of its engines, and the targets that were found."""

    adapter: Adapter
    engine: type
    targets: tuple[Target, ...]


class Building(NamedTuple):
    """An engine whose ``__init__`` is running.

    ``stats_off``: its user left vLLM's stats off. ``on_event_loop``: it is an AsyncLLM, which turns stats on by itself
    if it finds stat loggers.
    """

    stats_off: bool
    on_event_loop: bool


@dataclass(slots=True)
class RecordedEngine:
    """One engine that is being recorded.

    Attributes:
        remove_tap: takes out what was put into the engine.
        stats_off: its user left vLLM's stats off, so its ``get_metrics()`` goes on refusing.
        flush: publishes what waits for the engine's next step.
        thread: the thread that began to record it, or last added a request; only from there, and when the engine is
            gone, is it flushed.
        functions: the functions that record it; None on an event loop, where each rank has its own.
        counts: counts its outputs, in case nobody else does.
        record_keys: where `Registry.records` has its `record`.
        adapter: the tables by which it is recorded now.
        client, processor: its engine core's client and its output processor when it was tapped; None for V0.
        end: is called once it is not recorded any more: leaves its stats as the user wanted them.
        engine: the engine itself.
    """

    remove_tap: Callable[[], None]
    stats_off: bool = False
    flush: Callable[[], bool] = lambda: False
    thread: int = 0
    functions: StepFunctions | None = None
    counts: OutputCounts | None = None
    record_keys: tuple[int, ...] = ()
    adapter: Adapter | None = None
    client: Any = None
    processor: Any = None
    end: Callable[[], None] = do_nothing
    engine: Callable[[], Any] = do_nothing


@dataclass(slots=True)
class Registry:
    """The state of the hooks in this process.

    Attributes:
        steps: id(engine) -> publish, read in every step. An engine that is not in it is not recorded.
        records: id of the object that the stats pass (a stat logger manager, a logger, V0's engine) -> record.
        engines: id(engine) -> what is known of it, for every engine that is recorded.
        owner: the session; None while kvhook is not installed.
        level: how much the owner wants to be recorded, a key of `kvhook.adapters.BY_LEVEL`.
        patches: the names that were replaced, in the order in which that was done.
        patched: name of an adapter -> the adapter and its targets.
        imports_awaited: modules for which an import hook is registered.
        imported: modules of adapters whose import has ended.
        warned: the warnings that were given in this session.
        unknown: where engines were made that are none of vLLM's own.
        before: id() of engines that existed before kvhook was installed -> themselves.
        failed: id() of engines whose ``__init__`` raised an error of vLLM's own.
        parts: id() of a part of an engine that was recorded -> the part, and the engine's id while it is recorded. See
            `kvhook.hooks.twins`.
        inherited: what `engines` was in the process from which this one was forked. Nothing is tapped in these.
        left: id() of engines that are not recorded -> themselves. Their steps are let pass without another look.
        engines_seen: engines that have been recorded in this session.
        requests_seen: requests that were added to them.
    """

    steps: dict[int, PublishStep] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    engines: dict[int, RecordedEngine] = field(default_factory=dict)
    owner: Owner | None = None
    level: str = "full"
    patches: list[Patch] = field(default_factory=list)
    patched: dict[str, PatchedAdapter] = field(default_factory=dict)
    imports_awaited: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    before: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    parts: dict[int, tuple[weakref.ref[Any], int]] = field(default_factory=dict)
    inherited: dict[int, RecordedEngine] = field(default_factory=dict)
    left: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    engines_seen: int = 0
    requests_seen: int = 0

    def adapter_of(self, engine: Any) -> Adapter | None:
        """The adapter whose targets are patched for an engine's class; None if there is none."""
        return next((p.adapter for p in self.patched.values() if isinstance(engine, p.engine)), None)

    def stats_off(self, engine: Any) -> bool:
        """Whether a recorded engine's user left vLLM's stats off."""
        known = self.engines.get(id(engine))
        return known is not None and known.stats_off

    def leave(self, engine: Any) -> None:
        """Let the steps of an engine pass that is not recorded, without another look."""
        note_alive(self.left, engine)

    def remove(self, engine_id: int) -> None:
        """Stop recording an engine, and take out of it what was put into it."""
        self.steps.pop(engine_id, None)
        for part, (alive, whose) in list(self.parts.items()):
            if whose == engine_id:
                self.parts[part] = alive, GONE
        known = self.engines.pop(engine_id, None)
        if known is not None:
            self._take_out(known)
            self._flush(known)
        self.disown(engine_id)

    def disown(self, engine_id: int) -> None:
        """Forget an engine that was recorded in the process from which this one was forked."""
        known = self.inherited.pop(engine_id, None)
        if known is not None:
            self._take_out(known)

    def give_up(self, known: RecordedEngine, engine_id: int, where: str, error: BaseException) -> None:
        """Recording an engine has failed at a seam: it is not recorded any further, and nothing of kvhook's is called
        in it again. The engine goes on."""
        pass_on(error)
        if self.engines.get(engine_id) is known:  # if not, its id may be another engine's by now
            self.steps.pop(engine_id, None)
            known.flush = lambda: False
            self._take_out(known)
        self.fault(where, error, NOT_RECORDED_FURTHER)

    def _take_out(self, known: RecordedEngine) -> None:
        """Take out of an engine what was put into it, once."""
        remove, known.remove_tap = known.remove_tap, do_nothing
        known.client = known.processor = None  # what is left of kvhook's parts must not keep an engine core alive
        for key in known.record_keys:
            self.records.pop(key, None)
        end, known.end = known.end, do_nothing
        try:
            remove()
            end()
        except USERS:
            raise
        except BaseException as error:
            self.fault("taking kvhook out of an engine", error, "what is left there does nothing")

    def put_again(self) -> None:
        """Patch again where somebody has put back what was there before our wrapper: whoever takes out a wrapper that
        is below ours often takes ours out with it. The old one does nothing from then on, wherever it is."""
        for at, patch in enumerate(self.patches):
            now = vars(patch.parent).get(patch.attribute)
            if patch.make is None or now is patch.wrapper:
                continue
            if now is not None and (reaches(now, patch.wrapper) or not is_of(now, patch.original)):
                continue  # somebody's wrapper over ours; or a step of somebody's own, which is recorded otherwise
            patch.stop()
            below = getattr(patch.parent, patch.attribute, patch.original) if now is None else now
            wrapper, stop = patch.make(below)
            setattr(patch.parent, patch.attribute, wrapper)
            self.patches[at] = Patch(patch.parent, patch.attribute, below, wrapper, now is None, stop, patch.make)
            self.warn_once(
                "kvhook: somebody has put back %s as it was before kvhook.install(), and has taken kvhook's wrapper out"
                " with theirs. kvhook has put a new one there",
                f"{getattr(patch.parent, '__name__', 'vLLM')}.{patch.attribute}",
            )

    def flush(self) -> None:
        """Publish what waits for the next step of an engine, of those that this thread runs.

        What an engine that another thread runs has waiting comes with its next step: a ring has one writer.
        """
        here = threading.get_ident()
        for known in list(self.engines.values()):
            if known.thread == here:
                self._flush(known)

    def _flush(self, known: RecordedEngine) -> None:
        flush = known.flush
        try:
            flush()
        except USERS:
            raise
        except BaseException as error:
            known.flush = lambda: False
            self.fault("publishing what came after the last step", error, "it is lost")

    def begin(self, owner: Owner, level: str) -> None:
        """A session begins; nothing has been seen in it."""
        self.owner, self.level = owner, level
        self.warned.clear()
        self.unknown.clear()
        self.failed.clear()
        self.left.clear()
        self.parts.clear()
        self.engines_seen = self.requests_seen = 0

    def clear(self) -> None:
        """Forget all engines, without touching them."""
        self.steps.clear()
        self.records.clear()
        self.engines.clear()

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Report an error of kvhook's to the owner, if there is one."""
        if self.owner is not None:
            self.owner.fault(where, error, then)

    def is_off(self, where: str) -> bool:
        """Whether a seam is switched off."""
        return self.owner is not None and self.owner.is_off(where)

    def warn_once(self, text: str, *values: str) -> None:
        """Log a warning, once in a session."""
        if text % values not in self.warned:
            self.warned.add(text % values)
            log.warning(text, *values)


def note_alive(among: dict[int, weakref.ref[Any]], engine: Any) -> None:
    """Note an engine by its id, until it is deleted: another one may get its id then."""
    key = id(engine)
    among[key] = weakref.ref(engine, lambda _: among.pop(key, None))


#: The one registry of this process.
registry = Registry()

#: The engine that is being built in this thread or task; None if there is none.
building: contextvars.ContextVar[Building | None] = contextvars.ContextVar("kvhook_building", default=None)


def _in_child() -> None:
    """After a fork the child has copies of the parent's engines. What is in them publishes into the parent's ring,
    which has one writer, so it is taken out. If the child steps such an engine, it is recorded anew, see
    `kvhook.hooks.unseen`.

    The patches stay, and so does the owner: engines that the child makes are recorded into files of its own.
    """
    registry.inherited.update(registry.engines)
    registry.clear()
    for known in registry.inherited.values():
        remove, known.remove_tap = known.remove_tap, do_nothing
        try:
            remove()
        except BaseException as error:
            registry.fault("taking the parent's kvhook out of an engine", error, "what is left there does nothing")
    registry.unknown.clear()
    registry.engines_seen = registry.requests_seen = 0


forks.call_in_child(_in_child)
