"""End to end on a real engine: what recording costs in throughput and step time, against the same engine without.

    python benchmarks/engine_ab.py                     the tiny model, on the CPU engine
    python benchmarks/engine_ab.py --size 0.5b         a 0.5 B Llama with dummy weights, on a GPU
    python benchmarks/engine_ab.py --json              one JSON document

One engine in one process (the worst case: with the core in a process of its own, the front end's work runs beside
the core's), decoding batch after batch. Its stats, kvhook and what else an arm wants are switched every few steps, in
a new random order in every cycle; the first steps of such a block warm up and are not counted. A figure is the
geometric mean, over the cycles, of the ratio of an arm to its baseline *in the same cycle*, some tenths of a second
apart, with a 95 % interval (bootstrap over the cycles); `typical` is the median in place of the mean, which stalls
that hit one arm or another by chance do not move. `noise` is the same figure of a second arm without anything against
the first: what this machine makes of no difference at all. All arms have the spools of all sessions beside them, which
take 0.07 % of a processor each (`spool.py`). Arms:

    off       the user's default: no stats, no kvhook
    noise     the same once more
    core      the engine core makes its stats, and nobody takes them: what level light makes vLLM do
    light     kvhook.install(level="light"), the user's stats off
    made      the front end makes its stats too, and nobody takes them: what level full makes vLLM do
    full      kvhook.install(), the user's stats off
    stats     vLLM's own stats on (disable_log_stats=False): Prometheus, log lines
    both      vLLM's own stats on, and kvhook
    poll      vLLM's own stats on, and a thread that calls get_metrics() ten times a second of this arm's time
    steps     inside the engine core: what kvhook.install(core="steps") adds, and nothing else; no stats
    blocks    the same with core="blocks"
    core_spared   as core, but `Scheduler.make_stats` makes none: the most that can be spared of the core's part
    made_spared   as made, but no output is counted into the `IterationStats`: the most that can be spared in front
    light_python, full_python   as light and full, on the step path in Python although the one in C is there
    steps_python, blocks_python   as steps and blocks, counted in Python in the same way
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

from switching import ARMS, Plug

#: What an arm is compared with.
BASELINES = {
    "noise": ("off",),
    "core": ("off",),
    "light": ("off", "core", "light_python", "stats"),
    "light_python": ("off", "core"),
    "made": ("off",),
    "core_spared": ("off", "core"),
    "made_spared": ("off", "made"),
    "full": ("off", "made", "full_python", "stats"),
    "full_python": ("off", "made"),
    "stats": ("off",),
    "both": ("stats",),
    "poll": ("stats",),
    "steps": ("off", "steps_python"),
    "blocks": ("off", "blocks_python"),
    "steps_python": ("off",),
    "blocks_python": ("off",),
}
#: What is compared: of the cycles, and of all steps.
FIGURES = ("throughput", "typical", "step_p50", "step_p99")
#: Steps of a block, and how many at its beginning are not counted.
BLOCK, WARM_UP = 20, 4
#: What steps are measured by.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
#: Seconds between two calls of get_metrics().
POLL = 0.1
#: Tokens of a prompt, and tokens generated before the next batch is sent.
PROMPT, GENERATED = 16, 900

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


class Poller:
    """Calls get_metrics() in a thread, ten times a second of the time in which it is on."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.due = threading.Event()
        self.over = False
        self.on_for = 0.0
        self.since = 0.0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def begin(self) -> None:
        self.since = time.perf_counter()
        if self.on_for >= POLL:
            self.on_for -= POLL
            self.due.set()

    def end(self) -> None:
        if self.since:
            self.on_for += time.perf_counter() - self.since

    def close(self) -> None:
        self.over = True
        self.due.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.over:
            self.due.wait()
            self.due.clear()
            if not self.over:
                self.engine.get_metrics()


class Load:
    """Batches of requests that decode in step; the steps in which one begins are not given to anybody."""

    def __init__(self, llm: Any, batch: int, clock: Callable[[], float]) -> None:
        self.engine = llm.llm_engine
        self.batch, self.clock = batch, clock
        self.sent = self.left = 0

    def steps(self, count: int) -> list[float]:
        """Seconds of so many steps of decoding."""
        if self.left < count:
            self.renew()
        self.left -= count
        out = []
        step, clock = self.engine.step, self.clock
        for _ in range(count):
            start = clock()
            step()
            out.append(clock() - start)
        return out

    def renew(self) -> None:
        """End what is left, send a new batch, and run it until all of it decodes."""
        from vllm import SamplingParams

        self.end()
        params = SamplingParams(max_tokens=GENERATED, ignore_eos=True, temperature=0, detokenize=False)
        for i in range(self.batch):
            self.sent += 1
            prompt = [(self.sent * 31 + i * 7 + j * 3) % 400 + 10 for j in range(PROMPT)]
            self.engine.add_request(str(self.sent), {"prompt_token_ids": prompt}, params)
        for _ in range(8):
            self.engine.step()
        self.left = GENERATED - 16

    def end(self) -> None:
        """Finish the batch."""
        while self.engine.has_unfinished_requests():
            self.engine.step()


