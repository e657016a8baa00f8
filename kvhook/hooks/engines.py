"""How an engine begins and ends to be recorded, and how it changes to a level that costs less."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

from kvhook import forks
from kvhook.adapters.columns import FINISHED_HOOK
from kvhook.adapters.fit import choose
from kvhook.adapters.publisher import PublishStep, Record
from kvhook.adapters.settings import Settings
from kvhook.adapters.table import Adapter, vllm_version
from kvhook.errors import StatsOffError
from kvhook.hooks.quiet import do_nothing, make_no_stats
from kvhook.hooks.registry import NOT_RECORDED_FURTHER, RecordedEngine, registry
from kvhook.hooks.taps import TAPS, Tap, core_of

clock = time.monotonic_ns


def watch(engine: Any, *, stats_were_on: bool, built_by_us: bool = False) -> bool:
    """Record an engine that has been built. False if it is recorded already or the session does not want it.

    Args:
        stats_were_on: whether its user had turned vLLM's stats on.
        built_by_us: whether `kvhook.hooks.wrappers.on_engine_init` was there when it was built.

    Raises:
        StatsOffError: it makes no stats, because kvhook was not there when it was built.
    """
    owner, adapter = registry.owner, registry.adapter_of(engine)
    if owner is None or adapter is None or id(engine) in registry.engines:
        return False
    if adapter.must_be_built and not built_by_us:
        raise StatsOffError(
            f"this vLLM ({vllm_version()}) makes no stats behind LLM, whatever disable_log_stats says, unless kvhook "
            "is there when the engine is built: call kvhook.install() before LLM(...)"
        )
    _read_settings()
    key = id(engine)
    hooked = {t.role for t in registry.patched[adapter.name].targets}
    facts: dict[str, Any] = {"stats_on": stats_were_on, FINISHED_HOOK: "finished" in hooked}
    if adapter.timed and not hasattr(engine, "step_async"):
        functions = owner.open_engine(engine, adapter, facts)
        if functions is None:
            return False
        record, publish = functions
        registry.steps[key] = publish
    else:
        record = _record_on_event_loop(engine, adapter, facts | {"timed_steps": False})
    known = registry.engines[key] = RecordedEngine(do_nothing)
    try:
        known.remove_tap = _put_tap_in(engine, adapter, record)
        if not stats_were_on and adapter.level == "full":
            known.stats_off = True
            if adapter.timed and adapter.tap == "manager":
                known.remove_tap = _and_turn_stats_off(known.remove_tap, engine)
    except Exception:
        forget(key)
        raise
    weakref.finalize(engine, forget, key).atexit = False
    return True


def step_down(engine: Any, every: int, functions_of: Callable[[Adapter], tuple[Record, PublishStep]]) -> bool:
    """Record an engine at level light from its next step on. Called by the engine's thread, at the end of a step.

    Args:
        engine: an engine that is recorded.
        every: outputs are counted in one of so many steps.
        functions_of: returns the functions that record with an adapter of that level.

    Returns:
        Whether that can be done with this engine.

    Raises:
        LookupError: vLLM's classes are not where the adapter says; nothing has been changed.
    """
    key, full = id(engine), registry.adapter_of(engine)
    known = registry.engines.get(key)
    if full is None or known is None:
        return False
    adapter, _, missing = choose(full.engine, "light")
    if missing or adapter.level != "light":
        return False
    core_of(engine)  # raises before anything is changed
    record, publish = functions_of(adapter)
    known.remove_tap()
    if known.stats_off:
        make_no_stats(engine, full.holder)
    known.remove_tap = _put_tap_in(engine, adapter, record, every)
    registry.steps[key] = publish
    return True


def forget(engine_id: int) -> None:
    """Stop recording an engine: it was deleted, it cannot be recorded, or kvhook is being uninstalled."""
    registry.remove(engine_id)
    if registry.owner is not None:
        registry.owner.close_engine(engine_id)


def _read_settings() -> None:
    """Take over vLLM's settings as they are at this moment."""
    for patch in registry.patches:
        if isinstance(patch.wrapper, Settings):
            patch.wrapper.read()


def _put_tap_in(engine: Any, adapter: Adapter, record: Record, every: int = 1) -> Callable[[], None]:
    key = id(engine)

    def failed(error: Exception) -> None:
        registry.steps.pop(key, None)
        known = registry.engines.get(key)
        if known is not None:  # if it is not recorded any more, its id may be another engine's by now
            remove, known.remove_tap = known.remove_tap, do_nothing
            remove()
        registry.fault("counting what a step gave", error, NOT_RECORDED_FURTHER)

    return TAPS[adapter.tap](Tap(engine, adapter, record, registry.records, failed, every))


def _and_turn_stats_off(remove_tap: Callable[[], None], engine: Any) -> Callable[[], None]:
    """Leave the engine without stats, as its user wanted it.

    Not for engines on an event loop: their output handler keeps making stats whatever is said later, and needs the
    clocks of new requests for that.
    """
    alive = weakref.ref(engine)

    def undo() -> None:
        remove_tap()
        engine = alive()
        if engine is not None:
            make_no_stats(engine, "")

    return undo


# ---- engines without a step ----------------------------------------------------------------------------------------


def _record_on_event_loop(engine: Any, adapter: Adapter, facts: dict[str, Any]) -> Record:
    """`record` for an engine without a ``step``: each call is one record, in the ring of its rank."""
    alive = weakref.ref(engine)  # what is kept in the engine must not keep it alive

    def open_rank(rank: int) -> tuple[Record, PublishStep] | None:
        engine, owner = alive(), registry.owner
        if engine is None or owner is None:
            return None
        return owner.open_engine(engine, adapter, facts | {"engine_index": rank})

    return publish_on_record(open_rank, registry.fault)


def publish_on_record(
    open_rank: Callable[[int], tuple[Record, PublishStep] | None], fault: Callable[[str, BaseException, str], None]
) -> Record:
    """A `record` that publishes at once, for engines that have no step to be timed.

    Args:
        open_rank: returns the functions of an engine core; called when its first stats come.
        fault: is called with errors; none is raised.
    """
    ranks: dict[int, tuple[Record, PublishStep] | None] = {}
    made_in = forks.generation

    def record(*args: Any, engine_idx: int | None = None, **kwargs: Any) -> None:
        if made_in != forks.generation:
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
            fault("recording a step", error, NOT_RECORDED_FURTHER)

    return record
