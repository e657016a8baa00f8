"""An engine with one request, whose prompt comes in chunks: two steps bring no output."""

from __future__ import annotations

from typing import Any

from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import SYNC
from tests.contracts.releases import between

#: one release of each way in which stats pass: see the table in tests/README.md
KINDS = ["0.8.5", "0.9.2", "0.10.2", "0.11.0", "0.13.0", "0.19.1", "0.26.0", "0.32.0"]
#: up to 0.8 the prefix cache counts blocks, and these are of 16 tokens
UNIT = 16
#: a prompt of 40 tokens in chunks of 16: two steps bring no output, and the look-up belongs to the first
CHUNKED = (
    Sent(running=1, looked_up=40, found=16),
    Sent(running=1),
    Sent((Said("a"),), running=1),
    Sent((Said("a", finished=True),), running=0),
)


def chunked(path: str = SYNC, *, log_stats: bool = False, script: tuple[Sent, ...] = CHUNKED) -> Any:
    """An engine with one request, whose core will send this."""
    engine = make_engine(path, log_stats=log_stats)
    add(engine, "a", Prompt(computed=24, cached=16))
    engine.engine_core.plan += script
    return engine


def run(engine: Any) -> None:
    while engine.engine_core.plan:
        engine.step()


def looked_up(steps: Any, release: str) -> list[tuple[int, int]]:
    """Look-ups and hits of each step, in the unit in which this vLLM counts."""
    unit = UNIT if between(release, "0.8.0", "0.8.5.post1") else 1
    return [(int(s["prefix_cache_queries"]) // unit, int(s["prefix_cache_hits"]) // unit) for s in steps]
