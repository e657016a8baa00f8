"""What happens at each patched call of vLLM. `ROLES` at the end says which function is put at which target.

Each function has wrapt's signature: the wrapped function, the object it is called on, and the arguments.
"""

from __future__ import annotations

import inspect
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import wrapt

from kvhook import _step
from kvhook.adapters.table import Adapter
from kvhook.faults import USERS, pass_on
from kvhook.hooks.engines import fit_before_next_request, watch
from kvhook.hooks.existing import variables_of
from kvhook.hooks.quiet import make_no_stats, quiet_manager
from kvhook.hooks.registry import NOT_RECORDED_FURTHER, Building, building, registry
from kvhook.hooks.unseen import recorder_of

clock = time.monotonic_ns

_STATS, _TTFT = "taking over the stats of a step", "reading a request's time to first token"

# The registry's own dictionaries, under names that are found without a look into the registry.
_steps, _records, _engines = registry.steps, registry.records, registry.engines


# ---- in every step -------------------------------------------------------------------------------------------------


def on_step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``LLMEngine.step``: read the clock before and after it, then publish what came in between."""
    publish = _steps.get(id(instance))
    if publish is None and (publish := recorder_of(instance)) is None:
        return wrapped(*args, **kwargs)
    start = clock()
    try:
        return wrapped(*args, **kwargs)
    finally:
        try:
            publish(start, clock())
        except USERS:
            raise
        except BaseException as error:
            publishing_failed(error, id(instance))


def publishing_failed(error: BaseException, engine_id: int) -> None:
    """Publishing a step has failed. The extension's `StepMethod` calls it too."""
    pass_on(error)
    known = registry.engines.get(engine_id)
    _steps.pop(engine_id, None)
    if known is not None:
        registry.give_up(known, engine_id, "recording a step", error)
    else:
        registry.fault("recording a step", error, NOT_RECORDED_FURTHER)


def around_step(original: Any) -> Any:
    """What is put in a class in place of its ``step``: it behaves as the original and records the step.

    Where the extension is there, this is not a wrapt proxy: with cold caches its call alone takes 4 to 5 us, one of
    the extension's 1. A step that is no plain function (somebody else has wrapped it) keeps to wrapt, which knows how
    to bind any callable.
    """
    return stoppable_step(original)[0]


def stoppable_step(original: Any) -> tuple[Any, Callable[[], None]]:
    """The same, and what makes it do nothing any more."""
    if _step.native is not None and isinstance(original, types.FunctionType):
        method: Any = _step.native.StepMethod(original, _steps, publishing_failed, recorder_of)
        return method, method.kvhook_stop
    return stoppable("engine_step", original)


def stoppable(role: str, original: Any) -> tuple[Any, Callable[[], None]]:
    """What is put in place of `original` in a role, and what makes it do nothing any more.

    Somebody else's wrapper may hold on to ours when kvhook is taken out, and would call it in kvhook's next session
    beside the wrapper of that. So each has a function of its own, whose code is exchanged: a step costs no more by it.
    """
    act: Any = ROLES[role]
    mine = types.FunctionType(act.__code__, act.__globals__, act.__name__)

    def stop() -> None:
        mine.__code__ = _call_on.__code__

    return wrapt.FunctionWrapper(original, mine), stop


