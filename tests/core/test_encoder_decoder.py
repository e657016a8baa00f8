"""An encoder-decoder model such as Whisper: each request also holds blocks for what its encoder has read."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.core.books import Books
from tests.core.conftest import Recording
from tests.core.scheduler_here import SPECS

#: Tokens that the encoder gives for each request, all of which lie in the cross-attention cache.
ENCODER_TOKENS, BLOCK = 50, 16
COUNTS = (
    "num_scheduled_tokens",
    "num_scheduled_reqs",
    "num_preempted_reqs",
    "num_running_reqs",
    "num_prefill_tokens",
    "num_recomputed_tokens",
    "num_decode_tokens",
    "num_kv_blocks_peak",
    "num_kv_blocks_cached",
    "num_kv_blocks_empty",
    "num_kv_blocks_used",
)


def encoder_decoder_scheduler() -> type:
    """vLLM's scheduler, told that its model has an encoder. The configuration of such a model needs a processor."""
    caches = pytest.importorskip("vllm.v1.core.encoder_cache_manager")
    scheduler = pytest.importorskip("vllm.v1.core.sched.scheduler").Scheduler
    if not hasattr(caches, "EncoderDecoderCacheManager"):
        pytest.skip("this vLLM has no cache for an encoder-decoder model of its own")

    class EncoderDecoder(scheduler):  # type: ignore[misc, valid-type, unused-ignore]
        @functools.wraps(scheduler.__init__)  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.is_encoder_decoder = True
            self.max_num_encoder_input_tokens = 4 * ENCODER_TOKENS
            self.encoder_cache_manager = caches.EncoderDecoderCacheManager(cache_size=4 * ENCODER_TOKENS)

    return EncoderDecoder


def heard(name: str) -> dict[str, Any]:
    """What a request brings: a recording at the beginning of its prompt."""
    inputs = pytest.importorskip("vllm.multimodal.inputs")
    place = inputs.PlaceholderRange(offset=0, length=ENCODER_TOKENS)
    return {"mm_features": [inputs.MultiModalFeatureSpec(None, "audio", name, place)]}


@pytest.fixture
def recorded(driver: Callable[..., Recording]) -> tuple[Recording, Books]:
    recording = driver(
        blocks=60,
        groups=("full", "cross"),
        max_num_seqs=8,
        max_num_batched_tokens=96,
        max_model_len=512,
        enable_prefix_caching=False,
        scheduler_cls=encoder_decoder_scheduler(),
        ledger=True,
    )
    rng, books = random.Random(7), Books(recording.driver, plain=False)
    for i in range(20):
        prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(4, 60))]
        recording.driver.add(prompt, max_tokens=rng.randrange(1, 90), **heard(str(i)))
    books.run()
    return recording, books


def test_every_step_is_what_the_core_did(recorded: tuple[Recording, Books]):
    recording, books = recorded
    cores = recording.read()
    steps, requests, events = cores.steps(), cores.requests(), cores.blocks()
    assert len(steps) == len(books.rows)
    for column in COUNTS:
        assert steps[column].tolist() == [row[column] for row in books.rows], column
    assert steps["num_preempted_reqs"].sum() > 0, "blocks do not run short"
    taken = steps["num_kv_blocks_allocated"] - steps["num_kv_blocks_freed"]
    assert (np.cumsum(taken) == steps["num_kv_blocks_used"]).all()
    (facts,) = cores.facts
    assert [group["kind"] for group in facts["kv_groups"]] == [SPECS["full"], SPECS["cross"]]
    # nothing is cached between requests, neither of the prompt nor of what the encoder read
    assert steps["num_kv_blocks_reused"].sum() == steps["num_kv_blocks_cached"].sum() == 0
    assert set(cores.lookups()["miss_reason"].tolist()) <= {"not_looked_up"}

    # each admission takes the blocks of the encoder's tokens
    cross = events[(events["event"] == "allocate") & (events["group"] == 1)]
    admissions = len(requests) + int(steps["num_preempted_reqs"].sum())
    assert len(cross) == admissions * -(-ENCODER_TOKENS // BLOCK)
