"""What the engine core really did, step by step: taken from its own objects by wrapping the scheduler.

Neither kvhook nor vLLM's stats have a part in it. After each `Scheduler.update_from_output` (the end of a step for the
core) the block pool's usage is read, and the tokens are counted that the step gave; look-ups in the prefix cache are
counted where the block manager notes them; usage is also read after each `Scheduler.schedule`, which is as high as it
gets inside of a step, before finished requests give their blocks back.

In an engine of this process `watching` keeps the rows in memory. In a server's engine core `from_environment` writes
them to a file: it is a `vllm.general_plugins` entry point of a package that `make_plugin` makes in a folder.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Where a server's engine core writes its rows; its process id is appended.
FILE = "KVHOOK_BENCHMARK_TRUTH"

#: A row: monotonic nanoseconds, usage at the end and inside of the step, and totals since the watch began: tokens
#: generated, prompt tokens looked up by new requests, and found.
NAMES = ("t", "usage", "usage_inside", "tokens", "queries", "hits")
ROW = struct.Struct("<qddqqq")

Row = tuple[int, float, float, int, int, int]

#: What is not taken back before the process ends.
_stays = contextlib.ExitStack()


@contextlib.contextmanager
def watching(put: Callable[[Row], object]) -> Iterator[None]:
    """Give a row to `put` at the end of each step of every engine core in this process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import PrefixCacheStats

    schedule, update, record = Scheduler.schedule, Scheduler.update_from_output, PrefixCacheStats.record
    tokens = queries = hits = 0
    inside = 0.0

    def schedule_and_look(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        result = schedule(scheduler, *args, **kwargs)
        inside = max(inside, scheduler.kv_cache_manager.usage)
        return result

    def update_and_look(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal tokens, inside
        result = update(scheduler, *args, **kwargs)
        now, usage = time.monotonic_ns(), scheduler.kv_cache_manager.usage
        for outputs in result.values():
            for one in outputs.outputs:
                tokens += len(one.new_token_ids)
        put((now, usage, max(inside, usage), tokens, queries, hits))
        inside = 0.0
        return result

    def record_and_count(stats: Any, num_tokens: int, num_hits: int, preempted: bool, *args: Any, **kwargs: Any) -> Any:
        nonlocal queries, hits
        if not preempted:  # as in vLLM's counters, which keep those that come back apart
            queries, hits = queries + num_tokens, hits + num_hits
        return record(stats, num_tokens, num_hits, preempted, *args, **kwargs)

    Scheduler.schedule, Scheduler.update_from_output = schedule_and_look, update_and_look
    PrefixCacheStats.record = record_and_count
    try:
        yield
    finally:
        Scheduler.schedule, Scheduler.update_from_output = schedule, update
        PrefixCacheStats.record = record


def from_environment() -> None:
    """The plug-in: watch for as long as this process lives, if the environment says where to write."""
    path = os.environ.get(FILE)
    if not path:
        return
    # opened at the first row: vLLM loads plug-ins into all of its processes, and only one of them has steps
    file: list[int] = []

    def put(row: Row) -> None:
        if not file:
            file.append(os.open(f"{path}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        os.write(file[0], ROW.pack(*row))

    _stays.enter_context(watching(put))


def make_plugin(folder: Path) -> list[str]:
    """Make the plug-in's package in a folder; gives what must be on a server's PYTHONPATH."""
    info = folder / "kvhook_benchmark_truth-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvhook-benchmark-truth\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkvhook_benchmark_truth = collecting.truth:from_environment\n"
    )
    return [str(folder), str(Path(__file__).resolve().parents[1])]


def read_rows(path: Path) -> list[Row]:
    """The rows that the engine core of a server has written so far; none if it has not stepped."""
    rows: list[Row] = []
    for file in path.parent.glob(f"{path.name}.*"):
        content = file.read_bytes()
        whole = len(content) // ROW.size * ROW.size
        rows += ROW.iter_unpack(content[:whole])
    return rows
