"""An API server under load, with kvhook and without, in turn: is every step there, and do clients notice?

    python benchmarks/server_load.py --clients 50 --seconds 60 --pairs 2

With kvhook, readers of the ring are killed with ``kill -9`` all the time, and half-way the ring's file is removed. The
tokens in the trace must be those that clients were given and those of /metrics, and no record may be lost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.serving import Answer, Server, load, server  # noqa: E402 (the checkout is not a package)


class Run(NamedTuple):
    """What one server did: answers, names in /metrics, and what the trace holds of it."""

    answers: list[Answer]
    names: set[str]
    trace: dict[str, Any]


def disturb(rings: Path, until: threading.Event, half: float) -> None:
    """Start readers and kill them; half-way, remove the rings' names."""
    begin, removed = time.monotonic(), False
    while not until.wait(0.2):
        command = [sys.executable, "-m", "kvhook", "tail", "--dir", str(rings), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        reader = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until.wait(2.0)
        reader.kill()
        reader.wait()
        if not removed and time.monotonic() - begin > half:
            removed = True
            for ring in rings.glob("*.ring"):
                ring.unlink()


def one(model: str, options: argparse.Namespace, *, with_kvhook: bool) -> Run:
    """Load one server."""
    import kvhook

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        more = {"KVHOOK_DIR": str(place / "rings")}
        with server(model, place, ["--trace", "run.kvh"] if with_kvhook else None, **more) as this:
            asyncio.run(load(this, 4, 2.0, options.tokens))  # warm
            done = threading.Event()
            thread = threading.Thread(target=disturb, args=(place / "rings", done, options.seconds / 2))
            if with_kvhook:
                thread.start()
            try:
                answers = asyncio.run(load(this, options.clients, options.seconds, options.tokens))
            finally:
                done.set()
                if with_kvhook:
                    thread.join()
            names = {name.partition("{")[0] for name in this.metrics() if name.startswith("vllm:")}
            counted = _counted(this)
            this.stop()
        if not with_kvhook:
            return Run(answers, names, {})
        trace = kvhook.open(place / "run.kvh")
        steps = trace.steps()
        return Run(
            answers,
            names,
            {
                "records lost": trace.meta["records_lost"],
                "engine iterations": len(steps),
                "core steps": len(trace.cores().steps()),
                "core records lost": trace.cores().lost,
                "tokens in the trace": int(steps["num_generation_tokens"].sum()),
                "tokens in /metrics": counted["generation"],
                "requests in the trace": len(trace.requests()),
                "requests in /metrics": counted["requests"],
            },
        )


def _counted(this: Server) -> dict[str, int]:
    return {
        "generation": int(this.total("vllm:generation_tokens_total")),
        "requests": int(this.total("vllm:request_success_total")),
    }


def figures(run: Run) -> dict[str, float]:
    """What a client sees, in milliseconds."""
    first, whole = sorted(a.first for a in run.answers), sorted(a.whole for a in run.answers)
    return {
        "requests": len(whole),
        "TTFT p50": 1e3 * statistics.median(first),
        "TTFT p99": 1e3 * first[int(0.99 * (len(first) - 1))],
        "E2E p50": 1e3 * statistics.median(whole),
        "E2E p99": 1e3 * whole[int(0.99 * (len(whole) - 1))],
    }


def main() -> None:
    """Run it, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=2, help="servers with kvhook and without, in turn")
    parser.add_argument("--model", help="a folder (default: a tiny random model)")
    options = parser.parse_args()
    model = options.model
    if model is None:
        from kvhook.demo.model import make_tiny_model

        model = str(make_tiny_model(Path(tempfile.mkdtemp()) / "tiny"))
    names: list[set[str]] = []
    print(f"{options.clients} streaming clients for {options.seconds:g} s, {options.tokens} tokens each", flush=True)
    for pair in range(options.pairs):
        for with_kvhook in (False, True) if pair % 2 else (True, False):
            run = one(model, options, with_kvhook=with_kvhook)
            names.append(run.names)
            told = ", ".join(f"{name} {value:,.1f}" for name, value in figures(run).items())
            print(f"{'with kvhook' if with_kvhook else 'without    '}  {told}", flush=True)
            for name, value in run.trace.items():
                print(f"    {name}: {value:,}", flush=True)
    print("names in /metrics are the same:", all(each == names[0] for each in names))


if __name__ == "__main__":
    main()
