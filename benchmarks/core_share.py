"""What recording inside the engine core takes of the core's own steps, by the clock of the core: in this process and in
one of its own.

    python benchmarks/core_share.py                    the tiny model, on the CPU engine
    python benchmarks/core_share.py --size 8b          an 8 B Llama with dummy weights, on a GPU
    python benchmarks/core_share.py --json             one JSON document

For each process and level a new engine decodes batches of each size. Every core step says what kvhook took in it and
how long it took from ``schedule`` to the end of ``update_from_output``. No second engine is needed to compare with, so
that other work on the machine moves both alike. `kvhook_ns` is the end of ``schedule`` and of ``update_from_output``,
with the records packed and published, the ledger's too. Not in it are the calls of the taps (some 1.5 us) and what they
do when a block changes hands, here once in 32 tokens of a request: `engine_ab.py` measures it all.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

#: Steps at the beginning of a batch that are left out: prefill, and warming up.
WARM_UP = 20


def measure(size: str, level: str, batches: list[int], steps: int) -> list[dict[str, Any]]:
    """One engine in the process that the environment says."""
    import numpy as np
    from engine_ab import make_engine
    from vllm import SamplingParams

    import kvhook

    session = kvhook.install(core=level)
    llm: Any = make_engine(size, max(batches))
    rows = []
    for batch in batches:
        before = len(session.core_steps())
        prompts = [{"prompt_token_ids": [2 + (i * 31 + j) % 400 for j in range(16)]} for i in range(batch)]
        params = SamplingParams(max_tokens=steps + WARM_UP, ignore_eos=True, temperature=0, detokenize=False)
        llm.generate(prompts, params, use_tqdm=False)
        core = session.core_steps()[before:][WARM_UP:-1]
        took, own = core["t_end_ns"] - core["t_schedule_ns"], core["kvhook_ns"]
        known = own >= 0
        rows.append(
            {
                "batch": batch,
                "steps": int(known.sum()),
                "step_ms_p50": float(np.median(took)) / 1e6,
                "kvhook_us_p50": float(np.median(own[known])) / 1e3,
                "share": float(own[known].sum() / took[known].sum()),
                "share_p50": float(np.median(own[known] / took[known])),
            }
        )
    del llm
    gc.collect()
    kvhook.uninstall()
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "0.5b", "8b"), default="tiny", help="the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=400, help="decoding steps of each batch")
    parser.add_argument("--levels", nargs="+", choices=("steps", "blocks"), default=["steps", "blocks"])
    parser.add_argument("--where", nargs="+", choices=("here", "own"), default=["here", "own"])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.size, args.one, args.batches, args.steps)))
        return 0
    results = []
    for where in args.where:
        for level in args.levels:
            command = [sys.executable, __file__, "--one", level, "--size", args.size, "--steps", str(args.steps)]
            done = subprocess.run(
                [*command, "--batches", *map(str, args.batches)],
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(where == "own"))},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results += [{"where": where, "level": level, **row} for row in json.loads(done.stdout.splitlines()[-1])]
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    print(f"{'core':8}{'level':10}{'batch':>6}{'steps':>8}{'step p50':>12}{'kvhook p50':>14}{'share':>9}{'p50':>9}")
    for row in results:
        print(
            f"{row['where']:8}{row['level']:10}{row['batch']:6}{row['steps']:8}{row['step_ms_p50']:9.2f} ms"
            f"{row['kvhook_us_p50']:11.1f} us{row['share']:9.2%}{row['share_p50']:9.2%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
