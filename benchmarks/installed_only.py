"""What it costs to have kvhook installed and not to use it: step times of an engine with the package and without.

    python benchmarks/installed_only.py               the table; some minutes
    python benchmarks/installed_only.py --pairs 20    narrower intervals
    python benchmarks/installed_only.py --json        one JSON document

Programs run one after the other: in half of them vLLM loads kvhook's plug-in, as it does wherever kvhook is
installed; in the other half `VLLM_PLUGINS` keeps it out, and nothing of kvhook's is ever imported, which is checked.
Each makes the tiny model's engine, once with its core in the same process, once with it in one of its own, and steps
it at batch 1. A pair is one program of each kind, in random order; the figure is the ratio of their median step
times, and what is shown is the median of the ratios with a bootstrap interval of 95 %. It contains 1 if nothing is to
be seen. Needs vLLM.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured_on import machine

ROOT = Path(__file__).resolve().parents[1]
PAIRS, STEPS = 10, 400
CORES = {"core in the process": "0", "core in its own process": "1"}

PROGRAM = """
import json, os, statistics, sys, time

def main():
    from vllm import LLM, SamplingParams
    llm = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=1024, enforce_eager=True, disable_log_stats=True,
              num_gpu_blocks_override=64, gpu_memory_utilization=0.1)
    engine, times = llm.llm_engine, []
    for round in range(3):  # the first warms up
        engine.add_request(str(round), "a b c d", SamplingParams(max_tokens=int(sys.argv[2]), ignore_eos=True))
        while engine.has_unfinished_requests():
            begin = time.perf_counter_ns()
            engine.step()
            times.append((round, time.perf_counter_ns() - begin))
    median = statistics.median(ns for round, ns in times if round)
    modules = sorted(name for name in sys.modules if name.partition(".")[0] == "kvhook")
    print("RESULT" + json.dumps([median, modules]), flush=True)

if __name__ == "__main__":
    main()
"""


def measure(folder: Path, model: str, core: str, installed: bool) -> float:
    """The median step time of one program, in nanoseconds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KVHOOK", "VLLM_PLUGINS"))}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder / 'plugin'}", "VLLM_ENABLE_V1_MULTIPROCESSING": core}
    if not installed:
        environment["VLLM_PLUGINS"] = "none_of_these"
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, folder / "program.py", model, str(STEPS)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not found:
        raise SystemExit(f"the program failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    median, modules = json.loads(found[0].removeprefix("RESULT"))
    if modules != (["kvhook", "kvhook.plugin"] if installed else []):
        raise SystemExit(f"kvhook is {'not loaded as a plug-in' if installed else 'loaded'} in this program: {modules}")
    return float(median)


def make_known_unless_installed(folder: Path) -> None:
    """Write the metadata by which vLLM finds kvhook's plug-in, where kvhook is not installed but a checkout."""
    folder.mkdir()
    if any(point.name == "kvhook" for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        return
    info = folder / "kvhook_entry_point-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvhook-entry-point\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkvhook = kvhook.plugin:load\n")


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of 10,000 resamples."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[9_749]


def run(pairs: int) -> dict[str, Any]:
    """Every pair of every kind of core; ratios are with the package over without."""
    sys.path.insert(0, str(ROOT))
    from kvhook.demo.model import make_tiny_model

    order, results = random.Random(1), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(PROGRAM)
        make_known_unless_installed(folder / "plugin")
        model = str(make_tiny_model(folder / "tiny"))
        for label, core in CORES.items():
            ratios, without = [], []
            for pair in range(pairs):
                times = {}
                for installed in order.sample([False, True], 2):
                    times[installed] = measure(folder, model, core, installed)
                ratios.append(times[True] / times[False])
                without.append(times[False])
                sys.stderr.write(f"{label}: pair {pair + 1} of {pairs}: {ratios[-1]:.3f}\n")
            low, high = interval(ratios)
            results[label] = {
                "ratio": statistics.median(ratios),
                "interval": [low, high],
                "step_us_without": statistics.median(without) / 1e3,
                "pairs": pairs,
            }
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"programs of each kind (default: {PAIRS})")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    results = run(options.pairs)
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}, indent=2))
        return
    print("| | step without | installed, not used | pairs |\n| --- | ---: | ---: | ---: |")
    for label, found in results.items():
        low, high = found["interval"]
        ratio = f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {label} | {found['step_us_without']:,.0f} us | {ratio} | {found['pairs']} |")


if __name__ == "__main__":
    main()
