"""Engines that exist already when kvhook is installed."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from inspect import CO_OPTIMIZED
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any

from kvhook.adapters import ADAPTERS
from kvhook.adapters.table import lookup

#: Of what a program holds, so many objects are looked at: some 0.1 s at most.
_MOST_OBJECTS = 100_000
#: From a variable to an engine there are few steps: variable, list, ``LLM``, its ``__dict__``, the engine.
_MOST_STEPS = 6
_NO_WAY_THROUGH = (type, ModuleType, FunctionType, BuiltinFunctionType)


def engines_alive() -> list[Any]:
    """The engines of this process. Looks only if a module with an engine class has been imported.

    The garbage collector knows all objects but those that were frozen. V1 freezes them (`gc.freeze`) while it makes an
    engine with its core in this process; such an engine is looked for among what the program's variables hold.
    """
    classes = _engine_classes()
    if not classes:
        return []
    found = {id(each): each for each in gc.get_referrers(*classes) if type(each) in classes}
    if gc.get_freeze_count():
        with contextlib.ExitStack() as stack:
            variables: list[Mapping[str, Any]] = []
            for frame in _frames():
                variables += [stack.enter_context(variables_of(frame)), frame.f_globals]
            if (main := sys.modules.get("__main__")) is not None:
                variables.append(vars(main))
            found |= {id(each): each for each in _held(variables) if type(each) in classes}
    return list(found.values())


@contextlib.contextmanager
def variables_of(frame: FrameType) -> Iterator[Mapping[str, Any]]:
    """The variables of a function that runs, or of a module.

    Before Python 3.13 a function's are a copy, which its frame keeps: what they hold would live on until the function
    returns, though it deletes its variable. So the copy is emptied afterwards.
    """
    names = frame.f_locals
    try:
        yield names
    finally:
        if sys.version_info < (3, 13) and frame.f_code.co_flags & CO_OPTIMIZED:
            names.clear()


def _engine_classes() -> set[type]:
    """The engine classes that have been imported, and all classes made of them."""
    classes: set[type] = set()
    new = []
    for adapter in ADAPTERS:
        if adapter.trigger in sys.modules:
            try:
                new.append(lookup(adapter.engine))
            except LookupError:
                continue
    while new:
        each = new.pop()
        if each not in classes:
            classes.add(each)
            new += type.__subclasses__(each)
    return classes


def _frames() -> Iterator[FrameType]:
    """All functions and modules that run, in all threads."""
    # there is no public way to another thread's frames
    for frame in sys._current_frames().values():  # noqa: SLF001
        at: FrameType | None = frame
        while at is not None:
            yield at
            at = at.f_back


def _held(roots: Iterable[Any]) -> Iterator[Any]:
    """What these objects hold, and what that holds in its turn, the nearest first."""
    seen = set()
    level = list(roots)
    for _ in range(_MOST_STEPS):
        level = [each for each in gc.get_referents(*level) if gc.is_tracked(each)]
        following = []
        for each in level:
            if id(each) not in seen and not issubclass(type(each), _NO_WAY_THROUGH):
                seen.add(id(each))
                following.append(each)
                yield each
        if len(seen) > _MOST_OBJECTS:
            return
        level = following
