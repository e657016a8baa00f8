"""Numbers that got lost once, on a real engine: chunked prompts, aborted requests, batches that end together, an engine
with a step of its own, samples, an interrupted run.

What is expected is taken from vLLM's own objects by the test: its scheduler, its block pool, the outputs. Two engines
serve all the tests, each with a session of its own.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.workloads import BLOCK_SIZE, USABLE, tokens

#: fewer than most prompts have: they are prefilled in chunks, and a step may bring no output
CHUNK = 64


class Core:
    """What happens in the engine core in this process, noted by the test."""

    def __init__(self, engine: Any) -> None:
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.begin()
        for name in ("schedule", "make_stats", "update_from_output"):
            setattr(self.scheduler, name, self._noting(name, getattr(self.scheduler, name)))

    def begin(self) -> None:
        """Forget what was noted."""
        self.stats: list[Any] = []
        self.blocks: list[int] = []
        self.generated = 0
        #: number of the next call of schedule() that is interrupted, as by Ctrl-C
        self.interrupt = -1

    def _noting(self, name: str, method: Any) -> Any:
        note = getattr(self, f"_{name}")

        def noted(*args: Any, **kwargs: Any) -> Any:
            if name == "schedule":
                self.interrupt -= 1
                if self.interrupt == 0:
                    raise KeyboardInterrupt
            result = method(*args, **kwargs)
            note(result)
            return result

        return noted

    def _schedule(self, _: Any) -> None:
        self.blocks.append(sum(b.ref_cnt > 0 and not b.is_null for b in self.pool.blocks))

    def _make_stats(self, stats: Any) -> None:
        if stats is not None:
            self.stats.append(stats)

    def _update_from_output(self, by_client: Any) -> None:
        self.generated += sum(len(o.new_token_ids) for outputs in by_client.values() for o in outputs.outputs)


class Run(NamedTuple):
    """An engine, its core, and the session that records it."""

    llm: Any
    engine: Any
    core: Core
    session: kvhook.Session

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Rows]:
        """The steps and requests of a block of code."""
        steps, requests = len(self.session.steps()), len(self.session.requests())
        self.core.begin()
        rows = Rows()
        yield rows
        rows.steps = self.session.steps()[steps:]
        rows.requests = self.session.requests()[requests:]
        assert self.session.faults == {}


class Rows:
    """What was recorded of a block of code, once it has ended."""

    steps: Any
    requests: Any


@pytest.fixture(scope="module")
def chunked(make_llm: MakeLLM) -> Iterator[Run]:
    """An engine as most people have it: stats off, chunks shorter than its prompts."""
    kvhook.uninstall()
    session = kvhook.install()
    llm = make_llm(max_num_batched_tokens=CHUNK, max_num_seqs=16, enable_chunked_prefill=True)
    yield Run(llm, llm.llm_engine, Core(llm.llm_engine), session)
    kvhook.uninstall()


def generate(run: Run, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    params = SamplingParams(**({"temperature": 0, "ignore_eos": True} | sampling))
    outputs: list[Any] = run.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return outputs


def add(engine: Any, request: str, prompt: list[int], max_tokens: int) -> None:
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    engine.add_request(request, {"prompt_token_ids": prompt}, params)


def step_through(engine: Any) -> dict[str, Any]:
    """Steps until nothing is left; the last output of each request."""
    last = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
    return last


def test_look_ups_of_chunked_prompts_are_those_that_the_scheduler_counted(chunked: Run):
    rng = random.Random(1)
    shared = tokens(rng, 6 * BLOCK_SIZE)
    prompts = [shared + tokens(rng, more) for more in (9, 60, 108)]
    with chunked.recorded() as rows:
        outputs = [generate(chunked, [prompt], max_tokens=4)[0] for prompt in prompts]
    stats = chunked.core.stats
    for column, name in (("prefix_cache_queries", "queries"), ("prefix_cache_hits", "hits")):
        assert rows.steps[column].sum() == sum(getattr(s.prefix_cache_stats, name) for s in stats), column
    # alone in the engine, each prompt is looked up once: this is arithmetic
    assert rows.steps["prefix_cache_queries"].sum() == sum(map(len, prompts))
    assert rows.steps["prefix_cache_hits"].sum() == 2 * len(shared)
    assert rows.steps["has_scheduler_stats"].sum() == len(stats)
    assert rows.steps["num_generation_tokens"].sum() == sum(len(o.outputs[0].token_ids) for o in outputs) == 12
    assert rows.steps["num_prompt_tokens"].sum() == sum(map(len, prompts))
    known = rows.steps[rows.steps["has_scheduler_stats"] == 1]
    usage = [s.kv_cache_usage if hasattr(s, "kv_cache_usage") else s.gpu_cache_usage for s in stats]
    assert known["kv_cache_usage"].tolist() == pytest.approx(usage)
    # there were steps without outputs, or this test has seen nothing
    assert (rows.steps["num_generation_tokens"] == 0).any()


def test_six_requests_of_which_two_are_aborted_are_six_rows(chunked: Run):
    rng = random.Random(2)
    prompts = {str(1000 + i): tokens(rng, 20 + i) for i in range(6)}
    with chunked.recorded() as rows:
        for request, prompt in prompts.items():
            add(chunked.engine, request, prompt, 12)
        so_far: dict[str, int] = {}
        for _ in range(5):
            so_far |= {o.request_id: len(o.outputs[0].token_ids) for o in chunked.engine.step()}
        chunked.engine.abort_request(["1001", "1004"])
        done = step_through(chunked.engine)
    assert len(rows.requests) == rows.steps["num_finished_reqs"].sum() == 6
    assert rows.steps["num_added_reqs"].sum() == 6
    assert rows.steps["num_aborted_reqs"].sum() == 2
    assert Counter(rows.requests["finish_reason"].tolist()) == {"abort": 2, "length": 4}
    by_id = {str(row["request_id"]): row for row in rows.requests}
    assert set(by_id) == set(prompts)
    for request, row in by_id.items():
        assert row["num_prompt_tokens"] == len(prompts[request])
        aborted = request in ("1001", "1004")
        generated = so_far[request] if aborted else len(done[request].outputs[0].token_ids)
        assert row["num_generation_tokens"] == generated
    assert so_far["1001"] > 0, "it was aborted in the middle of its output"
    # what the front end had been given by then, and all of the others: no token more
    assert rows.steps["num_generation_tokens"].sum() == rows.requests["num_generation_tokens"].sum()


def test_an_abort_of_all_that_is_left_needs_no_further_step(chunked: Run):
    with chunked.recorded() as rows:
        add(chunked.engine, "2000", tokens(random.Random(3), 30), 9)
        chunked.engine.step()
        chunked.engine.abort_request(["2000"])
    assert rows.requests["finish_reason"].tolist() == ["abort"]
    assert rows.requests["request_id"].tolist() == [2000]
    with chunked.recorded() as rows:
        step_through(chunked.engine)
    assert len(rows.requests) == 0


def test_a_batch_that_ends_together_shows_its_peak(chunked: Run):
    """At the end of the step every block has been given back."""
    rng = random.Random(4)
    with chunked.recorded() as rows:
        generate(chunked, [tokens(rng, 12) for _ in range(5)], max_tokens=1)
    peak = rows.steps["num_kv_blocks_peak"]
    # with asynchronous scheduling a step may schedule nothing, or two batches
    assert sorted(n for n in peak.tolist() if n >= 0) == sorted(chunked.core.blocks)
    assert peak.max() == 5, "each prompt takes a block"
    known = rows.steps[rows.steps["has_scheduler_stats"] == 1]
    assert known["num_kv_blocks_used"].tolist()[-1] == 0
    assert rows.steps["kv_cache_usage_peak"].max() == pytest.approx(vllm_here.usage(5, USABLE))
    in_step = chunked.session.summary().kv_cache_usage_peak_in_step
    assert in_step is not None
    assert in_step >= 5 / USABLE


def test_the_peak_of_each_step_is_what_the_block_pool_held_after_its_schedule(chunked: Run):
    rng = random.Random(5)
    with chunked.recorded() as rows:
        generate(chunked, [tokens(rng, rng.randrange(20, 200)) for _ in range(7)], max_tokens=40)
    peaks = [n for n in rows.steps["num_kv_blocks_peak"].tolist() if n >= 0]
    if len(peaks) == len(chunked.core.blocks):
        assert peaks == chunked.core.blocks
    assert max(peaks) == max(chunked.core.blocks)
    assert len(set(peaks)) > 3


def test_each_sample_of_a_prompt_tells_which_it_is(chunked: Run):
    prompt = tokens(random.Random(6), 40)
    with chunked.recorded() as rows:
        (output,) = generate(chunked, [prompt], n=4, temperature=1.0, seed=7, max_tokens=3)
    assert len(output.outputs) == 4
    assert sorted(rows.requests["sample_index"].tolist()) == [0, 1, 2, 3]
    assert set(rows.requests["request_id"].tolist()) == {int(output.request_id)}
    assert rows.steps["num_added_reqs"].sum() == 4


def test_after_a_ctrl_c_in_generate_everything_that_comes_is_recorded(chunked: Run):
    """vLLM's queue stays as vLLM leaves it: the next call may finish requests of the one before."""
    rng = random.Random(8)
    with chunked.recorded() as rows:
        chunked.core.interrupt = 4
        with pytest.raises(KeyboardInterrupt):
            generate(chunked, [tokens(rng, 30) for _ in range(4)], max_tokens=6)
        left = len(chunked.engine.output_processor.request_states)
        with contextlib.suppress(Exception):  # some releases stumble over what is left
            generate(chunked, [tokens(rng, 30)], max_tokens=6)
        step_through(chunked.engine)
    assert left in (0, 4)
    reasons = Counter(rows.requests["finish_reason"].tolist())
    assert reasons == ({"length": 5} if left else {"length": 1, "abort": 4})
    assert rows.steps["num_added_reqs"].sum() == rows.steps["num_finished_reqs"].sum() == 5
    assert rows.steps["num_generation_tokens"].sum() == chunked.core.generated
    queries = sum(s.prefix_cache_stats.queries for s in chunked.core.stats)
    assert rows.steps["prefix_cache_queries"].sum() == queries


