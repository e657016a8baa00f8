"""Whether a wrapper is still called by what stands where it was put."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

#: So many objects are looked at. Not to find a wrapper that is there does no harm, see `Registry.put_again`.
_MOST = 200


def reaches(start: Any, wrapper: Any) -> bool:
    """Whether a function holds on to a wrapper: as what it wraps, in its closure, or in a global variable that it uses.

    Other tools put their wrapper over kvhook's, or put back what was there before it.
    """
    seen: set[int] = set()
    waiting = [start]
    while waiting and len(seen) < _MOST:
        each = waiting.pop(0)
        if each is wrapper:
            return True
        if id(each) not in seen:
            seen.add(id(each))
            waiting += _held(each)
    return False


def is_of(now: Any, before: Any) -> bool:
    """Whether a function is what was there before, or a part of it: what it wraps, or what both of them wrap."""
    return reaches(before, now) or inspect.unwrap(now) is inspect.unwrap(before)


def _held(function: Any) -> Iterator[Any]:
    """What a function may call."""
    if isinstance(function, functools.partial):
        yield function.func
        return
    for name in ("__wrapped__", "__func__", "_self_wrapper"):
        found = getattr(function, name, None)
        if found is not None:
            yield found
    plain = function if isinstance(function, types.FunctionType) else None
    if plain is None:
        own = getattr(function, "__dict__", None)
        yield from (each for each in (own.values() if isinstance(own, dict) else ()) if callable(each))
        return
    for cell in plain.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(held, dict):
            yield from held.values()
        elif isinstance(held, (list, tuple)):
            yield from held
        else:
            yield held
    for name in plain.__code__.co_names:
        found = plain.__globals__.get(name)
        if callable(found) and not isinstance(found, (type, types.ModuleType)):
            yield found
