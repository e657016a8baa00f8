"""How an engine begins and ends to be recorded, and how it changes to a level that costs less."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from kvhook.adapters.columns import FINISHED_HOOK, FROM_CORE, SEES_REQUESTS, SEES_SCHEDULE
from kvhook.adapters.fit import choose
from kvhook.adapters.requests import AbortedRequest
from kvhook.adapters.settings import Settings
from kvhook.adapters.step_functions import Counters, StepFunctions
from kvhook.adapters.table import Adapter, vllm_version
from kvhook.errors import StatsOffError
from kvhook.faults import USERS
from kvhook.hooks.event_loop import EventLoopRecorder
from kvhook.hooks.latest import Latest
from kvhook.hooks.noted import note_of
from kvhook.hooks.own_step import CountOutputs, FirstOutputs, OutputCounts
from kvhook.hooks.quiet import do_nothing, make_no_stats
from kvhook.hooks.registry import RecordedEngine, registry
from kvhook.hooks.requests import request_methods, sees_requests
from kvhook.hooks.schedule import FreeBlocks
from kvhook.hooks.tap import Tap, both, no_blocks, replace
from kvhook.hooks.taps import TAPS, core_of, has_core_output
from kvhook.hooks.twins import copies_of, note_part, original_of
from kvhook.overlays import Overlay

clock = time.monotonic_ns

_FREE_BLOCKS = "reading the free blocks of a schedule"


def watch(engine: Any, *, stats_were_on: bool, built_by_us: bool = False) -> bool:
    """Record an engine that has been built. False if it is recorded already or the session does not want it.

    Args:
        stats_were_on: whether its user had turned vLLM's stats on.
        built_by_us: whether `kvhook.hooks.wrappers.on_engine_init` was there when it was built.

    Raises:
        StatsOffError: it makes no stats, because kvhook was not there when it was built.
    """
    owner, adapter = registry.owner, registry.adapter_of(engine)
    if owner is None or adapter is None or id(engine) in registry.engines or original_of(engine) in registry.engines:
        return False
    if adapter.must_be_built and not built_by_us:
        raise StatsOffError(
            f"this vLLM ({vllm_version()}) makes no stats behind LLM, whatever disable_log_stats says, unless kvhook "
            "is there when the engine is built: call kvhook.install() before LLM(...)"
        )
    registry.put_again()
    _read_settings()
    key = id(engine)
    hooked = {t.role for t in registry.patched[adapter.name].targets}
    facts: dict[str, Any] = {
        "stats_on": stats_were_on,
        FINISHED_HOOK: "finished" in hooked,
        # on an event loop vLLM's loggers are given all stats, and say of which engine core
        FROM_CORE: has_core_output(engine, adapter) and (adapter.timed or adapter.level != "full"),
        SEES_REQUESTS: sees_requests(engine, adapter),
        SEES_SCHEDULE: False,
    }
    functions: StepFunctions | EventLoopRecorder
    timed = adapter.timed and not hasattr(engine, "step_async")
    blocks = _free_blocks(engine, adapter) if timed else None
    if timed:
        facts[SEES_SCHEDULE] = blocks is not None
        opened = owner.open_engine(engine, adapter, facts)
        if opened is None:
            return False
        functions = opened
        registry.steps[key] = functions.publish
    else:
        functions = _event_loop_recorder(engine, adapter, facts | {"timed_steps": False})
    known = registry.engines[key] = RecordedEngine(do_nothing, engine=weakref.ref(engine))
    registry.engines_seen += 1
    registry.before.pop(key, None)
    registry.left.pop(key, None)
    registry.inherited.pop(key, None)
    try:
        _put_in(engine, adapter, functions, facts, blocks)
        if not stats_were_on and adapter.level == "full":
            known.stats_off = True
            if adapter.timed and adapter.tap == "manager":
                known.end = _turn_stats_off(engine)
    except BaseException:
        forget(key)
        raise
    weakref.finalize(engine, forget, key).atexit = False
    return True


def step_down(engine: Any, every: int, functions_of: Callable[[Adapter], StepFunctions]) -> bool:
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
    adapter = _light_adapter(engine)
    if adapter is None:
        return False
    core_of(engine)  # raises before anything is changed
    _go_on(engine, adapter, functions_of(adapter), every)
    return True


def count_outputs(
    engine: Any, exact: bool, functions_of: Callable[[Adapter, Counters], StepFunctions]
) -> StepFunctions | None:
    """Record an engine by its outputs from now on, because its own step makes no iteration stats.

    Args:
        engine: an engine that is recorded.
        exact: whether what waits to be published is counted after all. If not, it is published as it is.
        functions_of: returns the functions that record with an adapter of level light.

    Returns:
        These functions, or None if that cannot be done with this engine.

    Raises:
        LookupError: vLLM's classes are not where the adapter says; nothing has been changed.
    """
    adapter, known = _light_adapter(engine), registry.engines.get(id(engine))
    if adapter is None or known is None or known.functions is None or known.counts is None:
        return None
    core_of(engine)
    if not exact:
        known.functions.flush()
    left = known.functions.left()
    functions = functions_of(adapter, left.counters)
    for _ in range(left.added):
        functions.add()
    for request in left.aborted:
        functions.abort(request)
    _go_on(engine, adapter._replace(tap="own_step"), functions)
    return functions


def _light_adapter(engine: Any) -> Adapter | None:
    """The tables by which an engine that is recorded in full can be recorded at level light."""
    full = registry.adapter_of(engine)
    if full is None or id(engine) not in registry.engines:
        return None
    adapter, _, missing = choose(full.engine, "light")
    return None if missing or adapter.level != "light" else adapter


def _go_on(engine: Any, adapter: Adapter, functions: StepFunctions, every: int = 1) -> None:
    """Let other functions record an engine from its next outputs on."""
    known, full = registry.engines[id(engine)], registry.adapter_of(engine)
    known.remove_tap()
    if known.stats_off and full is not None:
        for each in (engine, *copies_of(engine)):
            make_no_stats(each, full.holder)
    _put_in(engine, adapter, functions, {FROM_CORE: True}, _free_blocks(engine, adapter), every)
    registry.steps[id(engine)] = functions.publish


def fit_before_next_request(engine: Any) -> None:
    """An engine that is recorded may get another output processor, as a subclass may do at the end of its ``__init__``.
    Before the next request is added, what records the engine is put into that one."""

    alive = weakref.ref(engine)  # what is kept in the engine must not keep it alive

    def fit_and_add_request(*args: Any, **kwargs: Any) -> Any:
        overlay.take_out()
        engine: Any = alive()
        known = registry.engines.get(id(engine))
        if known is not None:
            try:
                _look_at_parts(engine, known)
            except USERS:
                raise
            except BaseException as error:
                where = "recording an engine with another output processor"
                registry.give_up(known, id(engine), where, error)
        return engine.add_request(*args, **kwargs)

    overlay = Overlay(engine, "add_request", fit_and_add_request)
    known = registry.engines[id(engine)]
    known.remove_tap = both(overlay.take_out, known.remove_tap)


def _look_at_parts(engine: Any, known: RecordedEngine) -> None:
    """Put what records an engine into other parts, if it has got others since."""
    if known.functions is None or known.adapter is None:
        return
    client, processor = getattr(engine, "engine_core", None), getattr(engine, "output_processor", None)
    # its requests have no clocks: vLLM's step would fail on the stats that kvhook had turned on
    quiet = known.stats_off and known.adapter.level == "full" and not getattr(processor, "log_stats", True)
    if quiet or client is not known.client or processor is not known.processor:
        _fit_again(engine, known, known.functions, quiet)


def _fit_again(engine: Any, known: RecordedEngine, functions: StepFunctions, quiet: bool) -> None:
    """Take what records an engine out of the parts that it had, and put it into those that it has now."""
    adapter, owner = known.adapter, registry.owner
    if adapter is None or owner is None:
        return
    if quiet:
        known.counts = _output_counts(engine, _counting_failed(known, id(engine)))
        owner.count_outputs(engine, True, True)
        return
    known.remove_tap()
    facts = {"stats_on": not known.stats_off, FROM_CORE: True}
    _put_in(engine, adapter, functions, facts, _free_blocks(engine, adapter))


def _counting_failed(known: RecordedEngine, key: int) -> Callable[[BaseException], None]:
    """What ends the recording of an engine in which counting has failed."""

    def failed(error: BaseException) -> None:
        registry.give_up(known, key, "counting what a step gave", error)

    return failed


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


def _put_in(
    engine: Any,
    adapter: Adapter,
    functions: StepFunctions | EventLoopRecorder,
    facts: Mapping[str, Any],
    blocks: FreeBlocks | None,
    every: int = 1,
) -> None:
    """Put into an engine everything that records it, and remember how that is taken out again."""
    key, known = id(engine), registry.engines[id(engine)]
    first: FirstOutputs | None = None
    known.flush = functions.flush
    known.thread = threading.get_ident()

    failed = _counting_failed(known, key)
    if not isinstance(functions, EventLoopRecorder):
        known.functions = functions
        if adapter.level == "full" and has_core_output(engine, adapter):
            known.counts = _output_counts(engine, failed)
            first = FirstOutputs(engine, functions, _ask_owner(engine), known.counts, lambda: settled())
            known.flush = first.flush

    came = functions.outputs_came if isinstance(functions, EventLoopRecorder) else do_nothing
    num_free = blocks.take if blocks is not None else no_blocks
    latest = Latest()
    tap = Tap(
        engine, adapter, functions, registry.records, failed, every, facts, num_free, came, first, known.counts, latest
    )

    alive = weakref.ref(engine)

    def add() -> None:
        known.thread = threading.get_ident()
        registry.requests_seen += 1
        functions.add()
        latest.added()
        _look_at_parts(alive(), known)

    def abort(request: AbortedRequest) -> None:
        known.thread = threading.get_ident()
        functions.abort(request)
        latest.aborted()

    methods = request_methods(engine, adapter, add, abort, failed, note_of(engine))
    if blocks is not None:
        methods.append(blocks.method())
    before = set(registry.records)
    remove_stats = TAPS[adapter.tap](tap)
    known.record_keys = tuple(registry.records.keys() - before)
    known.adapter = adapter
    known.client, known.processor = getattr(engine, "engine_core", None), getattr(engine, "output_processor", None)
    note_part(engine)
    settled = _publish_by(first, functions, key)
    known.remove_tap = both(remove_stats, replace(*methods))


def _output_counts(engine: Any, failed: Callable[[BaseException], None]) -> OutputCounts | None:
    """What counts an engine's outputs; None where they cannot be counted."""
    try:
        core = core_of(engine)
    except LookupError:
        return None
    if not hasattr(core.processor, "request_states"):
        return None
    return OutputCounts(core.processor, core.counter, failed)


