"""End to end on a real engine: what recording costs in throughput and step time, against the same engine without.

    python benchmarks/engine_ab.py                     the tiny model, on the CPU engine
    python benchmarks/engine_ab.py --size 0.5b         a 0.5 B Llama with dummy weights, on a GPU
    python benchmarks/engine_ab.py --json              one JSON document

One engine in one process (the worst case: with the core in a process of its own, the front end's work runs beside
the core's). Its stats and kvhook are switched between rounds, and every round runs all arms in a new random order; each
arm warms up with a short batch that is not timed, so that what is compared is the steady state. A figure is the
geometric mean, over the rounds, of the ratio of an arm to its baseline *in the same round*, with a 95 % interval
(bootstrap over rounds). `noise` is the same figure of a second arm without anything against the first: what this
machine makes of no difference at all. Arms:

    off       the user's default: no stats, no kvhook
    noise     the same once more
    light     kvhook.install(level="light"), the user's stats off
    full      kvhook.install(), the user's stats off
    stats     vLLM's own stats on (disable_log_stats=False): Prometheus, log lines
    both      vLLM's own stats on, and kvhook
    poll      vLLM's own stats on, and a thread that calls get_metrics() ten times a second
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# On a CPU: one thread on any core. Two would wait for each other far longer than they work when others use the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import kvhook
from kvhook import hooks
from kvhook.taps import quiet_manager

#: Arm -> whether vLLM's stats are on in the engine, the level at which kvhook records, whether get_metrics() is polled.
ARMS = {
    "off": ("off", None, False),
    "noise": ("off", None, False),
    "light": ("core", "light", False),
    "full": ("quiet", "full", False),
    "stats": ("on", None, False),
    "both": ("on", "full", False),
    "poll": ("on", None, True),
}
#: What an arm is compared with.
BASELINES = {
    "noise": ("off",),
    "light": ("off", "stats"),
    "full": ("off", "stats"),
    "stats": ("off",),
    "both": ("stats",),
    "poll": ("stats",),
}
#: Tokens per request that are generated after switching, before the clock runs.
WARM_UP = 16

SIZES = {
    "tiny": None,
    "0.5b": {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 4096},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
}


def make_engine(size: str, max_num_seqs: int) -> Any:
    """An ``LLM`` with stats on: what is on can be switched off, the other way round it cannot."""
    from vllm import LLM

    common = {"disable_log_stats": False, "max_num_seqs": max_num_seqs, "max_model_len": 1024, "dtype": "bfloat16"}
    if SIZES[size] is None:
        from kvhook.demo.model import make_tiny_model, tiny_model_dir

        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # without it the first step on a CPU takes a minute
        return LLM(model=str(make_tiny_model(tiny_model_dir())), enforce_eager=True, block_size=32, **common)
    folder = Path(tempfile.mkdtemp())
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=32000,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        hidden_act="silu",
        torch_dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **SIZES[size],
    )
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.6,
        compilation_config={"cudagraph_capture_sizes": [1, 8, 64, 256]},
        **common,
    )


class Switch:
    """Puts one engine into the state of an arm."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.manager = self.engine.logger_manager
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.session: Any = None
        self.stop: Callable[[], None] = lambda: None

    def to(self, arm: str) -> None:
        """Switch stats, kvhook and the poller as the arm wants them."""
        stats, level, polled = ARMS[arm]
        in_front = stats in ("quiet", "on")
        self.engine.log_stats = self.engine.output_processor.log_stats = in_front
        self.engine.output_processor.lora_states.log_stats = in_front
        self.scheduler.log_stats = self.scheduler.kv_cache_manager.log_stats = stats != "off"
        self.engine.logger_manager = self.manager if stats == "on" else None
        if stats == "quiet":
            from vllm.v1.metrics.loggers import StatLoggerManager

            self.engine.logger_manager = quiet_manager(StatLoggerManager)
        if level:
            self.session = kvhook.install(level=level)
            hooks._read_settings()
            hooks.watch(self.engine, stats_were_on=stats == "on")
        if polled:
            self.stop = poll(self.engine)

    def back(self) -> None:
        """Take kvhook and the poller out again."""
        self.stop()
        self.stop = lambda: None
        kvhook.uninstall()


