"""What vLLM holds when a step is over: its stats objects, made by its own code, or stand-ins with the same fields."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import random
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.contracts, where the stand-ins come from

ENGINE = "vllm.v1.engine.llm_engine"
STATS = "vllm.v1.metrics.stats"
#: The one environment variable that vLLM's building of IterationStats looks up, at each output.
VARIABLE = "VLLM_COMPUTE_NANS_IN_LOGITS"
STEP_SECONDS = 0.0123


class StepKind(NamedTuple):
    """A kind of step. Prefills and finished requests are among the batch."""

    name: str
    batch: int
    prefills: int = 0
    finished: int = 0
    #: no two inter-token latencies alike; in real steps they mostly are, since the batch moves together
    unlike: bool = False


KINDS_OF_STEP = (
    *(StepKind(f"decode, batch {b}", b) for b in (1, 8, 64, 256, 1024)),
    StepKind("8 prefills, 8 finished, batch 64", 64, 8, 8),
    StepKind("decode, batch 256, no two latencies alike", 256, unlike=True),
)


@contextlib.contextmanager
def vllm_or_stand_ins(stand_ins: bool) -> Iterator[str]:
    """Meanwhile vLLM can be imported: the real one, or its stand-ins. Gives the release whose stand-ins they are."""
    if not stand_ins:
        importlib.import_module(ENGINE)
        yield ""
        return
    from kvhook.adapters import NEWEST
    from tests.contracts.loader import build_stub_modules, load, stubs

    modules = build_stub_modules(load(NEWEST))

    def update_from_finished_request(self: Any, *_: Any, **given: Any) -> None:
        self.finished_requests.append(_finished(modules[STATS]))

    vars(modules[STATS])["IterationStats"].update_from_finished_request = update_from_finished_request
    with stubs(modules):
        yield NEWEST


class Objects:
    """The stats of one step.

    With the real vLLM, `iteration` is made by vLLM's own code (`OutputProcessor`), once per request of the batch, from
    real outputs and request states; `build` makes it anew, and `skip` goes the same way with stats off.
    """

    def __init__(self, kind: StepKind, *, stand_ins: bool) -> None:
        self.kind, self.real = kind, not stand_ins
        stats: Any = sys.modules[STATS]
        self.iteration_stats_class = stats.IterationStats
        self.scheduler = stats.SchedulerStats(num_running_reqs=kind.batch, num_waiting_reqs=3, kv_cache_usage=0.5)
        prefix = self.scheduler.prefix_cache_stats
        prefix.requests, prefix.queries, prefix.hits = kind.prefills, kind.prefills * 200, kind.prefills * 128
        self.requests: list[tuple[Any, Any]] = []
        self.finishing: list[Any] = []
        self.now = 1000.0
        if self.real:
            self._make_requests(stats)
            self.iteration = self.build()
        else:
            self.iteration = self._stand_in(stats)
        # under its name before 0.10 as well
        names = ("inter_token_latencies_iter", "time_per_output_tokens_iter")
        self.latencies_name = next(name for name in names if hasattr(self.iteration, name))
        if kind.unlike:
            latencies = getattr(self.iteration, self.latencies_name)
            latencies[:] = [0.01 + 0.005 * random.random() for _ in latencies]
        for request in self.iteration.finished_requests:
            request.kvhook_ttft = 0.1  # as kvhook's hook on finished requests leaves it there

    def outputs_and_states(self) -> tuple[list[Any], dict[str, Any]]:
        """What the engine core sends in this step, and the front end's requests."""
        if self.real:
            return [output for output, _ in self.requests], {state.request_id: state for _, state in self.requests}
        names = [str(i) for i in range(self.kind.batch)]
        outputs = [types.SimpleNamespace(request_id=name, new_token_ids=[17], events=None) for name in names]
        states = {name: types.SimpleNamespace(is_prefilling=False, prompt_len=200) for name in names}
        return outputs, states

    def build(self) -> Any:
        """The step's `IterationStats`, as `OutputProcessor.process_outputs` makes them."""
        iteration = self.iteration_stats_class()
        self.now = now = self.now + STEP_SECONDS
        update, processor = self.update, self.processor
        for output, state in self.requests:
            update(processor, state, output, now, iteration)
        for state in self.finishing:
            self.finish(processor, state, self.reason, iteration)
        return iteration

    def skip(self) -> None:
        """The same way with stats off: a call for each request that returns at once."""
        update, processor, now = self.update, self.processor, self.now
        for output, state in self.requests:
            update(processor, state, output, now, None)
        for state in self.finishing:
            self.finish(processor, state, self.reason, None)

    def finish_into(self, iteration: Any) -> None:
        """Only the finished requests' part of `build`."""
        if self.real:
            for state in self.finishing:
                self.finish(self.processor, state, self.reason, iteration)
        else:
            for _ in range(self.kind.finished):
                iteration.update_from_finished_request(req_stats=STAND_IN_STATE)
        iteration.finished_requests.clear()

    def _make_requests(self, stats: Any) -> None:
        engine: Any = importlib.import_module("vllm.v1.engine")
        processing: Any = importlib.import_module("vllm.v1.engine.output_processor")
        self.update = processing.OutputProcessor._update_stats_from_output
        self.finish = processing.OutputProcessor._update_stats_from_finished
        self.reason = engine.FinishReason.LENGTH
        # without their __init__, which wants a tokenizer and a prompt; what the two methods above read is set
        self.processor = object.__new__(processing.OutputProcessor)
        takes_log_stats = "log_stats" in inspect.signature(stats.LoRARequestStates).parameters
        self.processor.lora_states = stats.LoRARequestStates(*([True] if takes_log_stats else []))
        wall = time.time()
        for i in range(self.kind.batch):
            new = i < self.kind.prefills
            output = engine.EngineCoreOutput(request_id=str(i), new_token_ids=[17])
            if new:
                output.events = [
                    engine.EngineCoreEvent(engine.EngineCoreEventType.QUEUED, self.now - 0.02),
                    engine.EngineCoreEvent(engine.EngineCoreEventType.SCHEDULED, self.now - 0.01),
                ]
                if hasattr(output, "prefill_stats"):
                    output.prefill_stats = stats.PrefillStats()
                    output.prefill_stats.set(200, 128, 0)
            request = stats.RequestStateStats(arrival_time=wall - 0.1 - 0.01 * random.random())
            request.queued_ts, request.scheduled_ts, request.first_token_ts = 999.0, 999.1, 999.2
            request.last_token_ts = self.now
            state = object.__new__(processing.RequestState)
            about = {"request_id": str(i), "external_req_id": str(i), "parent_req": None, "lora_name": None}
            about |= {"prompt_len": 200, "max_tokens_param": 100, "num_cached_tokens": 128, "stats": request}
            for name, value in (about | {"is_prefilling": new}).items():
                setattr(state, name, value)
            self.requests.append((output, state))
        self.finishing = [state for _, state in self.requests[self.kind.batch - self.kind.finished :]]

    def _stand_in(self, stats: Any) -> Any:
        iteration = stats.IterationStats()
        iteration.num_generation_tokens = self.kind.batch
        decoding = self.kind.batch - self.kind.prefills
        iteration.inter_token_latencies_iter = [float(str(STEP_SECONDS)) for _ in range(decoding)]
        iteration.time_to_first_tokens_iter = [0.1 + 0.01 * random.random() for _ in range(self.kind.prefills)]
        iteration.finished_requests = [_finished(stats) for _ in range(self.kind.finished)]
        return iteration


