"""Run by test_light_own_process.py: level light with the engine's core in a process of its own, LLM and AsyncLLM.

kvhook is installed before vLLM is imported. Arguments: the model, and the file for the results (JSON).
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path
from typing import Any

import kvhook
from tests.engine.own_process import run_counted
from tests.workloads import SMALL, calm_workload

SUMS = (
    "num_prompt_tokens",
    "num_prompt_tokens_cached",
    "num_generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preempted_reqs",
    "num_finished_reqs",
)


def told(session: kvhook.Session) -> dict[str, Any]:
    """What a session says of its one engine."""
    steps, summary = session.steps(), session.summary()
    (engine,) = session.meta["engines"]
    return {
        "sums": {column: int(steps[column].sum()) for column in SUMS if column in (steps.dtype.names or ())},
        "steps": steps["step"].tolist(),
        "levels": sorted(set(steps["level"].tolist())),
        "timed": bool((steps["t_start_ns"] < steps["t_end_ns"]).all()),
        "usage": [float(u) for u in steps["kv_cache_usage"][steps["has_scheduler_stats"] == 1]],
        "running": [int(n) for n in steps["num_running_reqs"][steps["has_scheduler_stats"] == 1]],
        "absent": sorted(engine["absent"]["step"]),
        "adapter": engine["adapter"],
        "lost": summary.records_lost + summary.records_dropped,
        "faults": session.faults,
        "text": str(summary),
        "scheduled in the core": int(session.core_steps()["num_scheduled_tokens"].sum()),
        "ended in the core": len(session.core_requests()),
        "why no core": session.cores().why_none,
    }


def offline(model: str) -> dict[str, Any]:
    """LLM, its stats off as they are by default."""
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    with kvhook.install(level="light") as session:
        llm = LLM(model=model, **SMALL)
        outputs, calls = run_counted(llm)
        return told(session) | {
            "core in this process": "vllm.v1.worker.cpu_worker" in sys.modules,
            "calls": calls,
            "prompts": [len(o.prompt_token_ids) for o in outputs],
            "generated": [len(o.outputs[0].token_ids) for o in outputs],
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "metrics": [o.metrics is not None for o in outputs],
            "log_stats": [llm.llm_engine.log_stats, llm.llm_engine.output_processor.log_stats],
        }


async def online(model: str) -> dict[str, Any]:
    """AsyncLLM, its stats off; all the requests of a call at once, and then one that is aborted."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found, unused-ignore]

    options = {name: value for name, value in SMALL.items() if name != "use_tqdm_on_load"}
    with kvhook.install(level="light") as session:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, disable_log_stats=True, **options))

        async def ask(name: str, prompt: list[int], **sampling: Any) -> Any:
            params = SamplingParams(temperature=0, ignore_eos=True, **sampling)
            async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=name):
                last = output
                if name == "aborted":
                    break
            return last

        outputs: list[Any] = []
        for i, call in enumerate(calm_workload()):
            asked = [ask(f"{i}-{j}", prompt, **call.sampling) for j, prompt in enumerate(call.prompts)]
            outputs += await asyncio.gather(*asked)
        result = told(session) | {
            "prompts": [len(o.prompt_token_ids) for o in outputs],
            "generated": [len(o.outputs[0].token_ids) for o in outputs],
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "log_stats": [engine.log_stats, engine.output_processor.log_stats],
        }
        await ask("aborted", [9] * 40, max_tokens=500)
        await engine.abort("aborted")
        await ask("after", [8] * 40, max_tokens=3)
        result["finished after an abort"] = int(session.steps()["num_finished_reqs"].sum())
        result["faults after an abort"] = session.faults
        engine.shutdown()
    return result


def main() -> None:
    model = sys.argv[1]
    assert "vllm" not in sys.modules
    results: dict[str, Any] = {"LLM": offline(model)}
    gc.collect()
    results["AsyncLLM"] = asyncio.run(online(model))
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
