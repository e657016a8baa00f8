"""How the candidates of `hook_cost` are timed: in several states of interpreter and processor, always interleaved.

hot         blocks of calls of one candidate, calibrated to be equally long; every round runs all candidates in a new
            random order, so that whatever else the machine does hits all of them alike
thread      single calls, one by one, while another thread wants the interpreter too and churns: objects made, looked
            up, joined, sorted and dropped
busy        the same, and this thread has churned as well before each call
own caches  single calls, each after a walk over four times the caches that the processor's core has for itself
cold        single calls, each after a walk over a buffer larger than the last-level cache
forward     single calls, each after a forward pass of a small transformer with torch, run by this thread in eager mode:
            what comes before the end of a step in an engine. Left out where torch is not installed
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[], object]
#: candidate -> nanoseconds of a call: one figure per round (hot), or per call (busy, cold)
Times = dict[str, list[float]]

clock = time.perf_counter_ns

#: Blocks of the hot state last about this long: some hundred calls of kvhook's path, a few of a dear logger.
BLOCK_NS = 400_000
MOST_CALLS = 2000
#: Where the system does not say how large the last-level cache is.
UNKNOWN_CACHE = 64 << 20


class Candidate(NamedTuple):
    """What is timed, and what has to be the case meanwhile (entered before its block, left after it)."""

    call: Call
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def hot(candidates: dict[str, Candidate], rounds: int) -> Times:
    """Mean time of a call in blocks, one figure per round. The garbage collector is off, as in timeit."""
    times: Times = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        calls = {name: _calibrate(c) for name, c in candidates.items()}
        for _ in range(rounds):
            for name in random.sample(list(candidates), len(candidates)):
                call, n = candidates[name].call, calls[name]
                with candidates[name].around():
                    _block(call, 1 + n // 10)
                    times[name].append(_block(call, n) / n)
            gc.collect(0)  # what the by-hand hook and the building of stats leave behind
    finally:
        gc.enable()
    return times


def _block(call: Call, n: int) -> int:
    start = clock()
    for _ in repeat(None, n):
        call()
    return clock() - start


def _calibrate(candidate: Candidate) -> int:
    """How many calls make a block."""
    with candidate.around():
        _block(candidate.call, 3)
        each = min(_block(candidate.call, 5) for _ in range(3)) / 5
    return max(1, min(MOST_CALLS, int(BLOCK_NS / max(each, 1.0))))


def single(candidates: dict[str, Candidate], calls: int, between: Call) -> Times:
    """Each call timed by itself, its two clock reads included, `between` before each."""
    times: Times = {name: [] for name in candidates}
    for _ in range(calls):
        for name in random.sample(list(candidates), len(candidates)):
            call = candidates[name].call
            between()
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def churn(size: int = 300) -> int:
    """Work as programs do it: objects made, looked up, joined, sorted and dropped. About a tenth of a millisecond."""
    rows = [{"id": i, "text": f"request {i}", "values": [i, i + 1.5]} for i in range(size)]
    by_text = {row["text"]: row for row in rows}
    words = " ".join(sorted(by_text, reverse=True)).split()
    return len(words) + sum(len(row["values"]) for row in by_text.values())


@contextlib.contextmanager
def another_thread() -> Iterator[None]:
    """Meanwhile another thread churns, and has the interpreter half of the time."""
    end = threading.Event()

    def run() -> None:
        while not end.is_set():
            churn(3000)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def thread(candidates: dict[str, Candidate], calls: int) -> Times:
    """Single calls in an interpreter that is shared with another thread."""
    with another_thread():
        return single(candidates, calls, lambda: None)


def busy(candidates: dict[str, Candidate], calls: int) -> Times:
    """Single calls in an interpreter that is shared with another thread and has just done something else."""
    with another_thread():
        return single(candidates, calls, churn)


def own_caches(candidates: dict[str, Candidate], calls: int) -> Times:
    """Single calls, each after the core's own caches (L1, L2) were filled with something else."""
    return single(candidates, calls, walk(4 * cache_bytes()[0]))


def cold(candidates: dict[str, Candidate], calls: int) -> Times:
    """Single calls, each after all of the processor's caches were filled with something else."""
    return single(candidates, calls, walk(eviction_bytes()))


def forward(candidates: dict[str, Candidate], calls: int) -> Times:
    """Single calls, each after a forward pass."""
    return single(candidates, calls, forward_pass())


def forward_pass() -> Call:
    """A forward pass of some milliseconds: 8 layers of width 512, one sequence of 16, 100 MB of weights."""
    import torch

    torch.set_num_threads(1)
    layer = torch.nn.TransformerEncoderLayer(512, 8, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 8, enable_nested_tensor=False).eval()
    given = torch.randn(1, 16, 512)

    def run() -> object:
        with torch.inference_mode():
            return model(given)

    return run


#: The states in which single calls are timed.
SINGLE: dict[str, Callable[[dict[str, Candidate], int], Times]] = {
    "thread": thread,
    "busy": busy,
    "own caches": own_caches,
    "cold": cold,
}
if importlib.util.find_spec("torch") is not None:
    SINGLE["forward"] = forward


def walk(size: int) -> Call:
    """Reads one word of each cache line of a buffer."""
    lines = np.ones(size // 8, np.int64)[::8]
    return lambda: lines.sum()


def eviction_bytes() -> int:
    """Size of the buffer that evicts all caches: a quarter more than the last one, or what memory there is for it."""
    free = 8 * UNKNOWN_CACHE
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return min(cache_bytes()[1] * 5 // 4, free // 4)


def cache_bytes() -> tuple[int, int]:
    """Bytes of the largest cache that is a core's own, and of the largest of all."""
    sizes: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            level = int((index / "level").read_text())
            sizes[level] = max(sizes.get(level, 0), 1024 * int((index / "size").read_text().strip().removesuffix("K")))
    return sizes.get(2, UNKNOWN_CACHE // 32), max(sizes.values(), default=UNKNOWN_CACHE)


# ---- statistics ----------------------------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half the range of the middle half: the noise."""
    if len(values) < 2:
        return (float(values[0]), 0.0) if values else (float("nan"), 0.0)
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return float(np.quantile(np.asarray(values, float), share)) if values else float("nan")
