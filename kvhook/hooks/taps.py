"""How kvhook gets at the stats of one engine that has been built. `Adapter.tap` names one of `TAPS`.

A tap puts ``record`` where the stats of this engine pass, and returns a function that takes it out again. It changes
objects of that engine only; classes are patched in `kvhook.hooks.patching`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvhook import _step
from kvhook.adapters.light import Counter, Counts, make_counter
from kvhook.adapters.publisher import MEASURE_EVERY
from kvhook.adapters.table import Adapter, lookup, release, vllm_version
from kvhook.faults import USERS
from kvhook.hooks.own_step import size_of
from kvhook.hooks.quiet import OnlyLogger, QuietManager, do_nothing
from kvhook.hooks.tap import Tap, Undo, no_blocks, replace

clock = time.monotonic_ns


def tap_manager(tap: Tap) -> Undo:
    """The engine gives its stats to a logger or manager: it is kvhook's own, or its ``record`` is patched."""
    manager = getattr(tap.engine, tap.adapter.holder)
    if manager is None:
        raise LookupError(f"it has no {tap.adapter.holder}")
    from_core = has_core_output(tap.engine, tap.adapter) and (tap.first is not None or not tap.adapter.timed)
    take_out = take_from_core(tap) if from_core else do_nothing
    if isinstance(manager, QuietManager):
        manager.hand_over_to(tap.record)
        remove_record: Undo = functools.partial(manager.hand_over_to, do_nothing)
    else:
        remove_record = _register(tap, id(manager))

    def undo() -> None:
        take_out()
        remove_record()

    return undo


def has_core_output(engine: Any, adapter: Adapter) -> bool:
    """Whether the engine core's outputs can be seen as they arrive. If not, what vLLM's loggers are given must do."""
    return bool(adapter.core_output) and hasattr(getattr(engine, "engine_core", None), adapter.core_output)


def take_from_core(tap: Tap) -> Undo:
    """Take the scheduler's stats where the engine core's outputs arrive.

    Their counters are deltas, reset when they are made. In many releases the front end passes them to its loggers only
    if the step had outputs: what it drops is lost to vLLM's own metrics (see the tests' README).
    """
    client, take, failed = tap.engine.engine_core, tap.functions.take, tap.failed
    get_output = getattr(client, tap.adapter.core_output)
    first = tap.first
    if first is None:
        return replace((client, tap.adapter.core_output, _announce_outputs(get_output, tap)))
    num_free = tap.num_free_blocks
    fill_in, not_logged = _empty_stats(tap), tap.adapter.tap == "manager"

    def rest(outputs: Any, stats: Any, free: int, uncounted: bool) -> None:
        """What happens seldom: an engine's first steps, and outputs without stats."""
        if uncounted:
            first.take(outputs, free)
        if stats is None and fill_in is not None:
            outputs.scheduler_stats = fill_in()
        elif stats is None and outputs.outputs and not_logged:
            first.ended(outputs)

    def get_output_and_take(*args: Any, **kwargs: Any) -> Any:
        outputs = get_output(*args, **kwargs)
        try:
            stats, free = outputs.scheduler_stats, num_free()
            rank = getattr(outputs, "engine_index", 0)
            uncounted = first.watching or take(stats, None, rank, 0, free, len(outputs.outputs))
            if uncounted or stats is None:
                rest(outputs, stats, free, uncounted)
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        return outputs

    method: Callable[..., Any] = get_output_and_take
    if _step.native is not None:
        method = _step.native.OutputTap(get_output, take, failed, _unless_no_blocks(num_free), first=first, rest=rest)
    first.begin()
    take_out = replace((client, tap.adapter.core_output, method))

    def undo() -> None:
        first.end()
        take_out()

    return undo


def _unless_no_blocks(num_free: Callable[[], int]) -> Callable[[], int] | None:
    return None if num_free is no_blocks else num_free


def _announce_outputs(get_output: Callable[..., Any], tap: Tap) -> Callable[..., Any]:
    outputs_came, failed = tap.outputs_came, tap.failed

    async def get_output_async_and_announce(*args: Any, **kwargs: Any) -> Any:
        outputs = await get_output(*args, **kwargs)
        try:
            outputs_came(outputs)
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        return outputs

    return get_output_async_and_announce


