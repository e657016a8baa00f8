"""LangChain's vLLM class, in a chain."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvhook
from kvhook.analysis.blocks import prefix_hits
from tests.frameworks.conftest import Run
from tests.recipes import FRAMEWORKS, recipe

pytest.importorskip("langchain_community")


def test_a_chain_is_recorded_with_the_tokens_of_its_answers(project: Path, run_program: Run, tiny: str):
    from transformers import AutoTokenizer

    value = "[answers, [chain.first.format(question=f'What is in street number {n}?') for n in range(6)]]"
    answers, prompts = run_program(recipe("LangChain", FRAMEWORKS), value)
    trace = kvhook.open(project / "chain.kvh")
    requests = trace.requests()
    assert len(answers) == len(requests) == 6
    assert requests["num_generation_tokens"].tolist() == [24] * 6
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert sorted(requests["num_prompt_tokens"].tolist()) == sorted(map(len, tokens))
    steps = trace.steps()
    assert steps["num_generation_tokens"].sum() == 6 * 24
    block_size = trace.meta["engines"][0]["block_size"]
    assert steps["prefix_cache_hits"].sum() <= sum(prefix_hits(tokens, block_size))
