"""Run by test_settings_own_process.py: the cases of one engine whose core has a process of its own.

Arguments: the model, the file for the results (JSON), and the number of the engine. With KVHOOK_ALONE=1 the cases are
run without kvhook, and there are no results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import kvhook
from tests.engine.settings import cases, release
from tests.engine.settings.bench import COMMON, forced, of_kind
from tests.engine.settings.drive import Driver

COUNTS = (
    "num_generation_tokens",
    "num_prompt_tokens",
    "num_finished_reqs",
    "num_preempted_reqs",
    "prefix_cache_requests",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "ttft_count",
    "itl_count",
    "num_draft_tokens",
    "num_accepted_tokens",
)
ROW = ("request_id", "finish_reason", "num_prompt_tokens", "num_generation_tokens", "num_cached_tokens", "max_tokens")


def engine(model: str, number: int, session: kvhook.Session | None) -> list[dict[str, Any]]:
    """The cases of one engine: what came back, and what was recorded."""
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    settings = cases.settings(number, release.can())
    options = COMMON | settings.options | of_kind(settings)
    llm = LLM(model=model, **options, disable_log_stats=not settings.stats_on)
    driver = Driver(llm, in_process=False)
    found = []
    for seed in range(number * cases.PER_ENGINE, (number + 1) * cases.PER_ENGINE):
        steps, rows = (len(session.steps()), len(session.requests())) if session else (0, 0)
        calls = driver.calls
        llm.llm_engine.reset_prefix_cache()
        asked = driver.run(cases.case(seed, release.can()))
        if session:
            found.append(
                {
                    "seed": seed,
                    "asked": [dataclasses.asdict(one) for one in asked],
                    "calls": driver.calls - calls,
                    "steps": len(session.steps()) - steps,
                    "rows": told(session.requests()[rows:], ROW),
                    "counts": {c: sum(v) for c, v in told(session.steps()[steps:], COUNTS).items()},
                    "faults": session.faults,
                }
            )
    return found


def told(table: Any, columns: tuple[str, ...]) -> dict[str, list[Any]]:
    return {name: table[name].tolist() for name in columns if name in (table.dtype.names or ())}


def main(model: str, results: str, number: str) -> None:
    settings = cases.settings(int(number), release.can())
    alone = os.environ.get("KVHOOK_ALONE") == "1"
    with forced(settings), contextlib.nullcontext() if alone else kvhook.install(level=settings.level) as session:
        found = engine(model, int(number), session)
    assert "vllm.v1.worker.cpu_worker" not in sys.modules, "the core has no process of its own"
    if not alone:
        Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