def _empty_stats(tap: Tap) -> Callable[[], Any] | None:
    """What stands in for stats that did not come, in releases whose ``step`` asserts that they did.

    It asserts so only while stats are on, which the user had not asked for: without kvhook the step would not fail.
    """
    until = release(tap.adapter.asserts_stats_until)
    if not until or tap.facts.get("stats_on") or release(vllm_version()) >= until:
        return None
    make: Callable[[], Any] = lookup(next(s.path for s in tap.adapter.sources if s.argument == "scheduler_stats"))
    return make


def tap_engine(tap: Tap) -> Undo:
    """V0: the engine makes the stats itself, in a method that is patched."""
    return _register(tap, id(tap.engine))


def _register(tap: Tap, key: int) -> Undo:
    records = tap.records
    records[key] = tap.record

    def undo() -> None:
        records.pop(key, None)

    return undo


def tap_lists(tap: Tap) -> Undo:
    """AsyncLLM up to 0.9: a list of loggers for each rank, up to 0.8.2 one list. One more logger goes into each."""
    loggers = getattr(tap.engine, tap.adapter.holder)
    lists = loggers if loggers and isinstance(loggers[0], list) else [loggers]
    ours = [(each, OnlyLogger(functools.partial(tap.record, engine_idx=rank))) for rank, each in enumerate(lists)]
    for each, logger in ours:
        each.append(logger)

    def undo() -> None:
        for each, logger in ours:
            if logger in each:
                each.remove(logger)

    return undo


