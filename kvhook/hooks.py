"""Where vLLM is patched: what is done at each target, all or nothing, and undone.

The adapters' tables say *where* (`kvhook.adapters`), this file says *what*. It never imports vLLM: it waits for the
import with wrapt's post-import hooks, or patches at once what is loaded already.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import wrapt

from kvhook.adapters import BY_LEVEL, NEWEST
from kvhook.adapters.compiler import FINISHED_HOOK, PublishStep, Record
from kvhook.adapters.fit import choose, is_there
from kvhook.adapters.settings import Settings
from kvhook.adapters.table import Adapter, Target, lookup, release, vllm_version
from kvhook.errors import StatsOffError
from kvhook.taps import TAPS, Tap, core_of, make_no_stats, nothing, quiet_manager

log = logging.getLogger("kvhook")

clock = time.monotonic_ns


class Owner(Protocol):
    """Who is told about engines: the session."""

    def open_engine(self, engine: Any, adapter: Adapter, facts: dict[str, Any]) -> tuple[Record, PublishStep] | None:
        """A new engine; gives the functions that record it, or None if it is not to be recorded."""

    def close_engine(self, engine_id: int) -> None:
        """The engine is gone."""

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Something in kvhook failed."""


class Patch(NamedTuple):
    """A name that was replaced: ``vars(parent)[attribute]`` was `original`, or inherited."""

    parent: Any
    attribute: str
    original: Any
    wrapper: Any
    inherited: bool


class Building(NamedTuple):
    """The engine that is being built at this moment: whether its user had left stats off, and whether it is one of
    those on an event loop, which vLLM gives stats if it finds loggers for it."""

    quiet: bool
    on_event_loop: bool


class Patched(NamedTuple):
    """An adapter that is in place: the class of its engines, and the targets that were found."""

    adapter: Adapter
    engine: type
    targets: tuple[Target, ...]


#: id(engine) -> publish. Looked up in every step; what is not in it is none of our business.
_steps: dict[int, PublishStep] = {}
#: id of what the stats pass (a stat logger manager, a logger, V0's engine) -> record.
_records: dict[int, Record] = {}
#: id(engine) -> takes out what was put into the engine itself. All engines that are recorded are in it.
_engines: dict[int, Callable[[], None]] = {}
#: engines whose user had left stats off: their get_metrics() goes on refusing
_quiet: set[int] = set()
_patches: list[Patch] = []
_owner: Owner | None = None
#: how much the owner wants to be recorded
_level = "full"
_waiting_for: set[str] = set()
#: modules that are waited for and have been imported, to the end
_imported: set[str] = set()
_patched: dict[str, Patched] = {}
#: what has been said already
_said: set[str] = set()
#: how often this process was forked off since vLLM was patched: what was made before a fork is not the child's
_forks = 0
_NOT_ANY_FURTHER = "this engine is not recorded any further"
_building: contextvars.ContextVar[Building | None] = contextvars.ContextVar("kvhook_building", default=None)


# ---- the step path -------------------------------------------------------------------------------------------------


def on_step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``LLMEngine.step``: take the two clocks, and publish what came in between."""
    publish = _steps.get(id(instance))
    if publish is None:
        return wrapped(*args, **kwargs)
    start = clock()
    try:
        return wrapped(*args, **kwargs)
    finally:
        try:
            publish(start, clock())
        except BaseException as error:
            _failed("recording a step", error, _steps, id(instance))
            if not isinstance(error, Exception):
                raise  # Ctrl-C belongs to the user


def on_record(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around vLLM's ``record``, where its own loggers are on: look at the stats as they pass."""
    record = _records.get(id(instance))
    if record is not None:
        try:
            record(*args, **kwargs)
        except Exception as error:
            _failed("taking over the stats of a step", error, _records, id(instance))
    return wrapped(*args, **kwargs)