#: What a finished request's times are read from.
STAND_IN_STATE = types.SimpleNamespace(first_token_latency=0.1)


def _finished(stats: Any) -> Any:
    times = {"queued_time": 0.01, "prefill_time": 0.05, "inference_time": 0.9, "decode_time": 0.85, "e2e_latency": 1.0}
    return stats.FinishedRequestStats(
        finish_reason=1,
        request_id="17",
        num_prompt_tokens=200,
        num_generation_tokens=100,
        max_tokens_param=100,
        **times,
    )


# ---- ways to build IterationStats ----------------------------------------------------------------------------------


class EnvsSnapshot:
    """In the place of the module `vllm.envs`: the one variable that is read, as a plain attribute."""

    def __init__(self, value: Any) -> None:
        setattr(self, VARIABLE, value)


@contextlib.contextmanager
def envs_cached() -> Iterator[None]:
    """Meanwhile vLLM's environment look-ups are cached, all of them and everywhere."""
    envs: Any = sys.modules["vllm.envs"]
    envs.enable_envs_cache()
    try:
        yield
    finally:
        envs.disable_envs_cache()


@contextlib.contextmanager
def envs_replaced() -> Iterator[None]:
    """Meanwhile the module that builds IterationStats sees a snapshot instead of `vllm.envs`, and only that module."""
    stats: Any = sys.modules[STATS]
    original = stats.envs
    stats.envs = EnvsSnapshot(getattr(original, VARIABLE))
    try:
        yield
    finally:
        stats.envs = original


def can_cache_envs() -> bool:
    """Whether this vLLM can cache its look-ups and go back."""
    envs = sys.modules.get("vllm.envs")
    return all(hasattr(envs, name) for name in ("enable_envs_cache", "disable_envs_cache"))


def can_replace_envs() -> bool:
    """Whether this vLLM looks the variable up where IterationStats are built."""
    envs = getattr(sys.modules[STATS], "envs", None)
    return envs is not None and hasattr(envs, VARIABLE)
