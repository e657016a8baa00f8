"""Run by test_core.py: the same workload on engines whose core is in this process, or forked or spawned, recorded by
kvhook or not. Each engine has a scheduler that writes down what it does (`tests.engine.noting_scheduler`).

Arguments: the model, a folder for the results, and runs such as ``forked:blocks`` or ``spawned:off:killed``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import kvhook
from tests.workloads import SMALL, run, workload


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    for one in sys.argv[3:]:
        _, core, *end = one.split(":")
        results = record(model, folder, one.replace(":", "-"), core, killed=end == ["killed"])
        (folder / f"{one.replace(':', '-')}.json").write_text(json.dumps(results))


def record(model: str, folder: Path, name: str, core: str, *, killed: bool) -> dict[str, Any]:
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    calls = workload()
    os.environ["NOTED"], os.environ["WAVES"] = (
        str(folder / f"{name}.notes"),
        ",".join(str(len(c.prompts)) for c in calls),
    )
    session = kvhook.install(trace=folder / f"{name}.kvh", core=core) if core != "bare" else None
    llm: Any = LLM(
        model=model, scheduler_cls="tests.engine.noting_scheduler.NotingScheduler", disable_log_stats=False, **SMALL
    )
    results: dict[str, Any] = {"outputs": [list(o.outputs[0].token_ids) for o in run(llm, calls)]}
    results["cached"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    if session is not None:
        cores = session.cores()
        results |= {
            "core steps": len(cores.steps()),
            "cores": cores.facts,
            "why none": cores.why_none,
            "lost": cores.lost,
            "faults": session.faults,
        }
    if killed:
        os.kill(results["cores"][0]["pid"], signal.SIGKILL)
        client = llm.llm_engine.engine_core
        # before 0.10 nobody watches the core: the front end would wait for it for ever, with kvhook or without
        if hasattr(client, "start_engine_core_monitor"):
            # a step that is under way when the core dies never comes back, with kvhook or without
            while not client.resources.engine_dead:
                time.sleep(0.01)
            try:
                run(llm, calls)
            except Exception as error:
                results["error"] = type(error).__name__
        else:
            results["error"] = "not noticed"
    start = time.monotonic()
    with contextlib.suppress(Exception):
        llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    results["seconds to end"] = time.monotonic() - start
    if session is not None:
        kvhook.uninstall()
        results["faults after"] = session.faults
    return results


if __name__ == "__main__":
    main()