def tap_outputs(tap: Tap) -> Undo:
    """LLMEngine of 0.8 ignores the stats that come with the engine core's outputs, and makes no IterationStats.

    Its output processor fills IterationStats in if it is given some, as AsyncLLM does. The tap gives it some, and takes
    both kinds of stats from there."""
    client, processor, record, failed = tap.engine.engine_core, tap.engine.output_processor, tap.record, tap.failed
    get_output, process_outputs = client.get_output, processor.process_outputs
    make_stats = lookup(next(s.path for s in tap.adapter.sources if s.argument == "iteration_stats"))
    latest: Any = None

    def get_output_and_keep(*args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        latest = outputs = get_output(*args, **kwargs)
        return outputs

    def process_outputs_with_stats(engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        outputs, latest = latest, None
        if outputs is None or args or kwargs:
            return process_outputs(engine_core_outputs, *args, **kwargs)
        stats, when = None, getattr(outputs, "timestamp", None)
        try:
            stats = make_stats() if engine_core_outputs else None
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        result = process_outputs(engine_core_outputs, engine_core_timestamp=when, iteration_stats=stats)
        try:
            record(None, stats)
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        return result

    # with this the processor keeps the clocks of new requests; there are no requests yet
    log_stats, processor.log_stats = processor.log_stats, True
    take_out = replace(
        (client, "get_output", get_output_and_keep), (processor, "process_outputs", process_outputs_with_stats)
    )
    take_out_first = take_from_core(tap)

    def undo() -> None:
        take_out_first()
        take_out()
        processor.log_stats = log_stats

    return undo


class Core(NamedTuple):
    """What `tap_core` needs of an engine."""

    client: Any
    get_output: Callable[..., Any]
    processor: Any
    process_outputs: Callable[..., Any]
    counter: Counter


def core_of(engine: Any, get_output: str = "get_output") -> Core:
    """What `tap_core` needs of an engine; changes nothing in it.

    Raises:
        LookupError: this vLLM has not got all of it.
    """
    try:
        client, processor = engine.engine_core, engine.output_processor
        return Core(client, getattr(client, get_output), processor, processor.process_outputs, make_counter())
    except AttributeError as error:
        raise LookupError(str(error)) from None


def tap_core(tap: Tap) -> Undo:
    """Level light: take the scheduler's stats from the engine core's outputs, and count the outputs.

    The front end makes no IterationStats, unless the user turned vLLM's stats on.
    """
    if not tap.adapter.timed:
        return _tap_core_on_event_loop(tap)
    core = core_of(tap.engine)
    get_output, processor, count = core.get_output, core.processor, core.counter
    take, failed, every, num_free = tap.functions.take, tap.failed, tap.every, tap.num_free_blocks
    steps = spent = counting = 0
    latest: Counts | None = None

    def get_output_and_count(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps, spent, counting, latest
        outputs = get_output(*args, **kwargs)
        try:
            # as often as the publisher measures itself
            start = 0 if steps % MEASURE_EVERY else clock()
            counts = None
            if outputs.outputs and not steps % every:
                latest = counts = Counts()
                # requests that are gone at the end of the step have finished; those that end with a stop string are
                # known to the front end only
                counts.states = states = processor.request_states
                counts.before = len(states)
                count(outputs.outputs, states, counts)
                if start:
                    counting, start = clock() - start, clock()
            steps += 1
            take(outputs.scheduler_stats, counts, getattr(outputs, "engine_index", 0), spent, num_free())
            if start:
                # the time for counting is spread over the steps in which nothing is counted
                spent = counting // every + clock() - start
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        return outputs

    if _step.native is None:
        tap.latest.read = lambda: latest
        return replace((core.client, "get_output", get_output_and_count))
    method = _step.native.OutputTap(
        get_output,
        take,
        failed,
        _unless_no_blocks(num_free),
        count=count,
        make_counts=Counts,
        processor=processor,
        clock=None if clock is time.monotonic_ns else clock,
        every=every,
        measure_every=MEASURE_EVERY,
    )
    tap.latest.read = lambda: method.counts
    return replace((core.client, "get_output", method))


def tap_own_step(tap: Tap) -> Undo:
    """Count the outputs of an engine whose ``step`` is not vLLM's, and may not even process them."""
    core, counts = core_of(tap.engine), tap.counts
    if counts is None:
        raise LookupError("its outputs cannot be counted")
    get_output, look, take, failed, num_free = (
        core.get_output,
        counts.look,
        tap.functions.take,
        tap.failed,
        tap.num_free_blocks,
    )

    def get_output_and_count(*args: Any, **kwargs: Any) -> Any:
        outputs = get_output(*args, **kwargs)
        try:
            take(outputs.scheduler_stats, look(outputs), getattr(outputs, "engine_index", 0), 0, num_free())
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        return outputs

    return replace(
        (core.client, "get_output", get_output_and_count),
        (core.processor, "process_outputs", counts.around(core.process_outputs)),
    )


def _tap_core_on_event_loop(tap: Tap) -> Undo:
    """The same for AsyncLLM, whose output handler processes the outputs of a step in several parts. A step is over when
    the handler asks for the next outputs."""
    client, get_output_async, processor, process_outputs, count = core_of(tap.engine, "get_output_async")
    take, failed = tap.functions.take, tap.failed
    latest: Any = None
    counts: Counts | None = None
    spent = 0

    async def hand_over_and_get_output(*args: Any, **kwargs: Any) -> Any:
        nonlocal latest, counts, spent
        outputs, latest = latest, None
        try:
            if outputs is not None:
                take(outputs.scheduler_stats, counts, getattr(outputs, "engine_index", 0), spent)
        except USERS:
            raise
        except BaseException as error:
            failed(error)
        counts, spent = None, 0
        latest = outputs = await get_output_async(*args, **kwargs)
        return outputs

    def count_and_process_outputs(engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal counts, spent
        before = 0
        start = clock()
        try:
            if len(engine_core_outputs):  # older vLLM makes its slices with numpy
                counts = counts or Counts()
                count(engine_core_outputs, processor.request_states, counts)
                before = len(processor.request_states)
        except USERS:
            raise
        except BaseException as error:
            counts = None
            failed(error)
        spent += clock() - start
        result = process_outputs(engine_core_outputs, *args, **kwargs)
        if before and counts is not None:
            counts.num_finished_reqs += before - size_of(processor, failed)
        return result

    return replace(
        (client, "get_output_async", hand_over_and_get_output),
        (processor, "process_outputs", count_and_process_outputs),
    )


#: `Adapter.tap` -> puts `record` where the stats of this engine pass; returns a function that takes it out again.
TAPS: dict[str, Callable[[Tap], Undo]] = {
    "manager": tap_manager,
    "engine": tap_engine,
    "lists": tap_lists,
    "outputs": tap_outputs,
    "core": tap_core,
    "own_step": tap_own_step,
}
