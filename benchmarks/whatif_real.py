"""Predicted against real: ``kvhook whatif`` and vLLM's CPU engine at ten cache sizes and three block sizes.

Each workload is recorded once, with blocks of 32 tokens. From that record the hits of every size are predicted, and a
real engine of that size is asked. Writes a table and a picture; takes five minutes or so on two cores. With SECONDS it
ends after so long, and goes on where it was when it is started again.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python -m benchmarks.whatif_real OUT_FOLDER [SECONDS]
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.engine import vllm_here
from tests.whatif.real_workloads import LONGEST, WORKLOADS, Ask, Asked

BLOCK_SIZES = (32, 64, 128)
#: Room for so many tokens.
SIZES = (1024, 1280, 1664, 2048, 2560, 3328, 4096, 5376, 6912, 8960)
#: Those that the picture names.
TICKS = (1024, 2048, 4096, 8192)
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
    # for other devices: '{"gpu_memory_utilization": 0.05, "async_scheduling": false}'
    **json.loads(os.environ.get("WHATIF_OPTIONS", "{}")),
}


def main() -> None:
    """Record what is not recorded yet, and go on with the engines that have not been asked yet, for so many seconds."""
    out, most = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + most
    model = out / "model"
    if not model.exists():
        from kvhook.demo.model import make_tiny_model

        make_tiny_model(model)
    asks = {name: record(str(model), out, name) for name in WORKLOADS if time.monotonic() < end}
    file = out / "whatif_real.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["block_size"], row["tokens"]) for row in rows}
    for block_size, size in itertools.product(BLOCK_SIZES, SIZES):
        if (block_size, size) not in done and time.monotonic() < end:
            rows += ask(str(model), block_size, size, asks)
            file.write_text(json.dumps(rows, indent=1) + "\n")
    complete = len(rows) == len(WORKLOADS) * len(BLOCK_SIZES) * len(SIZES)
    print("\n".join(as_table(compare(out, rows))) if complete else f"{len(rows)} rows: go on with the same command")
    if complete and importlib.util.find_spec("matplotlib") is None:
        print("there is no matplotlib here, and so no picture")
    elif complete:
        draw(compare(out, rows), out / "whatif_real.png")


def record(model: str, out: Path, name: str) -> Asked:
    """What was sent, and answered, when the workload was recorded."""
    import kvhook

    trace, sent = out / f"{name.replace(' ', '-')}.kvh", out / f"{name.replace(' ', '-')}.sent.json"
    asked = Asked(None)
    if not sent.exists():
        kvhook.uninstall()
        with kvhook.install(trace=trace, core="blocks"):
            asked.llm = make(model, 32, RECORDED // 32)
            WORKLOADS[name](asked.send)
        kvhook.uninstall()
        sent.write_text(json.dumps([asked.asks, asked.answers]))
    asks, answers = json.loads(sent.read_text())
    asked.llm, asked.asks, asked.answers = None, [Ask(*one) for one in asks], answers
    return asked


def ask(model: str, block_size: int, size: int, recorded: dict[str, Asked]) -> list[dict[str, Any]]:
    """What a real engine of this size finds: a row for each workload."""
    llm = make(model, block_size, size // block_size)
    rows = []
    for name, asked in recorded.items():
        assert llm.reset_prefix_cache()
        real = Asked(llm)
        real.send_again(asked.asks)
        rows.append(
            {
                "workload": name,
                "block_size": block_size,
                "tokens": size,
                "query_tokens": real.query_tokens,
                "real": real.hit_tokens,
                "same_answers": real.answers == asked.answers,
            }
        )
    return rows


def compare(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what is predicted."""
    import kvhook
    from kvhook.whatif.report import what_if
    from kvhook.whatif.runs import run_of, with_block_size

    found = []
    for name, block_size in itertools.product(WORKLOADS, BLOCK_SIZES):
        trace = kvhook.open(out / f"{name.replace(' ', '-')}.kvh")
        requests, run = with_block_size(*run_of(trace.cores(), name), block_size)
        told = what_if(requests, run, blocks=[size // block_size for size in SIZES])
        by_size = dict(zip(SIZES, told.sizes, strict=True))
        for row in rows:
            if (row["workload"], row["block_size"]) == (name, block_size):
                size = by_size[row["tokens"]]
                found.append(
                    {
                        **row,
                        "blocks": size.blocks,
                        "predicted": size.hit_tokens,
                        "exact": size.exact,
                        "lru": size.lru_hit_tokens,
                        "preemptions": size.num_preemptions,
                    }
                )
    return found


def make(model: str, block_size: int, usable: int) -> Any:
    from vllm import LLM

    vllm_here.collect_engines()
    return LLM(model=model, block_size=block_size, num_gpu_blocks_override=usable + 1, **OPTIONS)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture for each workload: the engine's hits as dots, the predicted ones as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    places = figure.subplots(2, 3, sharey=True).flat
    for axes, name in zip(places, WORKLOADS, strict=False):
        for color, block_size in enumerate(BLOCK_SIZES):
            mine = [r for r in rows if r["workload"] == name and r["block_size"] == block_size]
            sizes = [r["tokens"] for r in mine]
            for what, style in (("predicted", "-"), ("real", "o"), ("lru", ":")):
                shares = [100 * r[what] / r["query_tokens"] for r in mine]
                label = f"{block_size}, {what}" if what != "lru" else None
                axes.plot(sizes, shares, style, color=f"C{color}", label=label, markersize=4)
        axes.set(title=name, xscale="log", xlabel="tokens of KV cache", ylabel="prompt tokens found, %")
        axes.set_xticks(TICKS, [f"{tokens:,}" for tokens in TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes[len(WORKLOADS) :]:
        axes.axis("off")
        axes.legend(handles, labels, title="tokens of a block\n(dotted: plain LRU)", loc="center")
    figure.savefig(path, dpi=110)


def as_table(rows: list[dict[str, Any]]) -> list[str]:
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
    return lines


if __name__ == "__main__":
    main()
