"""Records one workload, the same on every vLLM of the matrix. Arguments: the model's folder, and the trace to write.

Run by matrix.py with the Python of the release, after the tests. Which engine it is, vLLM's own variables say.
"""

from __future__ import annotations

import os
import sys

import kvhook
from tests.engine import vllm_here
from tests.workloads import run, workload


def main(model: str, trace: str) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = vllm_here.no_binding()
    with kvhook.install(trace=trace) as session:
        from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

        outputs = run(LLM(model=model, **vllm_here.options()), workload())
        steps = session.steps()
        print(session.summary())
    generated = sum(len(one.outputs[0].token_ids) for one in outputs)
    # told apart by what they say, where the exit code alone would not
    assert session.faults == {}, session.faults
    assert int(steps["num_generation_tokens"].sum()) == generated, "the trace has other tokens than the outputs"
    print(
        f"{len(outputs)} requests, {generated} tokens, {len(steps)} steps, "
        f"{len(steps.dtype.names or ())} columns in {trace}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
