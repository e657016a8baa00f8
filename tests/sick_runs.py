"""Runs of an engine and its core that are made by hand: healthy ones, and what makes them sick."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvhook
from kvhook.analysis.diagnosis.finding import Finding
from kvhook.analysis.summarize import summarize
from kvhook.text.summary import printed
from tests.ring.synthetic import MS, CoreRecording, Recording


class Run:
    """A run of an engine and its core. What a test does not say is healthy: half of the prompts' tokens are found."""

    def __init__(self, folder: Path, **facts: Any) -> None:
        shared = {"block_size": 16, "max_num_seqs": 16, "enable_prefix_caching": True, **facts}
        self.front = Recording(folder / "front", slots=4096, **shared)
        self.core = CoreRecording(folder / "core", **shared)
        self.requests = 0

    def steps(self, count: int, **values: Any) -> None:
        """So many steps of the engine and of its core."""
        for _ in range(count):
            self.core.step(**values)
            self.front.step(0.5, num_running_reqs=10, num_generation_tokens=10)

    def request(self, *, tokens: int = 101, found: int = 48, arrived: int = 0, **values: Any) -> None:
        """A request that was looked up, scheduled and has ended."""
        known = {"resumed": 0, "num_shared_tokens": found, "miss_reason": "diverged"} | values
        self.core.record(
            "lookup", request=self.requests, t_ns=100 * MS, num_tokens=tokens, num_found_tokens=found, **known
        )
        self.core.record("core_request", request=self.requests, t_arrived_ns=arrived)
        asked = known["miss_reason"] != "not_looked_up"
        self.front.finish(self.requests, num_prompt_tokens=tokens, num_cached_tokens=found)
        self.front.step(
            0.5,
            num_running_reqs=10,
            prefix_cache_queries=tokens * asked,
            prefix_cache_hits=found * asked,
            num_prompt_tokens=tokens,
        )
        self.requests += 1

    def findings(self, *, with_core: bool = True) -> dict[str, Finding]:
        summary = summarize(kvhook.open(self.front.path), None, self.core.cores() if with_core else None)
        json.dumps(summary.as_dict())
        shown = str(printed(summary))
        for finding in summary.findings:
            assert finding.text.split(".")[0][:40] in shown
            assert "->" in shown
            assert finding.setting
            assert finding.evidence
        assert len({f.name for f in summary.findings}) == len(summary.findings)
        assert max(map(len, shown.partition("  diagnosis ")[2].splitlines()), default=0) <= 100
        return {finding.name: finding for finding in summary.findings}


def healthy(run: Run, seed: int = 0) -> Run:
    """Requests that share half of their prompts come, prefill beside others that decode, and find room."""
    rng = random.Random(seed)
    for _ in range(30):
        run.request(tokens=rng.randrange(90, 130), found=48)
        run.steps(1, num_prefill_tokens=60, took_ms=rng.uniform(1, 2))
        run.steps(rng.randrange(2, 6), took_ms=rng.uniform(0.8, 1.2))
    return run


def blocks_run_out(run: Run) -> None:
    run.steps(40, limited_by="kv_blocks", used=98, cached=2)


def preemptions(run: Run) -> None:
    for number in range(5):
        run.core.record("preemption", request=number, num_lost_tokens=120)
    run.steps(10, num_recomputed_tokens=60)


def evictions(run: Run) -> None:
    """The requests came after their blocks had been evicted."""
    for _ in range(10):
        run.request(
            found=0, miss_reason="evicted", num_evicted_tokens=96, evicted_steps=4, evicted_ns=10 * MS, arrived=95 * MS
        )


def a_bad_order(run: Run) -> None:
    """The requests waited already when their blocks were evicted."""
    for _ in range(10):
        run.request(
            found=0, miss_reason="evicted", num_evicted_tokens=96, evicted_steps=4, evicted_ns=10 * MS, arrived=20 * MS
        )


def short_beginnings(run: Run) -> None:
    for _ in range(40):
        run.request(found=0, num_shared_tokens=15, miss_reason="never_seen")


def short_prompts(run: Run) -> None:
    for _ in range(40):
        run.request(tokens=12, found=0, miss_reason="short")


def unasked(run: Run) -> None:
    for _ in range(10):
        run.request(found=0, miss_reason="not_looked_up")


def siblings(run: Run) -> None:
    for prompt in range(100, 112):
        for sample in range(4):
            run.front.finish(prompt, sample_index=sample, num_cached_tokens=96 if sample else 0, num_prompt_tokens=101)
        run.front.step(0.5)


def held_up(run: Run) -> None:
    run.steps(30, num_prefill_tokens=900, took_ms=12)


def no_seats(run: Run) -> None:
    run.steps(40, limited_by="max_num_seqs", used=30, cached=30)


def no_tokens(run: Run) -> None:
    run.steps(80, limited_by="token_budget", num_prefill_tokens=40)


#: What the core tells -> a run that has it, on top of a healthy one.
DISEASES: dict[str, Callable[[Run], None]] = {
    "cache_too_small": blocks_run_out,
    "preemption_thrash": preemptions,
    "evicted_too_early": evictions,
    "order_spoils_sharing": a_bad_order,
    "shared_beginning_below_block": short_beginnings,
    "never_looked_up": unasked,
    "prefill_holds_up_decode": held_up,
    "limited_by_max_num_seqs": no_seats,
    "limited_by_token_budget": no_tokens,
}
#: Findings that another one brings with it.
TOGETHER = {"order_spoils_sharing": {"evicted_too_early"}}
