"""Checks one engine after another in one process, and says as JSON what came of it: run by `test_check.py`.

1. beside an engine that is here already, its session, and its metrics in the process's Prometheus registry;
2. when that has gone;
3. with faults planted in kvhook.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import kvhook
from kvhook.analysis import history
from kvhook.check.inference import check_engine
from kvhook.collector import sources
from kvhook.collector.reading import Reading
from kvhook.demo.engine import ENVIRONMENT
from tests.workloads import SMALL, run, workload


def engines() -> int:
    from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]

    gc.collect()
    return sum(isinstance(one, LLMEngine) for one in gc.get_objects())


def in_registry() -> list[str]:
    from prometheus_client import REGISTRY  # type: ignore[import-not-found, unused-ignore]

    return [metric.name for metric in REGISTRY.collect() if metric.name.startswith("vllm:")]


def checked(folder: Path) -> dict[str, Any]:
    environment = dict(os.environ)
    results = [result._asdict() for result in check_engine(None, folder / "vllm.log")]
    rings = Path(os.environ["KVHOOK_DIR"])
    return {
        "checks": results,
        "installed": kvhook.recording.installation.current_session() is not None,
        "patched": sorted(kvhook.hooks.patched()),
        "engines": engines(),
        "metrics": in_registry(),
        "environment_changed": [n for n in ENVIRONMENT if environment.get(n) != os.environ.get(n)],
        "rings": sorted(each.name for each in rings.glob("*")),
    }


def registry_is_gone(_: Any) -> Reading:
    raise OSError("planted")


def main(model: str, folder: Path) -> None:
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    session = kvhook.install()
    llm = LLM(model=model, **SMALL, disable_log_stats=False)
    run(llm, workload()[:2])
    beside = checked(folder)
    beside["session_is_the_same"] = kvhook.recording.installation.current_session() is session
    steps = len(session.steps(0))
    del llm
    gc.collect()
    kvhook.uninstall()
    alone = checked(folder)

    history._rate = lambda hits, queries: 1.0
    sources.RegistrySource.read = registry_is_gone  # type: ignore[assignment, method-assign]
    faulty = checked(folder)
    print(json.dumps({"beside": beside, "steps_before": steps, "alone": alone, "faulty": faulty}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
