"""Engines as they are inside: a client that brings what the engine core sends, and an output processor that takes it.

Their classes, fields and signatures are those of the release, and what a test lets the core send is made of its own
``EngineCoreOutput``, ``EngineCoreEvent``, ``SchedulerStats``... Written after a reading of vLLM's code:

    animate(facts, modules)
    engine = make_engine(...)
    add(engine, "a", Prompt(computed=14, cached=16))
    engine.engine_core.plan += [Sent((Said("a"), Said("b", tokens=3)), running=2)]
    engine.step()                                # AsyncLLM: asyncio.run(engine.handle_outputs())
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.contracts import behaviour
from tests.contracts.behaviour import ASYNC, CLIENT, ENGINE, PROCESSOR
from tests.contracts.extracting.stored import version_key
from tests.contracts.release_facts import ReleaseFacts

CORE = "vllm.v1.engine"
STATS = "vllm.v1.metrics.stats"
TIMESTAMP = 1.0

#: what an engine's ``__init__`` does with its arguments, by name
Start = Callable[[dict[str, Any]], None]


class Prompt(NamedTuple):
    """The prompt of a request: where its tokens came from, ``external`` being a part of the ``cached`` ones.

    The front end ends the request after ``stop_after`` tokens, as at a stop string, which the core does not know.
    """

    computed: int
    cached: int = 0
    external: int = 0
    stop_after: int = 0


class Said(NamedTuple):
    """What the core says of a request in a step: tokens, and how often it had been preempted before them. It may have
    aborted the request itself."""

    request: str
    tokens: int = 1
    preempted: int = 0
    finished: bool = False
    aborted: bool = False


class Sent(NamedTuple):
    """What the core sends after a step."""

    outputs: tuple[Said, ...] = ()
    #: requests that run; None if it sends no scheduler's stats
    running: int | None = 0
    rank: int = 0
    #: tokens looked up in the prefix cache since the last stats (before 0.9: blocks), and found
    looked_up: int = 0
    found: int = 0


class NoMore(Exception):
    """The script is at its end: there a real core would not answer."""


def animate(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> None:
    """Give the stand-ins of a release this behaviour, and V0's `behaviour.animate`'s."""
    behaviour.animate(facts, modules)
    if version_key(facts.release) >= version_key("0.8.0"):  # before, V1 was not finished
        starts = behaviour._sync(facts, modules), behaviour._on_event_loop(facts, modules)
        _client(facts, modules)
        _processor(facts, modules)
        _engines(facts, modules, *starts)


def _client(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> None:
    cls: Any = vars(modules[CLIENT])["EngineCoreClient"]

    class Client(cls):  # type: ignore[misc]
        """The engine core and the way to it."""

        def __init__(self, log_stats: bool) -> None:
            self.log_stats = log_stats
            self.plan: list[Sent] = []
            self.prompts: dict[str, Prompt] = {}
            self.begun: set[str] = set()
            self.aborted: list[str] = []

        def get_output(self) -> Any:
            return self._next()

        async def get_output_async(self) -> Any:
            await asyncio.sleep(0)
            return self._next()

        def _next(self) -> Any:
            if not self.plan:
                raise NoMore
            return _message(self, self.plan.pop(0))

        def abort_requests(self, requests: list[str]) -> None:
            self.aborted += requests

    for name in ("make_client", "make_async_mp_client"):
        if name in facts.modules[CLIENT].classes["EngineCoreClient"].methods:
            behaviour._put(facts, cls, name, lambda given: Client(given["log_stats"]))


def _message(client: Any, sent: Sent) -> Any:
    """The release's own EngineCoreOutputs."""
    module, stats = (vars(sys.modules[name]) for name in (CORE, STATS))
    outputs = []
    for said in sent.outputs:
        prompt = client.prompts[said.request]
        fields = module["EngineCoreOutput"].__struct_fields__
        more: dict[str, Any] = {}
        if "prefill_stats" in fields and said.request not in client.begun:
            more["prefill_stats"] = stats["PrefillStats"](
                num_prompt_tokens=prompt.computed + prompt.cached,
                num_computed_tokens=prompt.computed,
                num_cached_tokens=prompt.cached,
                num_local_cached_tokens=prompt.cached - prompt.external,
                num_external_cached_tokens=prompt.external,
            )
        # these come with each output of the request
        whole = {"num_cached_tokens": prompt.cached, "num_external_computed_tokens": prompt.external}
        more |= {name: value for name, value in whole.items() if name in fields}
        if client.log_stats:
            kinds = module["EngineCoreEventType"]
            first = [] if said.request in client.begun else [kinds.QUEUED, kinds.SCHEDULED]
            events = first + [kinds.PREEMPTED, kinds.SCHEDULED] * said.preempted
            more["events"] = [module["EngineCoreEvent"](type=kind, timestamp=TIMESTAMP) for kind in events] or None
        client.begun.add(said.request)
        reasons = module["FinishReason"]
        reason = reasons.ABORT if said.aborted else reasons.LENGTH if said.finished else None
        outputs.append(
            module["EngineCoreOutput"](
                request_id=said.request, new_token_ids=[7] * said.tokens, finish_reason=reason, **more
            )
        )
    rank = {"engine_index": sent.rank} if "engine_index" in module["EngineCoreOutputs"].__struct_fields__ else {}
    sched = None
    if client.log_stats and sent.running is not None:
        sched = stats["SchedulerStats"](num_running_reqs=sent.running)
        sched.prefix_cache_stats.queries, sched.prefix_cache_stats.hits = sent.looked_up, sent.found
    return module["EngineCoreOutputs"](outputs=outputs, scheduler_stats=sched, timestamp=TIMESTAMP, **rank)


