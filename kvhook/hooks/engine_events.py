"""Calls that change what an engine's steps do afterwards: sleep, new weights, an emptied prefix cache, LoRA adapters.

None of them is made in a step. Each is noted when it begins and when it ends, and otherwise goes through unchanged.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import wrapt

from kvhook.adapters.engine_events import ANY, METHODS, Told, describe
from kvhook.faults import USERS
from kvhook.hooks.registry import Patch, registry
from kvhook.records.engine_events import DONE, REFUSED

End = Callable[[str], None]

#: Kinds of events that this thread or task is inside of: vLLM's methods call each other.
_inside: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("kvhook_inside_event", default=())


def patch_engine_events(engine: Any) -> None:
    """Wrap those methods that an engine's class has."""
    for method in (*METHODS, ANY):
        original = next((vars(cls)[method] for cls in engine.__mro__ if method in vars(cls)), None)
        if not callable(original) or any(p.parent is engine and p.attribute == method for p in registry.patches):
            continue
        inherited = method not in vars(engine)
        wrapper = wrapt.FunctionWrapper(original, _around(method))
        setattr(engine, method, wrapper)
        registry.patches.append(Patch(engine, method, original, wrapper, inherited))


def _around(method: str) -> Callable[[Any, Any, Any, Any], Any]:
    def on_call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        begun = _begin(method, wrapped, instance, args, kwargs)
        if begun is None:
            return wrapped(*args, **kwargs)
        if inspect.iscoroutinefunction(wrapped):
            return _awaited(wrapped(*args, **kwargs), *begun)
        with _noted(*begun) as answer:
            result = wrapped(*args, **kwargs)
            answer(result)
        return result

    return on_call


async def _awaited(coroutine: Any, told: Told, end: End) -> Any:
    with _noted(told, end) as answer:
        result = await coroutine
        answer(result)
    return result


@contextlib.contextmanager
def _noted(told: Told, end: End) -> Iterator[Callable[[Any], None]]:
    """While a call is under way: notes how it ended. It is to be given what the call has returned."""
    outcome = DONE

    def answer(result: Any) -> None:
        nonlocal outcome
        outcome = REFUSED if result is False and told.refuses else DONE

    token = _inside.set((*_inside.get(), told.kind))
    try:
        yield answer
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        _inside.reset(token)
        _end(end, outcome)


def _begin(method: str, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> tuple[Told, End] | None:
    """The event that begins, and what ends it; None if it is not to be noted."""
    owner = registry.owner
    if owner is None or id(instance) not in registry.engines:
        return None
    try:
        told = describe(wrapped, method, args, kwargs)
        if told is None or told.kind in _inside.get():
            return None
        return told, owner.begin_engine_event(instance, told)
    except USERS:
        raise
    except BaseException as error:
        registry.fault(f"noting a call of {method}", error, "this event is not in the trace")
        return None


def _end(end: End, outcome: str) -> None:
    try:
        end(outcome)
    except USERS:
        raise
    except BaseException as error:
        registry.fault("noting the end of an engine event", error, "the trace does not say when it ended")
