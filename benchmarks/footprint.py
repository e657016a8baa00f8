"""What kvhook takes before the first step: time to import and install, and resident memory at the defaults.

    python benchmarks/footprint.py            the tables
    python benchmarks/footprint.py --json     one JSON document

Time: fresh interpreters, a round of all programs in random order after the other; a figure is the median over the
rounds of the difference to another program *in the same round*, `+-` half the range of the middle half. The wall clock
runs from before the process is made until its last statement; beside it the process's own processor time.

Memory: processes with numpy and wrapt; with a stand-in engine besides, which makes more steps than the ring holds; and
with kvhook, which records them. The figures are `/proc/self/smaps_rollup`'s: Rss counts every page that is mapped, Pss
shared ones by their share, Uss only those of this process alone. The ring is a file in shared memory, mapped whole and
touched whole from the start; it is in all three, once per mapping, and its part is shown. No vLLM is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cost_timing import middle
from measured_on import machine

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 40
MEMORY_ROUNDS = 5
STEPS = 3 * 8192

#: Program -> what it does.
PROGRAMS = {
    "python": "",
    "wrapt": "import wrapt",
    "wrapt, kvhook": "import wrapt, kvhook",
    "wrapt, install": "import wrapt; from kvhook import install",
    "numpy, wrapt": "import numpy, wrapt",
    "numpy, wrapt, install()": "import numpy, wrapt; from kvhook import install; install()",
}
#: What is shown: row -> program, and the one it is compared with.
DIFFERENCES = {
    "import wrapt": ("wrapt", "python"),
    "import kvhook, beyond wrapt": ("wrapt, kvhook", "wrapt"),
    "from kvhook import install, beyond wrapt": ("wrapt, install", "wrapt"),
    "the same and install(), beyond numpy and wrapt": ("numpy, wrapt, install()", "numpy, wrapt"),
}
#: Row, figure, at most; from the issue that asked for this benchmark.
TARGETS = (("import kvhook, beyond wrapt", "wall_ms", 30.0), ("kvhook, recording", "rss_mb", 12.0))

STAND_IN = """
import itertools, sys
from tests.standin import ENGINE, fake_vllm, step_stats

def step(engine):
    if engine.logger_manager is not None:
        sched, iteration, mm = next(engine.stats)
        engine.logger_manager.record(scheduler_stats=sched, iteration_stats=iteration, mm_cache_stats=mm)

def steps(modules):
    vars(modules[ENGINE])["LLMEngine"].step = step

with fake_vllm(change=steps) as vllm:
    {install}
    engine = vllm.engine(log_stats=True)
    engine.logger_manager.stat_loggers.clear()
    kinds = [step_stats(num_running_reqs=8, kv_cache_usage=0.1 * i, generated=8, itl=[0.01] * 8) for i in range(8)]
    engine.stats = itertools.cycle(kinds)
    for _ in range({steps}):
        engine.step()
    {then}
    report()
"""
REPORT = """
def report():
    import json
    found = {}
    for line in open("/proc/self/smaps_rollup").read().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        found[name.rstrip(":")] = int(kilobytes)
    ring, inside = [0, 0, 0], False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = ".ring" in line
        elif inside and line.startswith(("Rss:", "Pss:", "Private_")):
            ring[0 if line[0] == "R" else 1 if line[:2] == "Ps" else 2] += int(line.split()[1])
    print(json.dumps(found | {"ring": ring}))
"""
#: The spool has seen every record.
DRAINED = "assert not session.faults; session._spool.drain()"
MEMORY = {
    "numpy and wrapt": "report()",
    "and the stand-in engine": STAND_IN.format(install="", steps=STEPS, then=""),
    "and kvhook, recording": STAND_IN.format(
        install="import kvhook; session = kvhook.install()", steps=STEPS, then=DRAINED
    ),
    "and a summary": STAND_IN.format(
        install="import kvhook; session = kvhook.install()",
        steps=STEPS,
        then=f"{DRAINED}; assert session.summary().as_dict()",
    ),
}


def run(program: str, environment: dict[str, str]) -> str:
    """What a program says, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(f"this program failed:\n{program}\n{done.stderr}")
    return done.stdout


