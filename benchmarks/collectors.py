"""The ways to see what a KV cache does, against each other and against the truth.

    python benchmarks/collectors.py                      all of it, some seven minutes on two cores
    python benchmarks/collectors.py --quick              a minute: fewer rounds, and no API server
    python benchmarks/collectors.py --json               one JSON document
    python benchmarks/collectors.py --plot usage.svg     a picture of one run as each way saw it (or .png)

The ways: kvhook (its ring, read by another process; `session.steps()`), its `VLLMMetricsCollector` monitoring in the
background, polling `LLM.get_metrics()`, vLLM's log line, and, at the real API server, scraping its Prometheus endpoint.

**What is true** comes from the engine core itself, by wrapping its scheduler (`collecting/truth.py`): neither kvhook
nor vLLM's stats have a part in it. At the API server the same is done by a plug-in in the engine core's process. The
totals of the truth are compared with vLLM's own counters at the end of each run, and a difference is said. "Peak" is
the highest usage at the end of a step, which is what vLLM reports and all that any of the ways can see; how high it was
inside of a step is printed beside it.

**What is seen** is of one run with all the ways at work at once, so that all had the same to see; the engine is then
slower than with one of them, and so are they. `steps seen`: share of the engine steps whose state was shown at all.
`peak found`: the highest usage that was shown, and in brackets what a look at this interval finds on average and at
least, over all moments at which it could have begun: arithmetic on the true run. `hit rate`: hits / queries of the run
as last shown before it ended; a poll after the end has the exact totals of every counter, so what a poller gets wrong
here is the course of the run, not its sum. The log line's is of the last 1000 requests, by vLLM's design. `delay`: from
the end of a step in the engine core to the end of the first look that showed it (of the log line: to its being
written). Where nothing comes by itself (`session.steps()`, the collector) it is what the answer takes when asked; each
answer is checked to have all steps that had ended.

**What it costs** is measured apart, each way alone, in rounds that do the same work with each way in a random order;
a figure is the geometric mean over the rounds of throughput against the same engine with its stats off *in the same
round*, with a 95 % interval (bootstrap over rounds). "stats off, once more" is the baseline against itself: the noise.
All that needs vLLM's stats (polling, scraping, the log line) has both of vLLM's loggers on, as it comes. The reader of
the ring is a process that the engine cannot notice (`ring_reader_cost.py`); its row costs what kvhook costs.

The cache is small and the model tiny, so that usage moves and a step takes a few milliseconds: with slower steps a
poller sees more of them. Needs vLLM 0.11.1 or newer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from collecting import load, offline, server
from collecting.looks import Run

#: Set unless the user has set them: the core in this process, quick to start, nothing fetched and nothing reported. One
#: thread for the kernels of a CPU engine, on any core: it leaves the other core to those who look.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

#: Batches of the run that is looked at, batches of a round, rounds; the last two also for the API server.
FULL = {"batches": 240, "round_batches": 6, "rounds": 30, "server_batches": 150, "server_rounds": 20}
QUICK = {"batches": 24, "round_batches": 2, "rounds": 2, "server_batches": 0, "server_rounds": 0}
#: Seconds after the start at which vLLM's first log line of the run is due.
FIRST_LINE = {"full": 10.0, "quick": 3.0}


def said(text: str) -> None:
    """Progress, on standard error."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def measure(size: dict[str, int], folder: Path, first_line: float) -> tuple[dict[str, Any], offline.Seen]:
    """All figures as one document, and the run in this process for the picture."""
    from measured_on import machine

    said("the engine starts")
    engine = offline.Engine(folder)
    engine.drive(load.batches(10, seed=1))
    said("one run, seen in every way")
    seen = offline.see(engine, load.batches(size["batches"], seed=2), first_line)
    costs = offline.costs(engine, size["rounds"], size["round_batches"], said)
    costs[offline.KVHOOK_RING] = costs[offline.KVHOOK_STEPS]
    about = machine() | {
        "device": str(engine.engine.vllm_config.device_config.device_type),
        "omp_threads": os.environ["OMP_NUM_THREADS"],
    }
    document: dict[str, Any] = {"machine": about, "size": size}
    document["in_this_process"] = part(seen.run, seen.figures, costs, seen.counters)
    if size["server_batches"]:
        said("two API servers start")
        with server.two_servers(folder) as (on, off):
            for one in (on, off):
                server.Client().drive(one, load.batches(10, seed=1))
            said("one run of the API server, seen in every way")
            run, figures, counters = server.see(on, load.batches(size["server_batches"], seed=2))
            costs = server.costs(on, off, size["server_rounds"], size["round_batches"], said)
        costs[offline.LOG_LINE] = costs.pop(server.ON)
        document["api_server"] = part(run, figures, costs, counters)
    said("")
    return document, seen


