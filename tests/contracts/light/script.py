"""A script of what an engine's core sends, and what must come out, counted by hand."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.releases import between

PROMPTS = {
    "a": Prompt(computed=14, cached=16, external=6),
    "b": Prompt(computed=20),
    "c": Prompt(computed=5, stop_after=2),
    "gone": Prompt(computed=100, cached=50),
}
SCRIPT = (
    Sent((Said("a"), Said("b")), running=2),
    # three tokens at once: speculative decoding
    Sent((Said("b", tokens=3), Said("a", preempted=1)), running=2),
    # nothing comes back
    Sent(running=1),
    Sent((Said("c"), Said("gone", tokens=9, preempted=5), Said("b", preempted=2, finished=True)), running=3),
    # c ends by a stop string, a because the core says so
    Sent((Said("c"), Said("a", finished=True)), running=2),
    # the core had not heard of the stop string yet
    Sent((Said("c"),), running=1),
)
#: a step each: outputs came, generated, prompt tokens (all, computed, cached, external), preempted, finished
EXPECTED = (
    (1, 2, (50, 34, 16, 6), 0, 0),
    (1, 4, (0, 0, 0, 0), 1, 0),
    (0, 0, (0, 0, 0, 0), 0, 0),
    (1, 2, (5, 5, 0, 0), 2, 1),
    (1, 2, (0, 0, 0, 0), 0, 2),
    (1, 0, (0, 0, 0, 0), 0, 0),
)
RUNNING = [2, 2, 1, 3, 2, 1]


def begin(path: str, *, log_stats: bool = False, script: tuple[Sent, ...] = SCRIPT, **config: Any) -> Any:
    """An engine that has been built and has its requests."""
    engine = make_engine(path, log_stats=log_stats, **config)
    for request, prompt in PROMPTS.items():
        add(engine, request, prompt, aborted=request == "gone")
    engine.engine_core.plan += script
    return engine


def go(engine: Any, steps: int | None = None) -> list[list[str]]:
    """Play the script, or some steps of it; gives the outputs of each step."""
    if hasattr(engine, "handle_outputs"):
        asyncio.run(engine.handle_outputs())
        return []
    return [engine.step() for _ in range(len(engine.engine_core.plan) if steps is None else steps)]


def check(steps: Any, release: str, expected: tuple[Any, ...] = EXPECTED) -> None:
    """The rows are what the script says."""
    names = steps.dtype.names
    splits = between(release, "0.16.0")
    assert ("num_prompt_tokens_computed" in names) == splits
    parts = ("", "_computed", "_cached", "_external") if splits else ("",)
    got = [
        (
            row["has_iteration_stats"],
            row["num_generation_tokens"],
            tuple(row[f"num_prompt_tokens{part}"] for part in parts),
            row["num_preempted_reqs"],
            row["num_finished_reqs"],
        )
        for row in steps
    ]
    assert got == [(*row[:2], row[2][: len(parts)], *row[3:]) for row in expected]