def time_programs(rounds: int, environment: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Program -> wall and processor time of each round, in milliseconds."""
    end = "\nimport os, time; print(time.time_ns(), time.process_time_ns(), flush=True); os._exit(0)"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name in random.sample(list(PROGRAMS), len(PROGRAMS)):
            start = time.time_ns()
            now, used = map(int, run(PROGRAMS[name] + end, environment).split())
            if number:  # the first round compiles, and fills the page cache
                times[name].append(((now - start) / 1e6, used / 1e6))
    return times


def differences(times: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """One row per comparison."""
    rows = []
    for row, (program, other) in DIFFERENCES.items():
        pairs = list(zip(times[program], times[other], strict=True))
        wall, wall_noise = middle([a[0] - b[0] for a, b in pairs])
        used, used_noise = middle([a[1] - b[1] for a, b in pairs])
        rows.append(
            {"name": row, "wall_ms": wall, "wall_noise_ms": wall_noise, "cpu_ms": used, "cpu_noise_ms": used_noise}
        )
    return rows


def memory(rounds: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """One row per program, megabytes; and what kvhook has more than its stand-in engine, and than numpy and wrapt."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import numpy, wrapt\n{REPORT}\n"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MEMORY}
    for _ in range(rounds):
        for name in random.sample(list(MEMORY), len(MEMORY)):
            found[name].append(json.loads(run(start + MEMORY[name], environment)))
    rows = []
    for name, each in found.items():
        row: dict[str, Any] = {"name": name}
        for figure, parts, ring in (
            ("rss_mb", ("Rss",), 0),
            ("pss_mb", ("Pss",), 1),
            ("uss_mb", ("Private_Clean", "Private_Dirty"), 2),
        ):
            row[figure] = statistics.median(sum(e[p] for p in parts) for e in each) / 1024
            row[f"ring_{figure}"] = statistics.median(e["ring"][ring] for e in each) / 1024
        rows.append(row)
    bare, engine, recording, summary = rows
    return [
        *rows,
        _less("kvhook, recording", recording, engine),
        _less("kvhook, recording, and all the stand-in engine takes", recording, bare),
        _less("kvhook, after a summary", summary, engine),
    ]


def _less(name: str, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"name": name} | {k: v - other[k] for k, v in row.items() if k != "name"}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kvhook-footprint-") as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "KVHOOK_DIR": _ring_directory(folder),
            "TMPDIR": folder,
            # as installed packages are: compiled, whatever the environment of this run says
            "PYTHONPYCACHEPREFIX": str(Path(folder) / "compiled"),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        try:
            time_rows = differences(time_programs(args.rounds, environment))
            memory_rows = memory(MEMORY_ROUNDS, environment)
        finally:
            _remove_rings(environment["KVHOOK_DIR"])
    rows = {row["name"]: row for row in [*time_rows, *memory_rows]}
    targets = [
        {
            "what": name,
            "figure": figure,
            "at_most": most,
            "found": rows[name][figure],
            "met": rows[name][figure] <= most,
        }
        for name, figure, most in TARGETS
    ]
    about = machine() | {"processors": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    if args.json:
        document = {"machine": about, "rounds": args.rounds, "time": time_rows, "memory": memory_rows}
        print(json.dumps(document | {"targets": targets}, indent=1))
        return 0
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    print(f"\n{args.rounds} rounds of fresh interpreters, ms\n  {'':54}{'wall':>8}{'':10}{'processor':>10}")
    for r in time_rows:
        wall, used = (f"{r[f'{k}_ms']:8.1f} +- {r[f'{k}_noise_ms']:5.1f}" for k in ("wall", "cpu"))
        print(f"  {r['name']:54}{wall}{used}")
    print(f"\n{STEPS:,} steps, ring of 8,192 slots; MB, of which the ring\n  {'':54}{'Rss':>15}{'Pss':>15}{'Uss':>15}")
    for r in memory_rows:
        cells = (f"{r[k]:8.1f} ({r[f'ring_{k}']:4.1f})" for k in ("rss_mb", "pss_mb", "uss_mb"))
        print(f"  {r['name']:54}{''.join(cells)}")
    print("\ntargets")
    for t in targets:
        print(f"  {t['what']:54}{t['found']:8.1f}  at most {t['at_most']:5.1f}  {'met' if t['met'] else 'MISSED'}")
    return 0


def _ring_directory(fallback: str) -> str:
    """Where rings go by default, shared memory, in a directory of this run's own."""
    from kvhook.ring.place import find_directory

    return tempfile.mkdtemp(prefix="footprint-", dir=find_directory() or fallback)


def _remove_rings(folder: str) -> None:
    for path in Path(folder).iterdir():
        path.unlink()
    Path(folder).rmdir()


if __name__ == "__main__":
    sys.exit(main())
