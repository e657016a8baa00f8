"""Calls of ``LLM.generate`` and the like: each is a scope of the run."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from typing import Any

import wrapt

from kvhook.adapters.calls import CLASS, ENGINE, METHODS, MODULE, describe_call
from kvhook.faults import USERS
from kvhook.hooks.registry import Patch, registry

_BEGIN, _END = "noting a call of LLM", "noting the end of a call of LLM"

#: Whether this thread or task is inside such a call: ``chat`` calls ``generate``, and that is one call.
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("kvhook_inside_call", default=False)


def patch_calls() -> None:
    """Wrap the methods of ``LLM`` that run an engine, if its module has been imported. Never imports it."""
    llm: Any = getattr(sys.modules.get(MODULE), CLASS, None)
    for method in METHODS if isinstance(llm, type) else ():
        original = next((vars(cls)[method] for cls in llm.__mro__ if method in vars(cls)), None)
        if original is None or any(p.parent is llm and p.attribute == method for p in registry.patches):
            continue
        inherited = method not in vars(llm)
        wrapper = wrapt.FunctionWrapper(original, _around(method))
        setattr(llm, method, wrapper)
        registry.patches.append(Patch(llm, method, original, wrapper, inherited))


def _around(method: str) -> Callable[[Any, Any, Any, Any], Any]:
    def on_call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        owner = registry.owner
        if owner is None or _inside.get() or owner.is_off(_BEGIN):
            return wrapped(*args, **kwargs)
        token = _inside.set(True)
        end: Callable[[], None] | None = None
        try:
            try:
                end = owner.begin_call(getattr(instance, ENGINE, None), describe_call(wrapped, method, args, kwargs))
            except USERS:
                raise
            except BaseException as error:
                registry.fault(_BEGIN, error, f"this call of {method} is no scope")
            return wrapped(*args, **kwargs)
        finally:
            _inside.reset(token)
            if end is not None:
                _end(end, method)

    return on_call


def _end(end: Callable[[], None], method: str) -> None:
    try:
        end()
    except USERS:
        raise
    except BaseException as error:
        registry.fault(_END, error, f"the scope of this call of {method} has no end")