def _call_on(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


def on_record(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around vLLM's ``record``, where its own loggers are on: look at the stats as they pass."""
    record = _records.get(id(instance))
    if record is not None:
        try:
            record(*args, **kwargs)
        except USERS:
            raise
        except BaseException as error:
            _record_failed(error, id(instance))
    return wrapped(*args, **kwargs)


def on_stats(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around V0's ``LLMEngine._get_stats``: take what it returns, if it was called with a step's schedule."""
    stats = wrapped(*args, **kwargs)
    record = _records.get(id(instance))
    if record is not None and (args[0] if args else kwargs.get("scheduler_outputs")) is not None:
        try:
            record(stats)
        except USERS:
            raise
        except BaseException as error:
            _record_failed(error, id(instance))
    return stats


def on_finished(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``IterationStats.update_from_finished_request``: store the request's TTFT in the finished request.

    vLLM knows it (RequestStateStats.first_token_latency), but does not pass it on.
    """
    result = wrapped(*args, **kwargs)
    if _engines and not registry.is_off(_TTFT):
        try:
            state = kwargs.get("req_stats")
            if state is None:
                state = next(a for a in args if hasattr(a, "first_token_latency"))
            instance.finished_requests[-1].kvhook_ttft = state.first_token_latency
        except USERS:
            raise
        except BaseException as error:
            registry.fault(_TTFT, error, "it is NaN for this request")
    return result


def _record_failed(error: BaseException, key: int) -> None:
    """Taking over the stats that pass an object has failed."""
    pass_on(error)
    _records.pop(key, None)
    for engine_id, known in list(_engines.items()):
        if key in known.record_keys:
            registry.give_up(known, engine_id, _STATS, error)
            return
    registry.fault(_STATS, error, NOT_RECORDED_FURTHER)


# ---- while an engine is built --------------------------------------------------------------------------------------


def on_engine_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around an engine's ``__init__``: turn the stats on if the user left them off, and then record the engine."""
    owner = registry.owner
    if owner is None:
        return wrapped(*args, **kwargs)
    adapter: Adapter | None = None
    try:
        adapter = registry.adapter_of(instance)
    except USERS:
        raise
    except BaseException as error:
        owner.fault("looking at a new engine", error, "this engine is not recorded")
    if adapter is None:
        return wrapped(*args, **kwargs)
    stats_were_on = True
    try:
        signature = inspect.signature(wrapped)
        arguments = signature.bind(*args, **kwargs)
        named = where_named(arguments, "log_stats")
        stats_were_on = bool(named["log_stats"])
        if adapter.level == "full":
            named["log_stats"] = True
        if not stats_were_on:
            arguments.arguments |= {n: make() for n, make in adapter.quiet.items() if n in signature.parameters}
        args, kwargs = arguments.args, arguments.kwargs
    except USERS:
        raise
    except BaseException as error:
        owner.fault("turning vLLM's stats on", error, "this engine is recorded only if its stats are on anyway")
    token = building.set(Building(not stats_were_on, on_event_loop=not adapter.timed))
    registry.failed.add(id(instance))
    try:
        result = wrapped(*args, **kwargs)
    finally:
        building.reset(token)
    registry.failed.discard(id(instance))
    try:
        if not watch(instance, stats_were_on=stats_were_on, built_by_us=True) and id(instance) not in registry.engines:
            registry.leave(instance)
    except USERS:
        raise
    except BaseException as error:
        registry.leave(instance)
        owner.fault("starting to record an engine", error, "this engine is not recorded")
        if not stats_were_on and adapter.timed and adapter.tap == "manager":
            make_no_stats(instance, "")
    return result


def where_named(arguments: inspect.BoundArguments, name: str) -> dict[str, Any]:
    """Where an argument is among those of a call: among the ``**kwargs``, if somebody's wrapper takes it so."""
    parameters = arguments.signature.parameters
    rest = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), "")
    if name in parameters or not rest:
        return arguments.arguments
    return arguments.arguments.setdefault(rest, {})  # type: ignore[no-any-return]


def on_manager(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """In place of vLLM's stat logger or manager in the engine's module: kvhook's own, if the user left stats off.

    vLLM's manager always makes a logging and a Prometheus logger. The latter takes 38-490 us a step, and making it
    erases the numbers of every earlier engine. Nobody asked for them here.
    """
    being_built = building.get()
    if being_built is None or not being_built.stats_off:
        return wrapped(*args, **kwargs)
    if being_built.on_event_loop and kwargs.get("custom_stat_loggers") and "enable_default_loggers" in kwargs:
        # the user passed loggers: vLLM would have turned stats on for these alone
        return wrapped(*args, **{**kwargs, "enable_default_loggers": False})
    try:
        return quiet_manager(wrapped)
    except USERS:
        raise
    except BaseException as error:  # somebody has put something else in the place of vLLM's class
        registry.fault("keeping vLLM's own loggers away", error, "they are made, although stats were left off")
    return wrapped(*args, **kwargs)


def on_core(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``EngineCoreClient.make_client``: turn the engine core's stats on.

    At level light only the core makes stats. In vLLM 0.8, LLMEngine turns them off whatever the user says.
    """
    owner = registry.owner
    if owner is not None and building.get() is not None:
        try:
            arguments = inspect.signature(wrapped).bind(*args, **kwargs)
            where_named(arguments, "log_stats")["log_stats"] = True
            args, kwargs = arguments.args, arguments.kwargs
        except USERS:
            raise
        except BaseException as error:
            owner.fault(
                "turning the engine core's stats on", error, "this engine is recorded only if they are on anyway"
            )
    return wrapped(*args, **kwargs)


def on_processor(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``OutputProcessor.__init__``: every front end of an engine makes one.

    If no engine that kvhook knows is being built at this moment, somebody gives an engine another one, or builds an
    engine of their own: that is not recorded, and they are told so.
    """
    result = wrapped(*args, **kwargs)
    if registry.owner is not None and building.get() is None:
        try:
            frame = sys._getframe(1)  # noqa: SLF001 (there is no public way to the caller)
            with variables_of(frame) as names:
                engine = names.get("self")
            recorded = [each for known in registry.engines.values() if (each := known.engine()) is not None]
            if id(engine) in registry.engines:
                fit_before_next_request(engine)
                return result
            for each in recorded:  # it may be given to one of these
                fit_before_next_request(each)
            where = f"{frame.f_globals.get('__name__', '?')}, line {frame.f_lineno}"
            registry.unknown.append(where)
            if registry.adapter_of(engine) is not None:
                registry.put_again()
                registry.warn_once(
                    "kvhook: an engine was made (%s in %s) while kvhook's wrapper of its __init__ was not there:"
                    " somebody has put back what was there before kvhook.install(). Later ones are recorded. This one"
                    " is recorded only if vLLM's stats are on in it: from its first step, an AsyncLLM from"
                    " kvhook.attach(llm) on",
                    type(engine).__qualname__,
                    where,
                )
                return result
            registry.warn_once(
                "kvhook: an engine was made that is neither vLLM's LLMEngine nor its AsyncLLM (in %s)."
                " It is not recorded. If an engine that is recorded was given another output processor there, it is"
                " recorded further on",
                where,
            )
        except USERS:
            raise
        except BaseException as error:
            registry.fault("looking at an engine of another kind", error, "it is not recorded")
    return result


def on_get_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Around ``LLMEngine.get_metrics``: if the user left stats off, it fails as it does without kvhook."""
    if registry.stats_off(instance):
        raise AssertionError(
            "Stat logging disabled: vLLM's metrics are off in this engine, as they are by default. kvhook has this "
            "run's numbers (session.summary()); for vLLM's own as well, pass disable_log_stats=False to LLM(...)"
        )
    return wrapped(*args, **kwargs)


# ---- which function goes where -------------------------------------------------------------------------------------

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
    "processor": on_processor,
}
