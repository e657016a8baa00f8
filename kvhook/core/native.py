"""The counting inside an engine core in C, where the extension is there: what it is given, and who uses it.

The extension does what is done in every step, and hands all else to Python: `kvhook/_step/core_taps.c` says which steps
these are. Without it the taps in `kvhook.core.steps`, `pool` and `ledger` do everything, with the same records.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvhook import _step
from kvhook.adapters.program import CannotCompile, Program
from kvhook.core.state import CoreState
from kvhook.core_schema import CORE_STEP_FIELDS, LIMITS
from kvhook.ring.layout import BODY_AT

if TYPE_CHECKING:
    from types import ModuleType

    from kvhook.adapters.core import Core
    from kvhook.ring.layout import Layout
    from kvhook.ring.writer import Publish

#: What replaces a method, made of the method.
MakeTap = Callable[[Callable[..., Any]], Callable[..., Any]]


def make_state(core: Core) -> CoreState:
    """What the counting of an engine core counts in: the extension's, where it can do its part for this vLLM."""
    extension: Any = _step.native
    columns = tuple(field.name for field in CORE_STEP_FIELDS)
    if columns != getattr(extension, "CORE_COLUMNS", ()):  # there is none, or it was built from older sources
        return CoreState()
    try:
        _compile(core, extension)
    except CannotCompile:
        return CoreState()
    state: CoreState = extension.CoreState()
    return state


def tap(state: Any, role: str) -> MakeTap | None:
    """The extension's tap for a method; None if it is Python that counts."""
    if isinstance(state, CoreState):
        return None
    extension: Any = sys.modules[type(state).__module__]
    return lambda original: extension.CoreTap(role, original, state)


def bind(account: Any, layout: Layout, publish: Publish, engine: int) -> None:
    """Give the extension what it needs, if it is the extension that counts.

    Args:
        account: the `kvhook.core.steps.StepAccount`; its ledger is there by now.
        layout, publish, engine: where its records go.
    """
    state: Any = account.state
    if isinstance(state, CoreState):
        return
    core, pool = account.core, account.pool
    state.bind(
        publish=publish,
        body_bytes=layout.slot_bytes - BODY_AT,
        engine=engine,
        total=pool.total,
        block_size=core.facts["block_size"],
        tokens_known="num_kv_tokens" not in core.absent,
        none_waiting=LIMITS.index("none_waiting"),
        max_num_seqs=LIMITS.index("max_num_seqs"),
        output_argument="scheduler_output",
        just_evicted=pool.just_evicted,
        events=[] if account.ledger is None else account.ledger.events,
        **_compile(core, sys.modules[type(state).__module__]),
        **account.parts(),
    )


def _compile(core: Core, extension: Any) -> dict[str, Any]:
    """The expressions of the adapter's table, for the extension.

    Raises:
        CannotCompile: they are beyond it.
    """
    module: ModuleType = extension
    program = Program(module, {})
    objects = {"sched": core.sched, "manager": core.manager, "pool": core.pool, "queue": core.queue}
    places = {name: program.register(name) for name in (*objects, "output", "request")}
    reads = {name: program.expression(expression) for name, expression in core.expressions.items()}
    registers: list[Any] = [None] * len(program.registers)
    for name, object_ in objects.items():
        registers[places[name]] = object_
    return {
        "operations": tuple(program.operations),
        "constants": tuple(program.constants),
        "reads": reads,
        "registers": tuple(registers),
        "output": places["output"],
        "request": places["request"],
    }