def poll(engine: Any) -> Callable[[], None]:
    """Call get_metrics() ten times a second in a thread; gives what ends it."""
    end = threading.Event()

    def run() -> None:
        while not end.wait(0.1):
            engine.get_metrics()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def stop() -> None:
        end.set()
        thread.join()

    return stop


def run_batch(llm: Any, batch: int, tokens: int, salt: int) -> tuple[float, list[float]]:
    """Generate `tokens` tokens for each of `batch` requests; gives seconds in all and for each step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
    for i in range(batch):
        prompt = [(salt * 31 + i * 7 + j * 3) % 400 + 10 for j in range(16)]
        engine.add_request(f"{salt}-{i}", {"prompt_token_ids": prompt}, params)
    steps = []
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    return time.perf_counter() - begin, steps


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 95 % interval, by bootstrap over the rounds."""
    logs = np.log(ratios)
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (4000, len(logs))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def compare(llm: Any, switch: Switch, batch: int, rounds: int, tokens: int, arms: list[str]) -> dict[str, Any]:
    """All arms at one batch size."""
    wall: dict[str, list[float]] = {arm: [] for arm in arms}
    median: dict[str, list[float]] = {arm: [] for arm in arms}
    tail: dict[str, list[float]] = {arm: [] for arm in arms}
    recorded = driven = 0
    for salt in range(rounds + 1):
        for arm in random.sample(arms, len(arms)):
            switch.to(arm)
            _, before = run_batch(llm, batch, min(WARM_UP, tokens), salt)
            seconds, steps = run_batch(llm, batch, tokens, salt)
            if ARMS[arm][1]:
                driven += len(before) + len(steps)
                recorded += len(switch.session.steps())
            switch.back()
            if salt:  # the first round warms up
                wall[arm].append(seconds)
                median[arm].append(float(np.median(steps)))
                tail[arm].append(float(np.quantile(steps, 0.99)))
        print(f"\rbatch {batch}: round {salt} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = {}
    for arm in arms:
        row: dict[str, Any] = {"step_ms_p50": 1e3 * float(np.median(median[arm])), "against": {}}
        for base in BASELINES.get(arm, ()):
            if base in arms:
                row["against"][base] = {
                    "throughput": interval(np.array(wall[base]) / np.array(wall[arm])),
                    "step_p50": interval(np.array(median[arm]) / np.array(median[base])),
                    "step_p99": interval(np.array(tail[arm]) / np.array(tail[base])),
                }
        rows[arm] = row
    return {"batch": batch, "rounds": rounds, "tokens": tokens, "arms": rows, "steps": driven, "recorded": recorded}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=100, help="tokens per request and round")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    from hook_cost import machine

    llm = make_engine(args.size, max(args.batches))
    switch = Switch(llm)
    results = [compare(llm, switch, b, args.rounds, args.tokens, args.arms) for b in args.batches]
    about = machine() | {"model": args.size, "device": str(llm.llm_engine.vllm_config.device_config.device_type)}
    document = json.dumps({"machine": about, "results": results}, indent=1)
    if args.out:
        args.out.write_text(document)
    if args.json:
        print(document)
        return 0
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    for r in results:
        share = r["recorded"] / r["steps"] if r["steps"] else float("nan")
        print(f"\nbatch {r['batch']}, {r['rounds']} rounds of {r['tokens']} tokens; {share:.2%} of the steps recorded")
        print(f"  {'arm':8}{'step p50':>12}   {'throughput':24}{'step p50':24}{'step p99':24}against")
        for arm, row in r["arms"].items():
            for base, ratios in (row["against"] or {"": {}}).items():
                cells = "".join(f"{_ratio(ratios.get(k)):24}" for k in ("throughput", "step_p50", "step_p99"))
                print(f"  {arm:8}{row['step_ms_p50']:9.3f} ms   {cells}{base}")
    return 0


def _ratio(cells: tuple[float, float, float] | None) -> str:
    return "" if cells is None else f"{cells[0]:.3f} [{cells[1]:.3f}, {cells[2]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