def on_stats(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around V0's ``LLMEngine._get_stats``: take what it made. Without a schedule it was not made for a step."""
    stats = wrapped(*args, **kwargs)
    record = _records.get(id(instance))
    if record is not None and (args[0] if args else kwargs.get("scheduler_outputs")) is not None:
        try:
            record(stats)
        except Exception as error:
            _failed("taking over the stats of a step", error, _records, id(instance))
    return stats


def on_finished(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``IterationStats.update_from_finished_request``: leave the request's TTFT on the finished request.

    vLLM knows it (RequestStateStats.first_token_latency) and does not pass it on.
    """
    result = wrapped(*args, **kwargs)
    if _engines:
        try:
            state = kwargs.get("req_stats")
            if state is None:
                state = next(a for a in args if hasattr(a, "first_token_latency"))
            instance.finished_requests[-1].kvhook_ttft = state.first_token_latency
        except Exception as error:
            _fault("reading a request's time to first token", error, "it is NaN for this request")
    return result


# ---- building an engine --------------------------------------------------------------------------------------------


def on_engine_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around an engine's ``__init__``: turn the stats on if the user left them off, and then record the engine."""
    owner, adapter = _owner, adapter_of(instance)
    if owner is None or adapter is None:
        return wrapped(*args, **kwargs)
    stats_were_on = True
    try:
        signature = inspect.signature(wrapped)
        arguments = signature.bind(*args, **kwargs)
        stats_were_on = bool(arguments.arguments["log_stats"])
        if adapter.level == "full":
            arguments.arguments["log_stats"] = True
        if not stats_were_on:
            arguments.arguments |= {n: make() for n, make in adapter.quiet.items() if n in signature.parameters}
        args, kwargs = arguments.args, arguments.kwargs
    except Exception as error:
        owner.fault("turning vLLM's stats on", error, "this engine is recorded only if its stats are on anyway")
    token = _building.set(Building(not stats_were_on, on_event_loop=not adapter.timed))
    try:
        result = wrapped(*args, **kwargs)
    finally:
        _building.reset(token)
    try:
        watch(instance, stats_were_on=stats_were_on, built_by_us=True)
    except Exception as error:
        owner.fault("starting to record an engine", error, "this engine is not recorded")
        if not stats_were_on and adapter.timed and adapter.tap == "manager":
            make_no_stats(instance, "")
    return result


def on_manager(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of vLLM's stat logger (manager) in the engine's module: none but kvhook's where stats were off.

    vLLM's own always makes a Prometheus logger (38-490 us a step), whose making also wipes the numbers of every
    engine before; and the logging one. Nobody asked for them here.
    """
    building = _building.get()
    if building is None or not building.quiet:
        return wrapped(*args, **kwargs)
    if building.on_event_loop and kwargs.get("custom_stat_loggers") and "enable_default_loggers" in kwargs:
        # with loggers of the user's own, vLLM would have turned stats on by itself, for them alone
        return wrapped(*args, **{**kwargs, "enable_default_loggers": False})
    try:
        return quiet_manager(wrapped)
    except Exception as error:  # somebody has put something else in the place of vLLM's class
        _fault("keeping vLLM's own loggers away", error, "they are made, although stats were left off")
    return wrapped(*args, **kwargs)


def on_core(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``EngineCoreClient.make_client``, where the core alone is to make stats: at level light, and in vLLM 0.8,
    whose LLMEngine turns its core's stats off whatever the user says."""
    owner = _owner
    if owner is not None and _building.get() is not None:
        try:
            arguments = inspect.signature(wrapped).bind(*args, **kwargs)
            arguments.arguments["log_stats"] = True
            args, kwargs = arguments.args, arguments.kwargs
        except Exception as error:
            owner.fault(
                "turning the engine core's stats on", error, "this engine is recorded only if they are on anyway"
            )
    return wrapped(*args, **kwargs)


def on_get_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``LLMEngine.get_metrics``: with the user's stats off it fails as it does without kvhook."""
    if id(instance) in _quiet:
        raise AssertionError(
            "Stat logging disabled: vLLM's metrics are off in this engine, as they are by default. kvhook has this "
            "run's numbers (session.summary()); for vLLM's own as well, pass disable_log_stats=False to LLM(...)"
        )
    return wrapped(*args, **kwargs)


def adapter_of(engine: Any) -> Adapter | None:
    """The adapter that is in place for an engine; None if there is none."""
    return next((p.adapter for p in _patched.values() if isinstance(engine, p.engine)), None)


def watch(engine: Any, *, stats_were_on: bool, built_by_us: bool = False) -> bool:
    """Record an engine that has been built. False if it is recorded already or the session does not want it.

    Raises:
        StatsOffError: it makes no stats, and was not built under kvhook's eyes.
    """
    owner, adapter = _owner, adapter_of(engine)
    if owner is None or adapter is None or id(engine) in _engines:
        return False
    if adapter.must_be_built and not built_by_us:
        raise StatsOffError(
            f"this vLLM ({vllm_version()}) makes no stats behind LLM, whatever disable_log_stats says, unless kvhook "
            "is there when the engine is built: call kvhook.install() before LLM(...)"
        )
    _read_settings()
    key = id(engine)
    hooked = {t.role for t in _patched[adapter.name].targets}
    facts: dict[str, Any] = {"stats_on": stats_were_on, FINISHED_HOOK: "finished" in hooked}
    if adapter.timed and not hasattr(engine, "step_async"):
        functions = owner.open_engine(engine, adapter, facts)
        if functions is None:
            return False
        record, publish = functions
        _steps[key] = publish
    else:
        record = _on_event_loop(engine, adapter, facts | {"timed_steps": False})
    _engines[key] = nothing
    try:
        _engines[key] = _tap(engine, adapter, record)
        if not stats_were_on and adapter.level == "full":
            _quiet.add(key)
            if adapter.timed and adapter.tap == "manager":
                _engines[key] = _and_turn_stats_off(_engines[key], engine)
    except Exception:
        _forget(key)
        raise
    weakref.finalize(engine, _forget, key).atexit = False
    return True


def step_down(engine: Any, every: int, functions_of: Callable[[Adapter], tuple[Record, PublishStep]]) -> bool:
    """Record an engine at level light from its next step on. It is called at the end of a step, by the engine's thread.

    Args:
        every: in every how-many-th step outputs are counted.
        functions_of: gives the functions that record at that level.

    Returns:
        Whether that can be done with this engine.

    Raises:
        LookupError: vLLM's classes are not where the adapter says; nothing has been changed.
    """
    key, full = id(engine), adapter_of(engine)
    if full is None or key not in _engines:
        return False
    adapter, _, missing = choose(full.engine, "light")
    if missing or adapter.level != "light":
        return False
    core_of(engine)  # before anything is changed
    record, publish = functions_of(adapter)
    _engines[key]()
    if key in _quiet:
        make_no_stats(engine, full.holder)
    _engines[key] = _tap(engine, adapter, record, every)
    _steps[key] = publish
    return True


def _and_turn_stats_off(take_out: Callable[[], None], engine: Any) -> Callable[[], None]:
    """Leave the engine as its user wanted it: without stats. Not for engines on an event loop, whose handler keeps on
    making them whatever is said later, and needs the clocks of new requests for it."""
    alive = weakref.ref(engine)

    def undo() -> None:
        take_out()
        engine = alive()
        if engine is not None:
            make_no_stats(engine, "")

    return undo


def _tap(engine: Any, adapter: Adapter, record: Record, every: int = 1) -> Callable[[], None]:
    key = id(engine)

    def failed(error: Exception) -> None:
        _steps.pop(key, None)
        if key in _engines:  # else it has been let go of: its number may be another engine's by now
            undo, _engines[key] = _engines[key], nothing
            undo()
        _fault("counting what a step gave", error, _NOT_ANY_FURTHER)

    return TAPS[adapter.tap](Tap(engine, adapter, record, _records, failed, every))


def _on_event_loop(engine: Any, adapter: Adapter, facts: dict[str, Any]) -> Record:
    """`record` for an engine without a ``step``: each call is a record by itself, in a ring of its rank."""
    alive = weakref.ref(engine)  # what hangs on the engine must not keep it alive

    def open_rank(rank: int) -> tuple[Record, PublishStep] | None:
        engine, owner = alive(), _owner
        if engine is None or owner is None:
            return None
        return owner.open_engine(engine, adapter, facts | {"engine_index": rank})

    return publish_on_record(open_rank, _fault)


def publish_on_record(
    open_rank: Callable[[int], tuple[Record, PublishStep] | None], fault: Callable[[str, BaseException, str], None]
) -> Record:
    """A `record` that publishes at once: there is no step whose end could be waited for, nor a start to be taken.

    Args:
        open_rank: gives the functions of an engine core, when its first stats come.
        fault: is told of errors; none gets out.
    """
    ranks: dict[int, tuple[Record, PublishStep] | None] = {}
    process = _forks

    def record(*args: Any, engine_idx: int | None = None, **kwargs: Any) -> None:
        if process != _forks:
            return
        rank = engine_idx or 0
        try:
            if rank not in ranks:
                ranks[rank] = None  # if it fails it is not tried again
                ranks[rank] = open_rank(rank)
            functions = ranks[rank]
            if functions is not None:
                functions[0](*args, engine_idx=rank, **kwargs)
                now = clock()
                functions[1](now, now)
        except Exception as error:
            ranks[rank] = None
            fault("recording a step", error, _NOT_ANY_FURTHER)

    return record


def _forget(engine_id: int) -> None:
    """An engine was deleted, or could not be recorded."""
    _steps.pop(engine_id, None)
    _quiet.discard(engine_id)
    undo = _engines.pop(engine_id, None)
    if undo is not None:
        undo()
    if _owner is not None:
        _owner.close_engine(engine_id)


def _failed(what: str, error: BaseException, table: dict[int, Any], key: int) -> None:
    """A hook failed: report it, and if the fault is kvhook's, never call it again for this engine."""
    if isinstance(error, Exception):
        table.pop(key, None)
    _fault(what, error, _NOT_ANY_FURTHER)


def _fault(where: str, error: BaseException, then: str) -> None:
    if _owner is not None:
        _owner.fault(where, error, then)


# ---- patching and unpatching ---------------------------------------------------------------------------------------

#: Role of a target -> what is put there.
ROLES: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "engine_init": on_engine_init,
    "engine_step": on_step,
    "manager": on_manager,
    "core": on_core,
    "record": on_record,
    "stats": on_stats,
    "finished": on_finished,
    "get_metrics": on_get_metrics,
}


def _read_settings() -> None:
    for patch in _patches:
        if isinstance(patch.wrapper, Settings):
            patch.wrapper.read()


def arm(owner: Owner, level: str = "full") -> None:
    """Patch vLLM for this owner: at once if it is imported, else as soon as it is. Never imports it.

    Args:
        level: how much is to be recorded, a key of `kvhook.adapters.BY_LEVEL`.
    """
    global _owner, _level
    _owner, _level = owner, level
    _said.clear()
    for trigger in dict.fromkeys(a.trigger for a in BY_LEVEL[level]):
        if trigger in sys.modules:
            _imported.add(trigger)
        elif trigger not in _waiting_for:
            # cannot be taken back, so it is registered once and asks then whether anybody still wants it
            _waiting_for.add(trigger)
            wrapt.register_post_import_hook(_on_import, trigger)
    _patch_what_is_there()


def is_recorded(engine: Any) -> bool:
    """Whether an engine is being recorded."""
    return id(engine) in _engines


def armed() -> bool:
    """Whether a session is told of new engines."""
    return _owner is not None


def disarm() -> None:
    """Put back what was there. A name that somebody else has wrapped meanwhile keeps our wrapper below theirs, where
    it does nothing any more."""
    global _owner
    _owner = None
    for engine_id in list(_engines):
        _forget(engine_id)
    _steps.clear()
    _records.clear()
    _quiet.clear()
    _unpatch()


def _unpatch() -> None:
    _patches[:] = [p for p in reversed(_patches) if not _restore(p)][::-1]
    _patched.clear()


def being_built() -> bool:
    """Whether an engine is just being built that will be recorded."""
    return _building.get() is not None


def patched() -> dict[str, dict[str, Target]]:
    """Adapter -> the targets that are patched at this moment, by role."""
    return {name: {t.role: t for t in p.targets if t.role} for name, p in _patched.items()}


def _on_import(module: Any) -> None:
    """A module that was waited for has been imported."""
    _waiting_for.discard(module.__name__)
    _imported.add(module.__name__)
    _patch_what_is_there()


def _patch_what_is_there() -> None:
    """Patch the engines of the vLLM that is loaded, if a session is there; of each family all or none."""
    owner = _owner
    if owner is None:
        return
    try:
        adapters = BY_LEVEL[_level]
        for family in dict.fromkeys(a.family for a in adapters):
            _patch_family([a for a in adapters if a.family == family and a.trigger in _imported and is_there(a)])
    except Exception as error:
        owner.fault("patching vLLM", error, "nothing is recorded")


def _patch_family(adapters: list[Adapter]) -> None:
    """Patch one engine class after the other with the first adapter that fits; nothing if one of them has none."""
    chosen = [choose(engine, _level) for engine in dict.fromkeys(a.engine for a in adapters)]
    complaints = [text for _, _, missing in chosen for text in missing]
    if complaints:
        _say(
            "kvhook: nothing is patched and nothing recorded: vLLM %s is not one this kvhook knows (%s). "
            "A newer kvhook may know it: pip install -U kvhook",
            vllm_version() or "(unknown version)",
            "; ".join(dict.fromkeys(complaints)),
        )
        return
    for adapter, found, _ in chosen:
        if adapter.name not in _patched:
            _apply(adapter, found)


def _say(text: str, *values: str) -> None:
    """A warning, once in a session."""
    if text % values not in _said:
        _said.add(text % values)
        log.warning(text, *values)


def _apply(adapter: Adapter, found: tuple[Target, ...]) -> None:
    """Patch every target, or none. What is patched already, for another engine or from before (below somebody else's
    wrapper), stays."""
    new: list[Patch] = []
    engine = lookup(adapter.engine)
    try:
        for target in found:
            module, _, name = target.path.partition(":")
            parent, attribute, original = wrapt.resolve_path(sys.modules[module], name)
            if not target.role or any(p.parent is parent and p.attribute == attribute for p in _patches):
                continue
            wrapper: Any = Settings(original)
            if target.role != "settings":
                wrapper = wrapt.FunctionWrapper(original, ROLES[target.role])
            inherited = attribute not in vars(parent)
            setattr(parent, attribute, wrapper)
            new.append(Patch(parent, attribute, original, wrapper, inherited))
    except Exception:
        for patch in reversed(new):
            _restore(patch)
        raise
    _patches.extend(new)
    _patched[adapter.name] = Patched(adapter, engine, found)
    if release(vllm_version()) > release(NEWEST):
        _say(
            "kvhook: vLLM %s is newer than this kvhook knows (%s). It is recorded as far as it is like that one; what "
            "is missing is in session.meta['absent']",
            vllm_version(),
            NEWEST,
        )


def _restore(patch: Patch) -> bool:
    """Put the original back; False if somebody else's wrapper is over ours."""
    if vars(patch.parent).get(patch.attribute) is not patch.wrapper:
        return False
    if patch.inherited:
        delattr(patch.parent, patch.attribute)
    else:
        setattr(patch.parent, patch.attribute, patch.original)
    return True


def _in_child() -> None:
    """After a fork the child is silent: its engine is not the parent's, and the ring has one writer."""
    global _owner, _forks
    _owner = None
    _forks += 1
    _steps.clear()
    _records.clear()
    _engines.clear()
    _quiet.clear()
    _unpatch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