class Processed(NamedTuple):
    """What the output processor gives."""

    request_outputs: list[str]
    reqs_to_abort: list[str]


def _processor(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> None:
    cls: Any = vars(modules[PROCESSOR])["OutputProcessor"]

    def start(processor: Any, log_stats: bool) -> None:
        processor.log_stats, processor.request_states, processor.given = log_stats, {}, []
        processor.parent_requests = {}

    def add_request(given: dict[str, Any]) -> None:
        processor, request, parent = given["self"], given["request"], given["parent_req"]
        state = vars(sys.modules[PROCESSOR])["RequestState"]()
        state.request_id, state.parent_req, state.request_index = request.request_id, parent, given["request_index"]
        if has_external_ids(processor):
            state.external_req_id = request.external_req_id
        prompt = request.prompt
        state.prompt_len, state.is_prefilling = prompt.computed + prompt.cached, True
        state.prompt, state.generated, state.stop_after = prompt, 0, prompt.stop_after
        state.stats = vars(sys.modules[STATS])["RequestStateStats"]() if processor.log_stats else None
        processor.request_states[request.request_id] = state
        if parent is not None:
            processor.parent_requests[parent.request_id] = parent

    def abort_requests(given: dict[str, Any]) -> list[str]:
        processor, gone = given["self"], []
        for name in list(given["request_ids"]):
            of_that = [name]
            if not given.get("internal", True):  # the user's ids, from 0.14
                of_that = [n for n, state in processor.request_states.items() if state.external_req_id == name]
            for request_id in of_that:
                if processor.request_states.pop(request_id, None) is not None:
                    gone.append(request_id)
                elif request_id in processor.parent_requests:
                    children = list(processor.parent_requests.pop(request_id).child_requests)
                    internal = {"internal": True} if "internal" in given else {}
                    gone += processor.abort_requests(children, **internal) or []
        return gone

    def process_outputs(given: dict[str, Any]) -> Processed:
        processor, stats = given["self"], given["iteration_stats"]
        processor.given.append(stats)
        done = Processed([], [])
        for output in given["engine_core_outputs"]:
            state = processor.request_states.get(output.request_id)
            if state is None:
                continue
            processor._update_stats_from_output(state, output, given["engine_core_timestamp"], stats)
            state.is_prefilling = False
            state.generated += len(output.new_token_ids)
            if state.stats is not None:
                state.stats.num_generation_tokens += len(output.new_token_ids)
            stopped = state.stop_after and state.generated >= state.stop_after
            done.request_outputs.append(output.request_id)
            if output.finish_reason is not None or stopped:
                del processor.request_states[output.request_id]
                if output.finish_reason is None:
                    done.reqs_to_abort.append(output.request_id)
                processor._update_stats_from_finished(state, output.finish_reason, stats)
        return done

    def from_output(given: dict[str, Any]) -> None:
        stats, output, state = given["iteration_stats"], given["engine_core_output"], given["req_state"]
        if stats is None:
            return
        assert given["engine_core_timestamp"] == TIMESTAMP
        stats.num_generation_tokens += len(output.new_token_ids)
        _ttft(stats, output, state) if state.is_prefilling else _itl(stats)
        kinds = vars(sys.modules[CORE])["EngineCoreEventType"]
        stats.num_preempted_reqs += sum(event.type == kinds.PREEMPTED for event in output.events or ())

    def from_finished(given: dict[str, Any]) -> None:
        if given["iteration_stats"] is not None:
            reason = given["finish_reason"]
            kinds = vars(sys.modules[CORE])["FinishReason"]
            one = vars(sys.modules[STATS])["FinishedRequestStats"]()
            one.finish_reason = kinds.STOP if reason is None else reason
            one.num_generation_tokens = given["req_state"].generated
            if hasattr(one, "request_id"):  # from 0.20: the user's
                one.request_id = given["req_state"].external_req_id
            given["iteration_stats"].finished_requests.append(one)

    cls.__init__ = start
    behaviour._put(facts, cls, "process_outputs", process_outputs)
    behaviour._put(facts, cls, "add_request", add_request)
    behaviour._put(facts, cls, "abort_requests", abort_requests)
    behaviour._put(facts, cls, "_update_stats_from_output", from_output)
    behaviour._put(facts, cls, "_update_stats_from_finished", from_finished)


def has_external_ids(processor: Any) -> bool:
    """Whether requests have ids of their own inside this vLLM, beside the user's: from 0.14."""
    return "internal" in inspect.signature(type(processor).abort_requests).parameters


def _ttft(stats: Any, output: Any, state: Any) -> None:
    stats.time_to_first_tokens_iter.append(0.1)
    if not hasattr(stats, "prompt_token_stats"):
        stats.num_prompt_tokens += state.prompt_len
        return
    prompt = state.prompt
    stats.prompt_token_stats.total += prompt.computed + prompt.cached
    stats.prompt_token_stats.computed += prompt.computed
    stats.prompt_token_stats.cached_tokens += prompt.cached
    stats.prompt_token_stats.external_kv_transfer += prompt.external


def _itl(stats: Any) -> None:
    name = "inter_token_latencies_iter"
    getattr(stats, name if hasattr(stats, name) else "time_per_output_tokens_iter").append(0.01)


def _engines(
    facts: ReleaseFacts, modules: dict[str, types.ModuleType], start_sync: Start, start_on_loop: Start
) -> None:
    sync, on_loop = vars(modules[ENGINE])["LLMEngine"], vars(modules[ASYNC])["AsyncLLM"]
    client: Any = vars(modules[CLIENT])["EngineCoreClient"]
    processor: Any = vars(modules[PROCESSOR])["OutputProcessor"]
    holder = facts.modules[ENGINE].classes["LLMEngine"].calls.stat_logger_attribute

    def build_sync(given: dict[str, Any]) -> None:
        engine = given["self"]
        if holder is None:  # 0.8, whatever the user says
            engine.vllm_config, engine.log_stats = given["vllm_config"], False
        else:
            start_sync(given)
        engine.output_processor = processor(engine.log_stats)
        engine.engine_core = client.make_client(
            multiprocess_mode=False,
            asyncio_mode=False,
            vllm_config=given["vllm_config"],
            executor_class=None,
            log_stats=engine.log_stats,
        )

    key = version_key(facts.release)
    #: for which steps LLMEngine hands stats over to its loggers
    asserts = version_key("0.9.0") <= key <= version_key("0.11.0")
    drops = version_key("0.17.0") <= key <= version_key("0.27.1")
    none_without_outputs = key >= version_key("0.28.0")

    def step(given: dict[str, Any]) -> list[str]:
        engine = given["self"]
        outputs = engine.engine_core.get_output()
        if holder is None:
            done = engine.output_processor.process_outputs(outputs.outputs)
        else:
            made = engine.log_stats and (outputs.outputs or not none_without_outputs)
            stats = vars(modules[STATS])["IterationStats"]() if made else None
            done = engine.output_processor.process_outputs(
                outputs.outputs, engine_core_timestamp=outputs.timestamp, iteration_stats=stats
            )
        engine.engine_core.abort_requests(done.reqs_to_abort)
        logger = getattr(engine, holder) if holder else None
        if logger is not None and asserts:
            assert outputs.scheduler_stats is not None
        if logger is not None and outputs.scheduler_stats is not None and (outputs.outputs or not drops):
            logger.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=stats)
        return done.request_outputs

    def build_on_loop(given: dict[str, Any]) -> None:
        engine = given["self"]
        start_on_loop(given)
        engine.output_processor = processor(engine.log_stats)
        named = {"vllm_config": given["vllm_config"], "executor_class": None, "log_stats": engine.log_stats}
        if hasattr(client, "make_async_mp_client"):
            engine.engine_core = client.make_async_mp_client(**named)
        else:
            engine.engine_core = client.make_client(multiprocess_mode=True, asyncio_mode=True, **named)

    async def handle_outputs(engine: Any, chunk: int = 2, arrays: bool = False) -> None:
        """vLLM's output handler: it takes the outputs of a step in slices, and others may run between them.

        Where there is more than one slice, 0.9.2 makes them with ``np.array_split``, 0.16.0 of the list.
        """
        engine_core, output_processor = engine.engine_core, engine.output_processor
        while True:
            try:
                outputs = await engine_core.get_output_async()
            except NoMore:
                return
            made = engine.log_stats and outputs.outputs
            stats = vars(modules[STATS])["IterationStats"]() if made else None
            whole: Any = outputs.outputs
            if arrays and len(whole) > chunk:
                whole = np.array(whole, dtype=object)
            for start in range(0, len(whole), chunk):
                some = whole[start : start + chunk]
                done = output_processor.process_outputs(some, outputs.timestamp, stats)
                await asyncio.sleep(0)
                engine_core.abort_requests(done.reqs_to_abort)
            engine.arrive(getattr(outputs, "engine_index", 0), outputs.scheduler_stats, stats)

    behaviour._put(facts, sync, "__init__", build_sync)
    behaviour._put(facts, sync, "step", step)
    sync.abort_request = on_loop.abort = abort_request
    behaviour._put(facts, sync, "get_metrics", get_metrics) if holder else None
    behaviour._put(facts, on_loop, "__init__", build_on_loop)
    on_loop.handle_outputs = handle_outputs


