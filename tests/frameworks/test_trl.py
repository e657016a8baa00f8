"""TRL's GRPO trainer with an engine of its own: rollouts, new weights, resets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import kvhook
from tests.frameworks.conftest import Run
from tests.recipes import FRAMEWORKS, recipe

pytest.importorskip("trl")

#: On a processor with AVX-512 the CPU build packs the weights of a layer and keeps nothing that new ones could go
#: into: "'Parameter' object has no attribute 'weight_loader'", with kvhook or without. So it is told to keep them.
KEEP_WEIGHTS = """
import torch
import vllm._custom_ops

torch.cpu._is_amx_tile_supported = lambda: False
vllm._custom_ops._supports_onednn = False
"""
#: Wraps the recipe's reward: it is given the tokens of each completion.
SEE = """
_seen = []
_make = GRPOTrainer

def GRPOTrainer(reward_funcs, **options):
    def see(completion_ids, prompts, **rest):
        _seen.append(([len(ids) for ids in completion_ids], prompts))
        return reward_funcs(**rest)

    return _make(reward_funcs=see, **options)

"""


def test_rollouts_are_what_the_reward_function_was_given(project: Path, run_program: Run, tiny: str):
    from transformers import AutoTokenizer

    value = "[_seen, [[e.kind, e.outcome] for e in session.engine_events], session.faults]"
    imports, reward, rest = recipe("TRL: GRPO with a colocated engine", FRAMEWORKS).partition("def reward")
    seen, events, faults = run_program(imports + KEEP_WEIGHTS + SEE + reward + rest, value)
    trace = kvhook.open(project / "rollouts.kvh")
    requests = trace.requests()
    lengths = [length for batch, _ in seen for length in batch]
    assert len(seen) == 2, "two training steps"
    assert Counter(requests["num_generation_tokens"].tolist()) == Counter(lengths)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = [len(tokenizer(prompt)["input_ids"]) for _, batch in seen for prompt in batch]
    assert Counter(requests["num_prompt_tokens"].tolist()) == Counter(prompts)
    assert faults == {}
    assert trace.steps()["num_generation_tokens"].sum() == sum(lengths)
    # before each generation but the first TRL hands over new weights, and the cache is wrong then
    kinds = Counter(kind for kind, _ in events)
    assert kinds["prefix_cache_reset"] >= 1
