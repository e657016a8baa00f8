"""Engines that exist already when kvhook is installed."""

from __future__ import annotations

import gc
import sys
from typing import Any

from kvhook.adapters import ADAPTERS
from kvhook.adapters.table import lookup


def engines_alive() -> list[Any]:
    """The engines of this process, found among the objects that the garbage collector knows.

    Looks only if a module with an engine class has been imported: then it takes some 0.1 s, once.
    """
    classes = set()
    for adapter in ADAPTERS:
        if adapter.trigger in sys.modules:
            try:
                classes.add(lookup(adapter.engine))
            except LookupError:
                continue
    if not classes:
        return []
    # the type's own ancestors are compared: isinstance() would ask proxies for the class of what they stand for
    return [each for each in gc.get_objects() if not classes.isdisjoint(type(each).__mro__)]
