"""Requests as the front end sees them: added, aborted, and which sample of its prompt each one is.

Methods of the engine's own output processor (V1) or of the engine (V0) are replaced, and put back when the engine is
no longer recorded. vLLM's stats say nothing of an aborted request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvhook.adapters.requests import NOTED, AbortedRequest, aborted_v0, aborted_v1, request_id_of, sample_index_of
from kvhook.adapters.table import Adapter
from kvhook.faults import contained
from kvhook.hooks.own_step import size_of

_NOTED = tuple(f"kvhook_{name}" for name in NOTED)

Replaced = list[tuple[Any, str, Callable[..., Any]]]
Add = Callable[[], None]
Abort = Callable[[AbortedRequest], None]
Failed = Callable[[BaseException], None]
#: is given vLLM's dictionary of requests when one has been added to it; never raises
Note = Callable[[Any], None]


def sees_requests(engine: Any, adapter: Adapter) -> bool:
    """Whether requests can be seen when they are added and when they are aborted."""
    owner, add, abort = _places(engine, adapter)
    needed = (add, abort) if adapter.family == "v0" else (add, abort, "request_states")
    return owner is not None and all(hasattr(owner, name) for name in needed)


def request_methods(engine: Any, adapter: Adapter, add: Add, abort: Abort, failed: Failed, note: Note) -> Replaced:
    """The methods to be put into the engine: object, name, function. Empty where requests cannot be seen.

    Args:
        engine: the engine.
        adapter: the tables that fit it.
        add: is called when a request was added.
        abort: is called with each request that was aborted.
        failed: is called with an error of kvhook's.
        note: notes what is known of a request that was added (V1).
    """
    if not sees_requests(engine, adapter):
        return []
    if adapter.family == "v0":
        return _of_v0(engine, add, abort, failed)
    processor = engine.output_processor
    replaced: Replaced = [
        (processor, "add_request", _count_added(processor, add, failed, note)),
        (processor, "abort_requests", _abort_v1(processor, abort, failed)),
    ]
    if adapter.level == "full" and hasattr(processor, "_update_stats_from_finished"):
        replaced.append((processor, "_update_stats_from_finished", _mark_finished(processor, failed)))
    return replaced


def _places(engine: Any, adapter: Adapter) -> tuple[Any, str, str]:
    if adapter.family == "v0":
        return engine, "_add_processed_request", "abort_request"
    return getattr(engine, "output_processor", None), "add_request", "abort_requests"


def _count_added(processor: Any, add: Add, failed: Failed, note: Note) -> Callable[..., Any]:
    add_request, states = processor.add_request, processor.request_states

    def add_request_and_count(*args: Any, **kwargs: Any) -> Any:
        before = size_of(processor, failed)
        result = add_request(*args, **kwargs)
        with contained(failed):
            # a further piece of a streamed prompt is no new request
            if len(states) > before:
                add()
                note(states)
        return result

    return add_request_and_count


def _abort_v1(processor: Any, abort: Abort, failed: Failed) -> Callable[..., Any]:
    abort_requests = processor.abort_requests
    depth = 0

    def abort_requests_and_note(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        before: dict[str, Any] = {}
        with contained(failed):
            if not depth:  # vLLM calls itself for the samples of a prompt
                before = dict(processor.request_states)
        depth += 1
        try:
            return abort_requests(*args, **kwargs)
        finally:
            depth -= 1
            with contained(failed):
                gone = before.keys() - processor.request_states.keys()
                for request_id in [each for each in before if each in gone]:
                    abort(aborted_v1(before[request_id]))

    return abort_requests_and_note


def _mark_finished(processor: Any, failed: Failed) -> Callable[..., Any]:
    update = processor._update_stats_from_finished  # noqa: SLF001 (vLLM's: no public method is given the state)

    def update_and_mark(req_state: Any, finish_reason: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(req_state, finish_reason, iteration_stats, *args, **kwargs)
        if iteration_stats is not None:
            with contained(failed):
                finished = iteration_stats.finished_requests[-1]
                finished.kvhook_sample_index = sample_index_of(req_state)
                finished.kvhook_request_id = request_id_of(req_state)
                for name in _NOTED:
                    setattr(finished, name, getattr(req_state, name, -1))
        return result

    return update_and_mark


def _of_v0(engine: Any, add: Add, abort: Abort, failed: Failed) -> Replaced:
    add_request, abort_request = engine._add_processed_request, engine.abort_request  # noqa: SLF001 (vLLM's)

    def add_request_and_count(*args: Any, **kwargs: Any) -> Any:
        result = add_request(*args, **kwargs)
        with contained(failed):
            add()
        return result

    def abort_request_and_note(*args: Any, **kwargs: Any) -> Any:
        before: dict[int, Any] = {}
        with contained(failed):
            before = _groups(engine)
        result = abort_request(*args, **kwargs)
        with contained(failed):
            gone = before.keys() - _groups(engine).keys()
            for key in [each for each in before if each in gone]:
                abort(aborted_v0(before[key]))
        return result

    return [
        (engine, "_add_processed_request", add_request_and_count),
        (engine, "abort_request", abort_request_and_note),
    ]


def _groups(engine: Any) -> dict[int, Any]:
    """V0's requests that wait, run or are swapped out, by their id()."""
    schedulers = engine.scheduler if isinstance(engine.scheduler, (list, tuple)) else [engine.scheduler]
    return {id(g): g for s in schedulers for queue in (s.waiting, s.running, s.swapped) for g in queue}
