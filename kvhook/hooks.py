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

from kvhook.adapters import ADAPTERS
from kvhook.adapters.compiler import FINISHED_HOOK, PublishStep, Record
from kvhook.adapters.table import Adapter, Target, has_field, lookup, vllm_version

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


#: id(engine) -> publish. Looked up in every step; what is not in it is none of our business.
_steps: dict[int, PublishStep] = {}
#: id(stat logger manager) -> record, where vLLM's own loggers are on.
_records: dict[int, Record] = {}
#: engines whose user had left stats off: their get_metrics() goes on refusing
_quiet: set[int] = set()
_patches: dict[str, list[Patch]] = {}
_owner: Owner | None = None
_waiting_for: set[str] = set()
#: adapter that is in place -> what its targets turned out to be
_found: dict[str, dict[str, Target]] = {}
#: whether the engine that is just being built belongs to a user who had left stats off
_building_quiet: contextvars.ContextVar[bool] = contextvars.ContextVar("kvhook_building_quiet", default=False)


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
    """Around ``StatLoggerManager.record``, where vLLM's own loggers are on: look at the stats as they pass."""
    record = _records.get(id(instance))
    if record is not None:
        try:
            record(*args, **kwargs)
        except Exception as error:
            _failed("taking over the stats of a step", error, _records, id(instance))
    return wrapped(*args, **kwargs)


