"""What one step costs: kvhook's whole path and its parts, beside vLLM's own stats on the same objects.

    python benchmarks/hook_cost.py                the tables: hot, in a busy interpreter, with cold caches
    python benchmarks/hook_cost.py --quick        fewer steps and rounds, one process
    python benchmarks/hook_cost.py --thorough     every kind of step in every state; some minutes
    python benchmarks/hook_cost.py --json         one JSON document
    python benchmarks/hook_cost.py --stand-ins    without vLLM: kvhook's own part on stand-ins with the same fields

Figures are medians; `+-` is half the range of the middle half of the rounds of all worker processes. Figures that are
compared are ratios of the same round (hot) or of the same process (all other states). One candidate is measured twice,
under two names, and what those two differ by is the run's own noise. Hot figures come with the loop that calls (row
"empty call"), others with their two clock reads as well: nothing is subtracted but where a row is of a whole path or a
part of it, which is what a step takes with kvhook less what it takes without. `cost_timing` says what the states are.

pyperf is not used, since it runs one benchmark after the other and cannot interleave them; calibrated blocks, warm-up,
several processes, medians with their spread and the system's load are as there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cost_report
import cost_timing as timing
from cost_candidates import (
    BUILD,
    PROMETHEUS,
    part_candidates,
    recorded,
    vllm_candidates,
    vllm_loggers,
    whole_candidates,
)
from cost_objects import KINDS_OF_STEP, Objects, StepKind, can_cache_envs, vllm_or_stand_ins
from cost_recordings import RECORDINGS
from measured_on import machine

ALL_STEPS = tuple(k.name for k in KINDS_OF_STEP)
SOME_STEPS = ("decode, batch 1", "decode, batch 256", "8 prefills, 8 finished, batch 64")


class Settings(NamedTuple):
    """How much is measured."""

    workers: int
    #: in the hot state, and of which steps
    rounds: int
    steps: tuple[str, ...]
    #: single calls in the other states, and of which steps
    calls: dict[str, int]
    single_steps: tuple[str, ...]
    stand_ins: bool = False


QUICK = Settings(
    1, 10, SOME_STEPS[:2], {"thread": 400, "busy": 150, "own caches": 80, "cold": 4, "forward": 80}, SOME_STEPS[:2]
)
USUAL = Settings(
    3, 15, ALL_STEPS, {"thread": 800, "busy": 400, "own caches": 200, "cold": 7, "forward": 150}, SOME_STEPS
)
THOROUGH = Settings(
    5, 30, ALL_STEPS, {"thread": 2000, "busy": 1000, "own caches": 500, "cold": 15, "forward": 400}, ALL_STEPS
)


def measure(settings: Settings) -> dict[str, dict[str, timing.Times]]:
    """All states in this process: state -> step -> candidate -> nanoseconds."""
    found: dict[str, dict[str, timing.Times]] = {state: {} for state in ("hot", *timing.SINGLE)}
    with vllm_or_stand_ins(settings.stand_ins):
        loggers = {} if settings.stand_ins else vllm_loggers()
        if not settings.stand_ins and can_cache_envs():
            sys.modules["vllm.envs"].disable_envs_cache()  # as in a front end, whatever was called here before
        for kind in KINDS_OF_STEP:
            if kind.name in settings.steps:
                measure_step(kind, settings, loggers, found)
    return found


def measure_step(
    kind: StepKind, settings: Settings, loggers: dict[str, Any], found: dict[str, dict[str, timing.Times]]
) -> None:
    """One kind of step, in every state."""
    objects = Objects(kind, stand_ins=settings.stand_ins)
    with recorded(objects) as made:
        whole = whole_candidates(objects, made, loggers)
        more = part_candidates(objects, made) | ({} if settings.stand_ins else vllm_candidates(objects))
        found["hot"][kind.name] = timing.hot(whole | more, settings.rounds)
        if kind.name in settings.single_steps:
            for state, time_calls in timing.SINGLE.items():
                found[state][kind.name] = time_calls(whole, settings.calls[state])


# ---- workers, command line -----------------------------------------------------------------------------------------


def worker(settings: Settings, answer: Path) -> None:
    """In a process of its own: measure, and leave the times and what they were measured on."""
    found = measure(settings)
    answer.write_text(json.dumps({"machine": machine(), "times": found}))


def run_workers(settings: Settings) -> list[dict[str, Any]]:
    """One process after the other, each with its own memory layout; what each has found."""
    answers = []
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"} | os.environ
    for number in range(settings.workers):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, __file__, "--worker", str(answer), json.dumps(settings)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"worker {number} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            answers.append(json.loads(answer.read_text()))
        print(f"\rprocess {number + 1} of {settings.workers} is done", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return answers


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds, in one process")
    parser.add_argument("--thorough", action="store_true", help="every kind of step in every state")
    parser.add_argument("--stand-ins", action="store_true", help="leave vLLM out even where it is installed")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Settings(*json.loads(args.worker[1])), Path(args.worker[0]))
        return 0
    stand_ins = args.stand_ins or importlib.util.find_spec("vllm") is None
    settings = (QUICK if args.quick else THOROUGH if args.thorough else USUAL)._replace(stand_ins=stand_ins)
    load = os.getloadavg()[0]
    answers = run_workers(settings)
    names = cost_report.Names(next(iter(RECORDINGS)), tuple(RECORDINGS), PROMETHEUS, BUILD)
    report = cost_report.Report(names, [answer["times"] for answer in answers])
    about = answers[0]["machine"] | {
        "processors": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "caches": timing.cache_bytes(),
        "evicted_with": timing.eviction_bytes(),
    }
    document = {"machine": about, "settings": settings._asdict(), "stand_ins": stand_ins} | report.document()
    print(json.dumps(document, indent=1) if args.json else cost_report.text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