def get_metrics(given: dict[str, Any]) -> list[Any]:
    assert given["self"].log_stats, "Stat logging disabled"
    return []


def abort_request(engine: Any, request_ids: list[str]) -> None:
    """What the engines do with requests that are aborted: first the front end forgets them, then the core."""
    internal = {"internal": False} if has_external_ids(engine.output_processor) else {}
    engine.engine_core.abort_requests(engine.output_processor.abort_requests(request_ids, **internal))


def add(engine: Any, request: str, prompt: Prompt, *, aborted: bool = False, n: int = 1) -> list[str]:
    """Add a request with ``n`` samples; of an ``aborted`` one the core still sends, and the front end knows no more.

    Returns:
        The ids inside vLLM, one for each sample.
    """
    processor = engine.output_processor
    # from 0.14 on the id inside has something behind it
    inside = f"{request}-1f" if has_external_ids(processor) and n > 1 else request
    ids = [f"{index}_{inside}" for index in range(n)] if n > 1 else [inside]
    parent = types.SimpleNamespace(request_id=inside, child_requests=set(ids), n=n) if n > 1 else None
    for index, one in enumerate(ids):
        engine.engine_core.prompts[one] = prompt
        if not aborted:
            given = types.SimpleNamespace(request_id=one, external_req_id=request, prompt=prompt)
            text = {"prompt": None} if "prompt" in inspect.signature(type(processor).add_request).parameters else {}
            processor.add_request(request=given, parent_req=parent, request_index=index, **text)
    return ids
