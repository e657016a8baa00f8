"""``kvhook demo``."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.cli.common import file_name, size
from kvhook.demo import engine
from kvhook.demo.live import LiveLines
from kvhook.demo.workload import BLOCK_SIZE, NUM_GPU_BLOCKS, rounds
from kvhook.errors import KvhookError
from kvhook.text.bar import bar, shows_blocks

if TYPE_CHECKING:
    from kvhook.recording.session import Session

#: Lines of the progression.
PARTS = 20


class DemoCommand:
    """Run a real vLLM on a tiny model and show what its KV cache does.

    Three rounds of requests: system prompts that the cache has not seen, the same ones again, and more long answers
    than the cache can hold. While they run, a line is printed for every 25 steps; then the summary, and how the hit
    rate went. The whole run is recorded in a trace. It takes about a minute on a CPU.

    Example:
      $ kvhook demo
      round 2: the same system prompts, other questions, 21 requests
        (the shared beginnings hit: the hit rate climbs)
        step    48  KV #####...............  27 %  running  3  waiting  0  hit rate  45 %    75 tokens
      ...
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "--out", type=file_name, metavar="FILE.kvh", help="the trace (default: a new kvhook-demo.kvh)"
        )
        parser.add_argument(
            "--level", choices=("full", "light"), default="full", help="how much is recorded, see kvhook.install"
        )
        parser.add_argument("--model", type=file_name, metavar="DIR", help="another model, instead of the tiny one")

    def run(self, args: argparse.Namespace) -> int:
        """Run it."""
        import kvhook

        engine.require_vllm()
        for name, value in engine.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        out = args.out or _unused(Path("kvhook-demo.kvh"))
        log = _unused(out.with_suffix(".log"))
        session = kvhook.install(trace=out, level=args.level)
        try:
            _run(session, args.model, out, log)
        finally:
            kvhook.uninstall()
        return 0


def _run(session: Session, model: Path | None, out: Path, log: Path) -> None:
    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    with engine.messages_to(log):
        if model is None:
            model = make_tiny_model(tiny_model_dir())
        with engine.progress("loading vLLM and a tiny Llama with random weights"):
            llm = engine.load(model)
    from vllm import SamplingParams

    print(f"the KV cache: {NUM_GPU_BLOCKS - 1} usable blocks of {BLOCK_SIZE} tokens")
    if not session.rings:
        raise KvhookError(f"this engine is not recorded: {session.faults or 'its vLLM is not one kvhook knows'}")
    with LiveLines(session.rings[-1], lambda line: print(f"  {line}", flush=True)) as live:
        for number, one in enumerate(rounds(), 1):
            live.flush()
            requests = sum(len(batch) for batch in one.batches)
            print(f"\nround {number}: {one.title}, {requests} requests\n  ({one.shows})", flush=True)
            params = SamplingParams(max_tokens=one.max_tokens, temperature=0, ignore_eos=True)
            with engine.messages_to(log):
                for batch in one.batches:
                    llm.generate(batch, params, use_tqdm=False)
    print(f"\n{session.summary()}\n")
    _print_progression(session)
    session.close()
    kvhook, python = _as_typed("kvhook"), _as_typed("python")
    print(
        f"\nThe trace is in {out} ({size(out.stat().st_size)}), vLLM's own messages in {log}. Next:\n"
        f"  {kvhook} summary {out}              the table above, again\n"
        f"  {kvhook} report {out} -o demo.html  the same as a page of charts for a browser\n"
        f"  {kvhook} export {out} demo.csv      steps and requests for a spreadsheet\n"
        f'  {python} -c "import kvhook; print(kvhook.open({str(out)!r}).steps(complete=True))"\n'
        "and in your own program, before LLM(...):\n"
        "  session = kvhook.install()"
    )


def _as_typed(program: str) -> str:
    """How a program of this Python's environment is called from here: by its name alone only if that finds it."""
    mine = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if not mine.exists() or (found and Path(found).parent == mine.parent):
        return program
    return os.path.relpath(mine) if mine.is_relative_to(Path.cwd()) else str(mine)


def _print_progression(session: Session) -> None:
    from kvhook.analysis.history import cut, even_edges, from_steps

    print("the prefix cache over the run: hit rate so far, and what was looked up on the way")
    steps = session.steps()
    history = from_steps(steps, 0.0)
    rows = 0
    for part in cut(history, even_edges(history, -math.inf, math.inf, PARTS)):
        rows += part["rows"]
        if part["prefix_cache_queries"]:
            rate = part["prefix_cache_hit_rate_so_far"] or 0.0
            looked_up = f"{part['prefix_cache_hits']:5,} of {part['prefix_cache_queries']:5,} tokens hit"
            drawn = bar(rate, ascii_only=not shows_blocks())
            print(f"  up to step {steps['step'][rows - 1]:4}  {drawn} {100 * rate:5.1f} %   {looked_up}")


def _unused(path: Path) -> Path:
    """This name, or one with a number, that no file has yet."""
    stem = path.stem
    for n in count(2):
        if not os.path.lexists(path):
            return path
        path = path.with_stem(f"{stem}-{n}")
    raise AssertionError
