"""Run by test_run_ways.py under ``kvhook run``: a program in which an engine comes to life in one way or another.

Arguments: the way, the model, a file for what came back, the exit code.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = [[5 + (n * 31 + i) % 400 for i in range(20 + 9 * n)] for n in range(5)]


def work(model: str, results: str) -> None:
    """An engine that does its work: what each request had goes into a file, with the number of the process."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    from tests.engine import vllm_here
    from tests.workloads import SMALL

    vllm_here.stand_numba()
    llm: Any = LLM(model=model, **SMALL)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=9)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    answers = [(len(one.prompt_token_ids), len(one.outputs[0].token_ids)) for one in done]
    Path(results).write_text(json.dumps({"done": answers, "pid": os.getpid(), "plugin": os.environ.get("MY_PLUGIN")}))


def in_a_child(method: str) -> Callable[[str, str], None]:
    def way(model: str, results: str) -> None:
        context: Any = multiprocessing.get_context(method)
        child = context.Process(target=work, args=(model, results))
        child.start()
        child.join()
        assert child.exitcode == 0

    return way


def become_another(model: str, results: str) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tests.engine.run_ways", "here", model, results, sys.argv[4]])


WAYS: dict[str, Callable[[str, str], None]] = {
    "here": work,
    "spawn": in_a_child("spawn"),
    "fork": in_a_child("fork"),
    "exec": become_another,
}

if __name__ == "__main__":
    WAYS[sys.argv[1]](sys.argv[2], sys.argv[3])
    print("the script's own output")
    sys.exit(int(sys.argv[4]))