def _publish_by(
    first: FirstOutputs | None, functions: StepFunctions | EventLoopRecorder, key: int
) -> Callable[[], None]:
    """Let steps be published by what looks at the first outputs; returns what ends that."""
    if first is None or not first.watching or isinstance(functions, EventLoopRecorder):
        return do_nothing
    by_first, by_itself = first.publish, functions.publish
    registry.steps[key] = by_first

    def settled() -> None:
        if registry.steps.get(key) is by_first:
            registry.steps[key] = by_itself

    return settled


def _ask_owner(engine: Any) -> CountOutputs:
    """What changes an engine to being counted, see `Owner.count_outputs`."""
    alive = weakref.ref(engine)  # what is kept in the engine must not keep it alive

    def change(exact: bool, stepped: bool) -> StepFunctions | None:
        engine, owner = alive(), registry.owner
        return None if engine is None or owner is None else owner.count_outputs(engine, exact, stepped)

    return change


def _free_blocks(engine: Any, adapter: Adapter) -> FreeBlocks | None:
    """The engine's free blocks, where its scheduler is in this process."""

    def failed(error: BaseException) -> None:
        registry.fault(_FREE_BLOCKS, error, "the peak inside a step is not known")

    try:
        return FreeBlocks(engine, adapter, failed, lambda: registry.is_off(_FREE_BLOCKS))
    except LookupError:
        return None


def _turn_stats_off(engine: Any) -> Callable[[], None]:
    """What leaves an engine without stats, as its user wanted it, and its copies.

    Not for engines on an event loop: their output handler keeps making stats whatever is said later, and needs the
    clocks of new requests for that.
    """
    alive = weakref.ref(engine)

    def turn_off() -> None:
        engine = alive()
        if engine is not None:
            for each in (engine, *copies_of(engine)):
                make_no_stats(each, "")

    return turn_off


def _event_loop_recorder(engine: Any, adapter: Adapter, facts: dict[str, Any]) -> EventLoopRecorder:
    """The recorder of an engine without a ``step``."""
    alive = weakref.ref(engine)  # what is kept in the engine must not keep it alive

    def open_rank(rank: int) -> StepFunctions | None:
        engine, owner = alive(), registry.owner
        if engine is None or owner is None:
            return None
        return owner.open_engine(engine, adapter, facts | {"engine_index": rank})

    def not_counted() -> None:
        engine, owner = alive(), registry.owner
        if engine is not None and owner is not None:
            owner.not_counted(engine)

    return EventLoopRecorder(open_rank, registry.fault, not_counted)