def interval(ratios: np.ndarray, middle: Any = np.mean) -> tuple[float, float, float]:
    """Geometric mean of ratios (or their median) and its 95 % interval, by bootstrap over the cycles."""
    logs = np.log(ratios)
    rng = np.random.default_rng(0)
    middles = middle(rng.choice(logs, (4000, len(logs))), axis=1)
    low, high = np.quantile(middles, (0.025, 0.975))
    return float(np.exp(middle(logs))), float(np.exp(low)), float(np.exp(high))


def compare(llm: Any, vllms: Any, batch: int, seconds: float, arms: list[str], clock: str = "wall") -> dict[str, Any]:
    """All arms at one batch size, for some seconds."""
    plugs = {arm: Plug(llm, arm, Poller) for arm in arms}
    for plug in plugs.values():
        plug.make(vllms)
    load = Load(llm, batch, CLOCKS[clock])
    total: dict[str, list[float]] = {arm: [] for arm in arms}
    single: dict[str, list[float]] = {arm: [] for arm in arms}
    driven = dict.fromkeys(arms, 0)
    begin, cycles = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or cycles < 3:
        for arm in random.sample(arms, len(arms)):
            if load.left < BLOCK:
                load.renew()  # without any arm
            plugs[arm].put_in()
            steps = load.steps(BLOCK)
            plugs[arm].out()
            driven[arm] += BLOCK
            if cycles:  # the first warms up
                total[arm].append(sum(steps[WARM_UP:]))
                single[arm] += steps[WARM_UP:]
        cycles += 1
        if sys.stderr.isatty():
            print(f"\rbatch {batch}: {cycles} cycles", end="", file=sys.stderr, flush=True)
    print(f"\rbatch {batch}: {cycles} cycles", file=sys.stderr, flush=True)
    load.end()
    rows = {}
    for arm in arms:
        plug = plugs[arm]
        plug.close()
        row: dict[str, Any] = {"step_ms_p50": 1e3 * float(np.median(single[arm])), "against": {}}
        if plug.session:
            summary = plug.session.summary()
            row |= {"steps": driven[arm], "recorded": summary.steps, "kvhook_us_p50": summary.kvhook_ns_p50 / 1e3}
            if summary.vllm_stats_ns_p50 is not None:
                row["vllm_stats_us_p50"] = summary.vllm_stats_ns_p50 / 1e3
        for base in BASELINES.get(arm, ()):
            if base in arms:
                row["against"][base] = {
                    "throughput": interval(np.array(total[base]) / np.array(total[arm])),
                    "typical": interval(np.array(total[base]) / np.array(total[arm]), np.median),
                    "step_p50": quantiles(single[arm], single[base], 0.5),
                    "step_p99": quantiles(single[arm], single[base], 0.99),
                }
        rows[arm] = row
    return {"batch": batch, "cycles": cycles - 1, "steps_per_block": BLOCK - WARM_UP, "arms": rows}


def quantiles(ours: list[float], theirs: list[float], q: float) -> tuple[float, float, float]:
    """Ratio of a quantile of all steps, with its 95 % interval: bootstrap over the blocks that they came in."""
    size = BLOCK - WARM_UP
    a, b = (np.array(x).reshape(-1, size) for x in (ours, theirs))
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(300):
        pick = rng.integers(0, len(a), len(a))
        ratios.append(np.quantile(a[pick], q) / np.quantile(b[pick], q))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(np.quantile(a, q) / np.quantile(b, q)), float(low), float(high)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, for each batch size")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="'processor' counts the processor time of this process: for a CPU engine on a machine that others use",
    )
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    from measured_on import machine

    llm = make_engine(args.size, max(args.batches))
    vllms = llm.llm_engine.logger_manager
    results = [compare(llm, vllms, b, args.seconds, args.arms, args.clock) for b in args.batches]
    about = machine() | {
        "clock": args.clock,
        "model": args.size,
        "device": str(llm.llm_engine.vllm_config.device_config.device_type),
    }
    document = json.dumps({"machine": about, "results": results}, indent=1)
    if args.out:
        args.out.write_text(document)
    if args.json:
        print(document)
        return 0
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    for r in results:
        print(f"\nbatch {r['batch']}, {r['cycles']} cycles of {r['steps_per_block']} steps for each arm")
        print(f"  {'arm':14}{'step p50':>12}   {'throughput':24}{'typical':24}{'step p50':24}{'step p99':24}against")
        for arm, row in r["arms"].items():
            for base, ratios in (row["against"] or {"": {}}).items():
                cells = "".join(f"{_ratio(ratios.get(figure)):24}" for figure in FIGURES)
                print(f"  {arm:14}{row['step_ms_p50']:9.3f} ms   {cells}{base}")
            if "steps" in row:
                made = f"; vLLM's stats for it {row['vllm_stats_us_p50']:.1f} us" if "vllm_stats_us_p50" in row else ""
                share = row["recorded"] / row["steps"]
                print(f"  {'':23}{share:.2%} of the steps recorded; kvhook's own {row['kvhook_us_p50']:.1f} us{made}")
    return 0


def _ratio(cells: tuple[float, float, float] | None) -> str:
    return "" if cells is None else f"{cells[0]:.3f} [{cells[1]:.3f}, {cells[2]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
