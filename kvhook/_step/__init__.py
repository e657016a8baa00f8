"""The step path in C, where it could be built: `native`, else None, and `why_not` says why.

`native` is one extension module, made from the C files in this folder. It does what the generated Python does
(`kvhook.adapters.source`), the ring's writer (`kvhook.ring.writer`) and the hook around a step
(`kvhook.hooks.wrappers`), with the same bytes and the same exceptions, in less than a third of the time when the
processor's caches are cold. Nothing depends on it: without it, or with ``KVHOOK_PURE=1`` in the environment, the
Python path records.

============================  ======================================================================
``step.h``                    what the files share
``contain.c``                 an error of kvhook's ends where it is raised
``cell.c``                    Python values, common numbers among them without an object
``program.c``                 runs the expressions of an adapter's tables
``packing.c``                 from cells to records
``list_stats.c``              count, sum, smallest and largest of a list of values
``ring_store.c``              the ring's writer, with C11 memory order
``publish.c``                 one step's records
``publisher.c``, ``.h``       the functions that record an engine; ``publisher_plan.c`` makes them from a plan
``step_method.c``             what stands in a class in place of ``LLMEngine.step``
``output_tap.c``              what stands in an engine core's client in place of ``get_output``
``counter.c``                 counts a step's outputs at level light
``core_taps.c``               what stands in an engine core in place of ``schedule`` and others
``core_state.c``, ``core.h``  what is counted there
``core_writing.c``            the writing of a step that only decoded
============================  ======================================================================
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from kvhook import forks

if TYPE_CHECKING:
    from types import ModuleType

#: Set to anything but "" or "0", it chooses the Python path.
ENV_PURE = "KVHOOK_PURE"


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(ENV_PURE, "0") not in ("", "0"):
        return None, f"{ENV_PURE} is set"
    try:
        native = importlib.import_module("kvhook._step.native")
    except ModuleNotFoundError:
        return None, "it was not built for this Python"
    except ImportError as error:
        # such as in a subinterpreter, or in a Python without the interpreter's lock: see module.c
        return None, f"{os.path.basename(str(error.path or '')) or 'the extension'} cannot be loaded: {error}"
    # a forked child must not write into its parent's rings
    forks.call_in_child(native.forked)
    return native, ""


#: The extension module; None where the Python path records. Read when an engine begins to be recorded.
native, why_not = _load()
