"""Run by test_launched.py, once for each rank: one engine of a job that somebody else has launched (torchrun).

Arguments: the model, a trace, and a folder for the results. All ranks get the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import kvhook
from tests.workloads import SMALL, calm_workload, run


def main() -> None:
    model, trace, folder = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    session = kvhook.install(trace=trace)
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    llm: Any = LLM(model=model, tensor_parallel_size=ranks, distributed_executor_backend="external_launcher", **SMALL)
    outputs = run(llm, calm_workload())
    about = {
        "done": [
            (len(one.prompt_token_ids), list(one.outputs[0].token_ids), one.num_cached_tokens or 0) for one in outputs
        ],
        "pid": os.getpid(),
        "file": str(session.trace().name),
        "faults": session.faults,
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
