"""Predicted against real: ``kvhook whatif`` and vLLM's CPU engine at ten cache sizes and three block sizes.

Each workload is recorded once, with blocks of 32 tokens. From that record the hits of every size are predicted, and a
real engine of that size is asked. Writes a table and a picture; takes three minutes or so on two cores.

    python -m benchmarks.whatif_real OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.engine import vllm_here
from tests.whatif.real_workloads import LONGEST, WORKLOADS, Asked

BLOCK_SIZES = (32, 64, 128)
#: Room for so many tokens.
SIZES = (1024, 1280, 1664, 2048, 2560, 3328, 4096, 5376, 6912, 8960)
#: The size that is recorded.
RECORDED = 2560
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_num_seqs": 6,
    "max_num_batched_tokens": 192,
    "max_model_len": LONGEST + 128,
    "seed": 0,
    "use_tqdm_on_load": False,
    "disable_log_stats": True,
}


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder))
    (out / "whatif_real.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(as_table(rows))


def compare(folder: Path) -> list[dict[str, Any]]:
    """A row for each workload, block size and size."""
    import kvhook
    from kvhook.demo.model import make_tiny_model
    from kvhook.whatif.report import what_if
    from kvhook.whatif.runs import run_of, with_block_size

    model = str(make_tiny_model(folder / "model"))
    asked, predicted = {}, {}
    for name, workload in WORKLOADS.items():
        kvhook.uninstall()
        trace = folder / f"{name}.kvh"
        with kvhook.install(trace=trace, core="blocks"):
            asked[name] = Asked(make(model, 32, RECORDED // 32))
            workload(asked[name].send)
        kvhook.uninstall()
        start = time.monotonic()
        for block_size in BLOCK_SIZES:
            requests, run = with_block_size(*run_of(kvhook.open(trace).cores(), name), block_size)
            found = what_if(requests, run, blocks=[size // block_size for size in SIZES])
            predicted[name, block_size] = found
        print(f"{name}: predicted in {time.monotonic() - start:.1f} s", file=sys.stderr)
    rows = []
    for block_size in BLOCK_SIZES:
        for place, size in enumerate(SIZES):
            llm = make(model, block_size, size // block_size)
            for name in WORKLOADS:
                assert llm.reset_prefix_cache()
                real = Asked(llm)
                real.send_again(asked[name].asks)
                said = predicted[name, block_size].sizes[place]
                rows.append(
                    {
                        "workload": name,
                        "block_size": block_size,
                        "blocks": size // block_size,
                        "tokens": size,
                        "query_tokens": real.query_tokens,
                        "real": real.hit_tokens,
                        "predicted": said.hit_tokens,
                        "exact": said.exact,
                        "lru": said.lru_hit_tokens,
                        "preemptions": said.num_preemptions,
                        "why": list(said.why_estimated),
                        "same_answers": real.answers == asked[name].answers,
                    }
                )
            del llm
    return rows


def make(model: str, block_size: int, usable: int) -> Any:
    from vllm import LLM

    vllm_here.collect_engines()
    return LLM(model=model, block_size=block_size, num_gpu_blocks_override=usable + 1, **OPTIONS)


def as_table(rows: list[dict[str, Any]]) -> str:
    """One line for each workload and block size."""
    lines = [
        "| workload | tokens of a block | hit rate, smallest to largest cache | exact | equal where exact "
        "| largest error elsewhere |",
        "|---|---|---|---|---|---|",
    ]
    for name in WORKLOADS:
        for block_size in BLOCK_SIZES:
            mine = [r for r in rows if r["workload"] == name and r["block_size"] == block_size]
            exact = [r for r in mine if r["exact"]]
            other = [100 * abs(r["real"] - r["predicted"]) / r["query_tokens"] for r in mine if not r["exact"]]
            rates = [100 * r["real"] / r["query_tokens"] for r in mine]
            equal = sum(r["real"] == r["predicted"] for r in exact)
            lines.append(
                f"| {name} | {block_size} | {min(rates):.1f} % to {max(rates):.1f} % | {len(exact)} of {len(mine)} "
                f"| {equal} of {len(exact)} | {f'{max(other):.2f} points' if other else '-'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
