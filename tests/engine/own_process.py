"""Run by test_own_process.py: vLLM as a user has it, with the engine's core in a process of its own.

kvhook is installed before vLLM is imported. Arguments: the model, and the file for the results (JSON).
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import kvhook
from tests.workloads import SMALL, calm_workload, run

SUMS = (
    "num_prompt_tokens",
    "num_prompt_tokens_cached",
    "num_generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preempted_reqs",
    "num_finished_reqs",
    "ttft_count",
    "itl_count",
)


def counters(llm: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        kind = type(metric).__name__
        if kind == "Counter":
            found[metric.name] = found.get(metric.name, 0) + metric.value
        elif kind == "Histogram":
            found[metric.name] = found.get(metric.name, 0) + metric.count
    return found


def run_counted(llm: Any) -> tuple[list[Any], int]:
    """The outputs of the workload, and how often the engine was stepped for it."""
    engine, calls = llm.llm_engine, 0
    step = engine.step

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return step()

    engine.step = counted
    outputs = run(llm, calm_workload())
    del engine.step
    return outputs, calls


def record(session: kvhook.Session, number: int, model: str, **options: Any) -> dict[str, Any]:
    """Run the workload on an engine; `number` is its number in the session."""
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    print(f"=== engine {number}", flush=True)
    llm = LLM(model=model, **SMALL | options)
    before = counters(llm) if options else {}
    outputs, calls = run_counted(llm)
    after = counters(llm) if options else {}
    steps, requests, summary = session.steps(number), session.requests(number), session.summary(number)
    times = steps["t_start_ns"], steps["t_end_ns"]
    return {
        "core in this process": "vllm.v1.worker.cpu_worker" in sys.modules,
        "sums": {column: int(steps[column].sum()) for column in SUMS if column in (steps.dtype.names or ())},
        "counters": {name: value - before[name] for name, value in after.items()},
        "calls": calls,
        "steps": steps["step"].tolist(),
        "in order": bool((times[0] < times[1]).all() and (times[1][:-1] <= times[0][1:]).all()),
        "usage": [float(u) for u in steps["kv_cache_usage"][steps["has_scheduler_stats"] == 1]],
        "blocks": summary.num_kv_blocks,
        "prompts": [len(o.prompt_token_ids) for o in outputs],
        "generated": [len(o.outputs[0].token_ids) for o in outputs],
        "first tokens": [o.metrics.first_token_latency for o in outputs if o.metrics is not None],
        "requests": {
            name: requests[name].tolist()
            for name in ("request_id", "num_generation_tokens", "time_to_first_token")
            if name in (requests.dtype.names or ())
        },
        "absent": {k: sorted(reasons) for k, reasons in session.meta["engines"][number]["absent"].items()},
        "lost": summary.records_lost + summary.records_dropped,
    }


def main() -> None:
    model = sys.argv[1]
    session = kvhook.install()
    assert "vllm" not in sys.modules
    import vllm.v1.engine.llm_engine as module  # type: ignore[import-not-found, unused-ignore]

    results: dict[str, Any] = {"off": record(session, 0, model)}
    gc.collect()
    results["on"] = record(session, 1, model, disable_log_stats=False)
    gc.collect()
    results |= {"faults": session.faults, "rings": [str(ring) for ring in session.rings]}
    print("=== end", flush=True)
    kvhook.uninstall()
    results["patched after"] = [
        name
        for owner in (module, module.LLMEngine, getattr(module, "StatLoggerManager", object))
        for name, value in vars(owner).items()
        if "wrapt" in type(value).__module__
    ]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
