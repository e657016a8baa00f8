"""Scopes and labels on a real engine, against the cached tokens that its outputs report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.workloads import tokens

N = 3


class Scoped(NamedTuple):
    """A run in parts, the outputs of each part, and where it was recorded."""

    session: Any
    outputs: dict[str, list[Any]]
    path: Path


@pytest.fixture(scope="module")
def scoped(make_llm: MakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Scoped:
    """A warm-up that finds nothing, then two agents that share its beginning, one of them with samples."""
    from vllm import SamplingParams

    rng, path = random.Random(3), tmp_path_factory.mktemp("scoped") / "run.kvh"
    system = tokens(rng, 128)
    outputs: dict[str, list[Any]] = {}

    def ask(llm: Any, part: str, lengths: Sequence[int], n: int = 1, beginning: Sequence[int] = ()) -> None:
        prompts = [{"prompt_token_ids": [*beginning, *tokens(rng, length)]} for length in lengths]
        params = SamplingParams(max_tokens=4, n=n, temperature=1.0, ignore_eos=True)
        outputs[part] = llm.generate(prompts, params, use_tqdm=False)

    kvhook.uninstall()
    with kvhook.install(trace=path, labels=None) as session:
        llm = make_llm(num_gpu_blocks_override=200)
        with session.scope("warm-up"):
            ask(llm, "warm-up", [70, 90], beginning=system)
        with session.scope("measured"):
            with kvhook.label("one"):
                ask(llm, "one", [10, 20, 30], beginning=system)
            with kvhook.label("two"):
                ask(llm, "two", [40], n=N, beginning=system)
        ask(llm, "after", [50])
    return Scoped(session, outputs, path)


def asked(outputs: Sequence[Any]) -> int:
    return sum(len(one.prompt_token_ids) for one in outputs)


def cached(outputs: Sequence[Any]) -> int:
    return sum(one.num_cached_tokens for one in outputs)


def test_the_summary_without_the_warm_up_is_that_of_the_other_outputs(scoped: Scoped):
    summary, whole = scoped.session.summary(), scoped.session.summary(warmup=True)
    others = [one for part in ("one", "two", "after") for one in scoped.outputs[part]]
    assert summary.num_finished_reqs == 3 + N + 1
    assert whole.num_finished_reqs == summary.num_finished_reqs + len(scoped.outputs["warm-up"])
    samples = scoped.outputs["two"][0]
    assert summary.num_prompt_tokens == asked(others) + (N - 1) * len(samples.prompt_token_ids)
    assert whole.num_prompt_tokens == summary.num_prompt_tokens + asked(scoped.outputs["warm-up"])
    assert summary.left_out.scopes == ("warm-up",)
    assert [account for account in summary.accounts if not account.ok] == []


def test_the_hit_rate_of_a_part_is_that_of_its_outputs(scoped: Scoped):
    one = scoped.outputs["one"]
    (call,) = (s for s in scoped.session.scopes if s.kind == "generate" and s.num_prompts == 3)
    summary = scoped.session.summary(scope=call.name)
    # each of them finds the 128 shared tokens, which the warm-up has left there: four whole blocks
    assert cached(one) == 3 * 128
    assert (summary.prefix_cache_hits, summary.prefix_cache_queries) == (cached(one), asked(one))
    assert summary.prefix_cache_hit_rate == cached(one) / asked(one)
    assert scoped.session.summary(scope="warm-up").num_prompt_tokens == asked(scoped.outputs["warm-up"])


def test_labels_and_prompts_are_those_of_the_requests(scoped: Scoped):
    requests = scoped.session.requests()
    labels = requests["label"].tolist()
    assert {name: labels.count(name) for name in ("", "one", "two")} == {"": 3, "one": 3, "two": N}
    two = requests[requests["label"] == "two"]
    assert len(set(two["prompt_number"].tolist())) == 1
    assert sorted(two["sample_index"].tolist()) == list(range(N))
    assert len(set(requests["prompt_number"].tolist())) == 2 + 3 + 1 + 1
    rates = {rate.name: rate for rate in scoped.session.summary().by_label}
    if "num_cached_tokens" in vllm_here.absent("request"):
        assert rates["one"].hit_rate is None
        return
    assert rates["one"].num_prompt_tokens == asked(scoped.outputs["one"])
    assert rates["one"].num_cached_tokens == cached(scoped.outputs["one"])
    assert scoped.session.summary(label="one").prefix_cache_hit_rate == rates["one"].hit_rate


def test_the_core_tells_the_labels_of_its_requests_by_the_same_key(scoped: Scoped):
    cores = scoped.session.cores()
    if cores.why_none:
        pytest.skip(cores.why_none)
    trace = scoped.session.trace()
    labels = trace.core_labels(cores.requests())["label"].tolist()
    assert {name: labels.count(name) for name in ("", "one", "two")} == {"": 3, "one": 3, "two": N}
    part = trace.select(scope="measured").cores()
    assert len(part.requests()) == 3 + N
    assert 0 < len(part.steps()) < len(cores.steps())


def test_the_file_says_the_same_as_the_session(scoped: Scoped):
    trace = kvhook.open(scoped.path)
    assert [(s.path, s.num_prompts) for s in trace.scopes] == [
        ("warm-up", -1),
        ("warm-up/generate-0", 2),
        ("measured", -1),
        ("measured/generate-1", 3),
        ("measured/generate-2", 1),
        ("generate-3", 1),
    ]
    assert trace.scopes[4].params == f"n={N}, max_tokens=4, ignore_eos=True"
    for part in ({}, {"scope": "measured"}, {"label": "two"}, {"warmup": True}):
        one, other = (each.summary(**part).as_dict() for each in (trace, scoped.session))
        assert {name for name in one if one[name] != other[name]} <= {"faults", "kvhook_ns_p50", "core"}
    assert scoped.session.faults == {}