def part(run: Run, figures: dict[str, Any], costs: dict[str, Any], counters: dict[str, int]) -> dict[str, Any]:
    """The figures of one kind of engine."""
    total = {"tokens": int(run.tokens[-1]), "queries": int(run.queries[-1]), "hits": int(run.hits[-1])}
    return {
        "run": run.about() | {"vllm_counters_agree": total == counters, "vllm_counters": counters, "truth": total},
        "ways": {name: seen | {"cost": costs.get(name)} for name, seen in figures.items()},
        "noise": costs[offline.AGAIN],
        "only_costs": {name: cost for name, cost in costs.items() if name not in (*figures, offline.AGAIN)},
    }


# ---- for people ----------------------------------------------------------------------------------------------------

HEAD = ("way", "steps seen", "peak found (mean, least)", "hit rate", "delay p50", "p99", "throughput against stats off")
WIDTHS = (62, 11, 27, 9, 11, 11, 0)


def table(title: str, one: dict[str, Any]) -> list[str]:
    """A part of the document as lines."""
    run = one["run"]
    lines = [
        title,
        f"  {run['steps']} engine steps in {run['seconds']:.1f} s, {run['step_interval_ms_p50']:.1f} ms apart; peak "
        f"{run['usage_peak']:.1%} (inside of a step {run['usage_peak_inside_of_a_step']:.1%}), "
        f"{run['share_of_steps_within_5_points_of_the_peak']:.1%} of the steps within 5 points of it; "
        f"hit rate {run['hit_rate']:.2%}",
    ]
    if not run["vllm_counters_agree"]:
        lines.append(f"  vLLM's counters differ from the truth: {run['vllm_counters']}, {run['truth']}")
    lines.append("  " + "".join(f"{cell:{width}}" for cell, width in zip(HEAD, WIDTHS, strict=True)))
    for name, way in one["ways"].items():
        cells = (name, *cells_of(way))
        lines.append("  " + "".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    lines += [f"  {name}: {ratio(cost)}" for name, cost in one["only_costs"].items()]
    lines.append(f"  noise: {offline.AGAIN}, {ratio(one['noise'])}")
    return lines


def cells_of(way: dict[str, Any]) -> tuple[str, ...]:
    """A way's figures as text, in the order of `HEAD`."""
    peak = "-" if way["peak_found"] is None else f"{way['peak_found']:.1%}"
    if phases := way.get("peak_at_any_phase"):
        peak += f" ({phases['mean']:.1%}, {phases['least']:.1%})"
    rate = "-" if way["hit_rate_found"] is None else f"{way['hit_rate_found']:.2%}"
    delay = way["delay_ms"]
    return (
        f"{way['share_of_steps']:.2%}",
        peak,
        rate,
        time_of(delay["p50"]),
        time_of(delay["p99"]),
        ratio(way["cost"]),
    )


def time_of(ms: float | None) -> str:
    """Milliseconds as text."""
    if ms is None:
        return "never"
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1e3:.1f} s"


def ratio(cost: dict[str, Any] | None) -> str:
    """A throughput with its interval."""
    if cost is None:
        return "-"
    mean, low, high = cost["throughput"]
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(seen: offline.Seen, path: Path, vllm: str) -> None:
    """The picture."""
    from collecting import plot

    names = {
        offline.KVHOOK_STEPS: "kvhook",
        offline.polled(10): "get_metrics() at 10 Hz",
        offline.polled(1): "get_metrics() at 1 Hz",
        offline.LOG_LINE: "vLLM's log line, every 10 s",
    }
    panels = [(title, seen.looks[name], seen.figures[name]) for name, title in names.items()]
    plot.draw(seen.run, panels, path, f"One run of {len(seen.run.t)} engine steps (vLLM {vllm}), seen in four ways")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute: fewer rounds, and no API server")
    parser.add_argument("--no-server", action="store_true", help="without the API server")
    parser.add_argument("--rounds", type=int, help="rounds for the costs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw one run as each way saw it; .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed here; `make test` installs its CPU build")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib (or 'kvhook[plot]')")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot draws .svg or .png, not {args.plot.suffix or args.plot}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    size = dict(QUICK if args.quick else FULL)
    if args.no_server:
        size["server_batches"] = 0
    if args.rounds:
        size["rounds"] = size["server_rounds"] = args.rounds
    with tempfile.TemporaryDirectory(prefix="kvhook-collectors-") as folder:
        document, seen = measure(size, Path(folder), FIRST_LINE["quick" if args.quick else "full"])
    if args.plot:
        draw(seen, args.plot, document["machine"]["vllm"])
    if args.json:
        print(json.dumps(document, indent=1))
        return 0
    print(", ".join(f"{k}: {v}" for k, v in document["machine"].items()))
    for key, title in (("in_this_process", "LLM, in this process"), ("api_server", "the API server")):
        if key in document:
            print("\n" + "\n".join(table(title, document[key])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