def on_finished(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``IterationStats.update_from_finished_request``: leave the request's TTFT on the finished request.

    vLLM knows it (RequestStateStats.first_token_latency) and does not pass it on.
    """
    result = wrapped(*args, **kwargs)
    if _steps:
        try:
            state = kwargs.get("req_stats")
            if state is None:
                state = next(a for a in args if hasattr(a, "first_token_latency"))
            instance.finished_requests[-1].kvhook_ttft = state.first_token_latency
        except Exception as error:
            if _owner is not None:
                _owner.fault("reading a request's time to first token", error, "it is NaN for this request")
    return result


# ---- building an engine --------------------------------------------------------------------------------------------


def on_engine_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``LLMEngine.__init__``: turn the stats on if the user left them off, and then record the engine."""
    owner = _owner
    if owner is None:
        return wrapped(*args, **kwargs)
    stats_were_on = True
    try:
        arguments = inspect.signature(wrapped).bind(*args, **kwargs)
        stats_were_on = bool(arguments.arguments["log_stats"])
        arguments.arguments["log_stats"] = True
        args, kwargs = arguments.args, arguments.kwargs
    except Exception as error:
        owner.fault("turning vLLM's stats on", error, "this engine is recorded only if its stats are on anyway")
    token = _building_quiet.set(not stats_were_on)
    try:
        result = wrapped(*args, **kwargs)
    finally:
        _building_quiet.reset(token)
    try:
        watch(instance, stats_were_on=stats_were_on)
    except Exception as error:
        owner.fault("starting to record an engine", error, "this engine is not recorded")
    return result


def on_manager(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of ``StatLoggerManager`` in the engine's module: no logger but kvhook's where stats were off.

    vLLM's own manager always makes a Prometheus logger (38-490 us a step), whose making also wipes the numbers of
    every engine before; and the logging one. Nobody asked for them here.
    """
    if not _building_quiet.get():
        return wrapped(*args, **kwargs)
    return _quiet_manager(wrapped)


def on_get_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``LLMEngine.get_metrics``: with the user's stats off it fails as it does without kvhook."""
    if id(instance) in _quiet:
        raise AssertionError(
            "Stat logging disabled: vLLM's metrics are off in this engine, as they are by default. kvhook has this "
            "run's numbers (session.summary()); for vLLM's own as well, pass disable_log_stats=False to LLM(...)"
        )
    return wrapped(*args, **kwargs)


def watch(engine: Any, *, stats_were_on: bool) -> bool:
    """Record an engine that has been built. False if it is recorded already or the session does not want it."""
    owner = _owner
    if owner is None or id(engine) in _steps:
        return False
    adapter = next(a for a in ADAPTERS if a.name in _found)
    facts = {"stats_on": stats_were_on, FINISHED_HOOK: "finished" in _found[adapter.name]}
    functions = owner.open_engine(engine, adapter, facts)
    if functions is None:
        return False
    record, publish = functions
    manager = engine.logger_manager
    if isinstance(manager, _QuietManager):
        manager.hand_over_to(record)
        _quiet.add(id(engine))
    else:
        _records[id(manager)] = record
    _steps[id(engine)] = publish
    weakref.finalize(engine, _forget, id(engine), id(manager)).atexit = False
    return True


class _QuietManager:
    """Marks the managers that `_quiet_manager` makes."""

    stat_loggers: list[Any]

    def hand_over_to(self, record: Record) -> None:
        """From now on the engine's stats go straight to `record`, without a frame in between."""
        self.stat_loggers = [_OnlyLogger(record)]
        self.record = record


class _OnlyLogger:
    """kvhook alone in vLLM's list of loggers: records, and does nothing at everything else a manager may ask."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _quiet_manager(manager_class: Any) -> Any:
    """A manager of vLLM's own type with no logger in it: what asks for its type still gets it."""
    made: Any = object.__new__(type("KvhookStatLoggerManager", (_QuietManager, manager_class), {}))
    made.engine_indexes = [0]
    made.hand_over_to(_nothing)
    return made


def _forget(engine_id: int, manager_id: int) -> None:
    """An engine was deleted."""
    _steps.pop(engine_id, None)
    _records.pop(manager_id, None)
    _quiet.discard(engine_id)
    if _owner is not None:
        _owner.close_engine(engine_id)


def _failed(what: str, error: BaseException, table: dict[int, Any], key: int) -> None:
    """A hook failed: report it, and if the fault is kvhook's, never call it again for this engine."""
    if isinstance(error, Exception):
        table.pop(key, None)
    if _owner is not None:
        _owner.fault(what, error, "this engine is not recorded any further")


# ---- patching and unpatching ---------------------------------------------------------------------------------------

#: Role of a target -> what is put there.
ROLES: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "engine_init": on_engine_init,
    "engine_step": on_step,
    "manager": on_manager,
    "record": on_record,
    "finished": on_finished,
    "get_metrics": on_get_metrics,
}


def arm(owner: Owner) -> None:
    """Patch vLLM for this owner: at once if it is imported, else as soon as it is. Never imports it."""
    global _owner
    _owner = owner
    for adapter in ADAPTERS:
        if adapter.trigger in sys.modules:
            _on_import(sys.modules[adapter.trigger])
        elif adapter.trigger not in _waiting_for:
            # cannot be taken back, so it is registered once and asks then whether anybody still wants it
            _waiting_for.add(adapter.trigger)
            wrapt.register_post_import_hook(_on_import, adapter.trigger)


def disarm() -> None:
    """Put back what was there. A name that somebody else has wrapped meanwhile keeps our wrapper below theirs, where
    it does nothing any more."""
    global _owner
    _owner = None
    _steps.clear()
    _records.clear()
    _quiet.clear()
    for name, patches in list(_patches.items()):
        kept = [p for p in reversed(patches) if not _restore(p)]
        if kept:
            _patches[name] = kept[::-1]
        else:
            del _patches[name]
    _found.clear()


def resolve(adapter: Adapter) -> tuple[dict[str, Target], list[str]]:
    """Which targets of an adapter the loaded vLLM has, by role; and the required ones it has not, in words."""
    found, missing = {}, []
    for target in adapter.targets:
        try:
            lookup(target.path)
            if target.field and not has_field(lookup(target.field[0]), target.field[1]):
                raise LookupError(f"{target.field[0]} has no {target.field[1]}")
            found[target.role] = target
        except LookupError as error:
            if target.required:
                missing.append(str(error))
    return found, missing


def patched() -> dict[str, dict[str, Target]]:
    """Adapter -> the targets that are patched at this moment, by role."""
    return {name: dict(targets) for name, targets in _found.items()}


def _on_import(module: Any) -> None:
    """A trigger module has been imported: patch, if a session is there and the vLLM is one we know."""
    owner = _owner
    if owner is None:
        return
    try:
        complaints = []
        for adapter in (a for a in ADAPTERS if a.trigger == module.__name__):
            found, missing = resolve(adapter)
            if not missing:
                _apply(adapter, found)
                return
            complaints += missing
        log.warning(
            "kvhook: nothing is patched and nothing recorded: vLLM %s is not one this kvhook knows (%s). "
            "A newer kvhook may know it: pip install -U kvhook",
            vllm_version() or "(unknown version)",
            "; ".join(dict.fromkeys(complaints)),
        )
    except Exception as error:
        owner.fault("patching vLLM", error, "nothing is recorded")


def _apply(adapter: Adapter, found: dict[str, Target]) -> None:
    """Patch every target, or none. What is still patched from before (below somebody else's wrapper) stays."""
    kept = _patches.get(adapter.name, [])
    patches: list[Patch] = []
    try:
        for target in found.values():
            module, _, name = target.path.partition(":")
            parent, attribute, original = wrapt.resolve_path(sys.modules[module], name)
            if any(p.parent is parent and p.attribute == attribute for p in kept):
                continue
            wrapper = wrapt.FunctionWrapper(original, ROLES[target.role])
            inherited = attribute not in vars(parent)
            setattr(parent, attribute, wrapper)
            patches.append(Patch(parent, attribute, original, wrapper, inherited))
    except Exception:
        for patch in reversed(patches):
            _restore(patch)
        raise
    _patches[adapter.name] = kept + patches
    _found[adapter.name] = found


def _restore(patch: Patch) -> bool:
    """Put the original back; False if somebody else's wrapper is over ours."""
    if vars(patch.parent).get(patch.attribute) is not patch.wrapper:
        return False
    if patch.inherited:
        delattr(patch.parent, patch.attribute)
    else:
        setattr(patch.parent, patch.attribute, patch.original)
    return True


def call_overhead_ns() -> int:
    """What a wrapped call costs on this machine beyond the bare one, in nanoseconds: the part of a step's cost that
    the publisher cannot measure from inside. Takes about a millisecond."""

    class Bare:
        def step(self) -> None:
            return None

    class Wrapped:
        step = wrapt.FunctionWrapper(Bare.step, on_step)

    bare, hooked = Bare(), Wrapped()
    _steps[id(hooked)] = lambda start, end: None
    try:
        return max(0, _time(hooked.step) - _time(bare.step))
    finally:
        del _steps[id(hooked)]


def _time(call: Callable[[], Any]) -> int:
    best = 1 << 62
    for _ in range(5):
        start = clock()
        for _ in range(100):
            call()
        best = min(best, clock() - start)
    return best // 100


def _in_child() -> None:
    """After a fork the child is silent: its engine is not the parent's, and the ring has one writer."""
    global _owner
    _owner = None
    _steps.clear()
    _records.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