# An engine with a step of its own


@pytest.fixture(scope="module")
def driven(make_llm: MakeLLM, model: str, chunked: Run) -> Iterator[tuple[Run, list[str]]]:
    """A framework's engine, whose step is a copy of vLLM's without its stats; and what kvhook has warned of.

    After the other engine: a session is closed while its engine lives on.
    """
    from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]

    class FrameworkEngine(LLMEngine):  # type: ignore[misc, unused-ignore]
        def step(self) -> Any:
            outputs = self.engine_core.get_output()
            done = self.output_processor.process_outputs(
                outputs.outputs, engine_core_timestamp=outputs.timestamp, iteration_stats=None
            )
            self.engine_core.abort_requests(done.reqs_to_abort)
            return done.request_outputs

    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger("kvhook").addHandler(ear)
    kvhook.uninstall()
    session = kvhook.install()
    options = vllm_here.options() | {"max_num_batched_tokens": CHUNK, "max_num_seqs": 16}
    engine = FrameworkEngine.from_engine_args(EngineArgs(model=model, disable_log_stats=True, **options))
    yield Run(None, engine, Core(engine), session), said
    kvhook.uninstall()
    logging.getLogger("kvhook").removeHandler(ear)


def test_an_engine_with_a_step_of_its_own_is_counted_to_the_token(driven: tuple[Run, list[str]]):
    run, said = driven
    rng = random.Random(9)
    shared = tokens(rng, 3 * BLOCK_SIZE)
    prompts = [shared + tokens(rng, 10 + i) for i in range(4)]
    with run.recorded() as rows:
        outputs: list[Any] = []
        for i, prompt in enumerate(prompts):
            add(run.engine, str(i), prompt, 5 + i)
            outputs += step_through(run.engine).values()
    assert rows.steps["num_generation_tokens"].sum() == sum(len(o.outputs[0].token_ids) for o in outputs) == 26
    assert rows.steps["num_generation_tokens"].sum() == run.core.generated
    assert rows.steps["num_prompt_tokens"].sum() == sum(map(len, prompts))
    assert rows.steps["num_finished_reqs"].sum() == rows.steps["num_added_reqs"].sum() == 4
    assert rows.steps["prefix_cache_queries"].sum() == sum(map(len, prompts))
    assert rows.steps["prefix_cache_hits"].sum() == 3 * len(shared)
    # a chunk without outputs comes first, in which there is nothing that could be counted
    assert (rows.steps["level"] == 1).tolist() == [False] + [True] * (len(rows.steps) - 1)
    assert (rows.steps["t_start_ns"] == rows.steps["t_end_ns"]).all()
    (warning,) = [text for text in said if "LLMEngine.step" in text]
    assert "FrameworkEngine.step" in warning
    summary = run.session.summary()
    assert summary.num_generation_tokens == 26
    assert "FrameworkEngine.step" in str(summary)
    assert "before LLM(" not in str(summary)
    assert np.isnan(summary.step_time.p50)
