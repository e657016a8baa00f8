"""What an engine does at this moment: the last seconds of its steps, and sums since its first step.

A ring holds the newest records only. Where the steps before those are not known, sums are of the steps that are, and it
is told since when they count.

`Live` is fed with tables of steps as they come and gives a `View`, plain numbers that are only rendered elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

import numpy as np
import numpy.typing as npt

from kvhook.analysis.queue import Queues, are_counted, of_table
from kvhook.analysis.tail import Tail
from kvhook.records.columns import Table, has, has_times, total, with_stats
from kvhook.records.engine_events import RESTS, kind_of

Floats = npt.NDArray[np.float64]

#: Points of the history that is kept, one for each so many seconds.
HISTORY, HISTORY_STEP_NS = 240, 1_000_000_000
#: The longest window, in nanoseconds, and the most steps that are kept for it.
LONGEST_NS, MOST_STEPS = 60_000_000_000, 1 << 16
#: Rates are of so many seconds at least: one step of a few milliseconds makes no rate.
LEAST_NS = 1_000_000_000
#: The last steps whose cost is looked at.
COST_STEPS = 2000
#: The states of an engine that has ended.
ENDED = ("closed", "dead")
#: What is needed of a step of the front end, as far as a vLLM has it.
COLUMNS = (
    *("step", "t_start_ns", "t_end_ns", "has_scheduler_stats", "kvhook_ns", "kv_cache_usage"),
    *("num_running_reqs", "num_waiting_reqs", "num_preempted_reqs", "num_finished_reqs", "num_aborted_reqs"),
    *("num_added_reqs", "num_prompt_tokens", "num_prompt_tokens_computed", "num_generation_tokens"),
    *("prefix_cache_queries", "prefix_cache_hits"),
)


@dataclasses.dataclass(frozen=True)
class View:
    """One engine in numbers. None, or an empty list, is what is not known.

    Figures of the window are about its last seconds, those of an engine that has ended about its last window. Rates
    are of the part of the window whose steps are known. ``run`` is since its first step, or since `since`.
    """

    pid: int
    engine: int
    model: str
    program: str
    #: alive, asleep or paused; closed or dead once it has ended
    state: str
    #: seconds since the last step; None if there was none
    idle: float | None
    steps: int
    window: float

    num_kv_blocks: int | None = None
    block_size: int | None = None
    used: float | None = None
    #: of the engine core: blocks that only the prefix cache still needs, and those that hold nothing
    cached: float | None = None
    empty: float | None = None
    history: list[float] = dataclasses.field(default_factory=list)

    running: int | None = None
    waiting: int | None = None
    preempted: int | None = None
    preempted_run: int | None = None
    finished_run: int | None = None
    aborted_run: int | None = None
    #: seconds since 1970 of the step from which on ``run`` counts, where steps before it were not seen: the ring held
    #: them no more. None: from the first step on
    since: float | None = None
    #: requests that have finished since its first step, whether these steps were seen or not
    finished_all: int | None = None

    prefill_rate: float | None = None
    decode_rate: float | None = None
    hit_rate: float | None = None
    hit_rate_run: float | None = None
    steps_rate: float | None = None

    #: p50 and p99 in seconds
    ttft: tuple[float, float] | None = None
    itl: tuple[float, float] | None = None
    step_time: tuple[float, float] | None = None

    #: what kept the batch from growing -> share of the window's steps, the largest first; of the engine core
    limits: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    recomputed: int | None = None
    evicted: int | None = None

    #: the innermost scope that goes on: its path; "" if there is none, or it is not known
    scope: str = ""
    lost: int = 0
    #: kvhook's own time per step in seconds, and its share of the time in steps
    cost: float | None = None
    cost_share: float | None = None
    #: what was last done to the engine (a key of `kvhook.records.engine_events.KINDS`), and how many seconds ago
    last_event: tuple[str, float] | None = None


class Live:
    """One engine, fed as its records come.

    Args:
        pid: its process.
        facts: what its ring's header tells.
    """

    def __init__(self, pid: int, facts: dict[str, object]) -> None:
        self.pid = pid
        self._facts = facts
        names = ("prefix_cache_queries", "prefix_cache_hits", "num_preempted_reqs", "num_finished_reqs")
        self._steps = Tail((*names, "num_aborted_reqs"), LONGEST_NS, MOST_STEPS)
        self._core = Tail((), LONGEST_NS, MOST_STEPS)
        self._known: Table | None = None
        self._queues = Queues()
        self._latencies: dict[str, list[tuple[int, Floats]]] = {}
        self._history: dict[int, float] = {}
        self._last_ns = 0
        self._number = -1
        #: when the step began from which on sums count, if there were steps before it that were not seen
        self._since_ns: int | None = None
        #: requests that had finished before; None if that is not known
        self._finished_before: int | None = 0
        self.engine = _int(facts.get("engine")) or 0
        self.state = "alive"
        #: the scope that goes on, see `View.scope`
        self.scope = ""
        self.lost = 0
        #: the code of what was last done to the engine, and when; of what it rests by (sleep, pause), and since when
        self.event: tuple[int, int] | None = None
        self.rest: tuple[int, int] | None = None

    @property
    def lacks_requests(self) -> bool:
        """Whether the numbers of finished requests would tell more, see `take`."""
        return self._finished_before is None or self._number < 0

    def take(self, steps: Table, latencies: dict[str, Floats], requests: Table | None = None) -> None:
        """Take in steps of the front end, and the single latencies and the finished requests that came with them."""
        if not len(steps):
            return
        gaps = np.flatnonzero(np.diff(steps["step"], prepend=self._number) != 1)
        if len(gaps):  # sums are of steps without one that was not seen
            self._begin_anew(int(steps["t_start_ns"][gaps[-1]]))
        whole = steps[gaps[-1] :] if len(gaps) else steps
        self._steps.take(whole)
        self._last_ns, self._number = int(steps["t_end_ns"][-1]), int(steps["step"][-1])
        if self._finished_before is None and requests is not None:
            self._finished_before = self._before(whole, requests)
        for series, values in latencies.items():
            kept = self._latencies.setdefault(series, [])
            kept.append((self._last_ns, values))
            while kept[0][0] < self._last_ns - LONGEST_NS:
                kept.pop(0)
        if are_counted(whole):
            self._queues.take_steps(of_table(whole, np.ones(len(whole), np.bool_)))
        known = with_stats(steps)
        if len(known):
            self._known = known[-1:].copy()
        for end, usage in zip(known["t_end_ns"].tolist(), known["kv_cache_usage"].tolist(), strict=True):
            second = end // HISTORY_STEP_NS
            self._history[second] = max(self._history.get(second, 0.0), usage)
        for second in sorted(self._history)[:-HISTORY]:
            del self._history[second]

    def _begin_anew(self, start_ns: int) -> None:
        self._since_ns, self._finished_before = start_ns, None
        self._steps.restart()
        self._queues = Queues()

    def _before(self, steps: Table, requests: Table) -> int | None:
        """How many requests had finished before the steps that are counted. Requests are numbered as they finish.

        None if that is not known: no request finished, or some have no record.

        Args:
            steps: the last steps.
            requests: those that finished in them.
        """
        # what the ring holds may begin among the requests of a step
        first, last = int(steps["step"][0]), int(steps["step"][-1])
        inside = requests[(requests["step"] > first) & (requests["step"] <= last)]
        finished = self._steps.run("num_finished_reqs")
        if not len(inside) or finished is None or total(steps[1:], "num_finished_reqs") != len(inside):
            return None
        before = int(inside["request"][-1]) + 1 - finished
        return before if before >= 0 else None

    def take_core(self, steps: Table) -> None:
        """Take in steps of its engine core."""
        self._core.take(steps)

    def view(self, now_ns: int, window: float) -> View:
        """What it does.

        Args:
            now_ns: monotonic clock.
            window: seconds that are looked back on.
        """
        facts = self._facts
        end = self._last_ns if self.state in ENDED and self._last_ns else now_ns
        begin = end - int(window * 1e9)
        view = View(
            pid=self.pid,
            engine=self.engine,
            model=str(facts.get("model") or ""),
            program=str(facts.get("program") or ""),
            state=self._rest_or_state(),
            last_event=_ago(self.event, now_ns),
            idle=max(0.0, (now_ns - self._last_ns) / 1e9) if self._last_ns else None,
            steps=self._number + 1,
            window=window,
            num_kv_blocks=_int(facts.get("num_kv_blocks")),
            block_size=_int(facts.get("block_size")),
            history=[self._history[second] for second in sorted(self._history)],
            scope=self.scope if self.state == "alive" else "",
            lost=self.lost,
        )
        steps = self._steps.since(begin)
        if steps is None:
            return view
        covered = max(LEAST_NS, end - max(begin, self._steps.whole_from_ns)) / 1e9
        more = self._state() | self._sums() | _of_window(steps, min(window, covered)) | self._of_core(begin)
        if self._since_ns is not None:
            more["since"] = time.time() - (time.monotonic_ns() - self._since_ns) / 1e9
        more |= {name: _two(self._values(series, begin)) for name, series in _SERIES.items()}
        more |= self._cost()
        return dataclasses.replace(view, **more)  # type: ignore[arg-type]

    def _rest_or_state(self) -> str:
        """Its state; of one that rests, and has made no step since, how it rests."""
        if self.rest is None or self.state != "alive" or self._last_ns > self.rest[1]:
            return self.state
        return RESTS.get(kind_of(self.rest[0]), self.state)

    def _state(self) -> dict[str, object]:
        """The states after the last step in which they are known."""
        known = self._known
        if known is None:
            return {}
        last = known[0]
        return {
            "used": float(last["kv_cache_usage"]) if last["kv_cache_usage"] == last["kv_cache_usage"] else None,
            "running": 0 if self._nothing_left() else int(last["num_running_reqs"]),
            "waiting": int(last["num_waiting_reqs"]) if has(known, "num_waiting_reqs") else None,
        }

    def _nothing_left(self) -> bool:
        """Whether the front end has ended all requests that the scheduler's last stats count. While there are some,
        what vLLM says of them is shown."""
        queue = self._queues.answer() if self._facts.get("timed_steps") is not False else None
        return queue is not None and not queue.left

    def _sums(self) -> dict[str, object]:
        queries, hits = self._steps.run("prefix_cache_queries"), self._steps.run("prefix_cache_hits")
        finished, before = self._steps.run("num_finished_reqs"), self._finished_before
        return {
            "hit_rate_run": hits / queries if queries and hits is not None else None,
            "preempted_run": self._steps.run("num_preempted_reqs"),
            "finished_run": finished,
            "finished_all": finished + before if finished is not None and before is not None else None,
            "aborted_run": self._steps.run("num_aborted_reqs"),
        }

    def _values(self, series: str, begin: int) -> Floats:
        parts = [values for end, values in self._latencies.get(series, []) if end > begin]
        return np.concatenate(parts) if parts else np.empty(0)

    def _cost(self) -> dict[str, object]:
        every = self._steps.newest(COST_STEPS)
        assert every is not None
        measured = every["kvhook_ns"][every["kvhook_ns"] >= 0] if has(every, "kvhook_ns") else np.empty(0)
        if not len(measured):
            return {}
        cost = (float(np.median(measured)) + (_int(self._facts.get("hook_call_ns")) or 0)) / 1e9
        timed = every[has_times(every)]
        spent = float((timed["t_end_ns"] - timed["t_start_ns"]).sum()) / 1e9
        return {"cost": cost, "cost_share": cost * len(timed) / spent if spent else None}

    def _of_core(self, begin: int) -> dict[str, object]:
        steps = self._core.since(begin)
        newest = self._core.newest(1)
        if steps is None or newest is None or not len(newest):
            return {}
        last = newest[0]
        blocks = int(last["num_kv_blocks"])
        found: dict[str, object] = {}
        if blocks > 0:
            used, cached = int(last["num_kv_blocks_used"]), int(last["num_kv_blocks_cached"])
            # cached blocks are counted when the batch was scheduled, used ones at the end of the step
            cached = min(cached + self._left_cached(int(last["num_kv_blocks_peak"]) - used), blocks - used)
            found = {"cached": cached / blocks, "empty": (blocks - used - cached) / blocks, "used": used / blocks}
        if len(steps):
            why = Counter(steps["limited_by"].tolist())
            found["limits"] = [(name, n / len(steps)) for name, n in why.most_common()]
            found["recomputed"] = int(steps["num_recomputed_tokens"].sum())
            found["evicted"] = int(steps["num_kv_blocks_evicted"].sum())
        return found

    def _left_cached(self, given_back: int) -> int:
        """How many of the blocks that came free in the last step stay cached: all but a last, unfilled one of each
        request that finished in it."""
        newest = self._steps.newest(1)
        if given_back <= 0 or newest is None or not has(newest, "num_finished_reqs"):
            return 0
        if self._facts.get("enable_prefix_caching") is False:
            return 0
        return max(0, given_back - max(0, int(newest["num_finished_reqs"][-1])))


#: Field of a `View` -> series of single latencies.
_SERIES = {"ttft": "time_to_first_token", "itl": "inter_token_latency"}


def _of_window(steps: Table, over: float) -> dict[str, object]:
    """Rates and times of the window's steps, which are those of so many seconds."""
    if not len(steps):
        return {"prefill_rate": 0.0, "decode_rate": 0.0, "steps_rate": 0.0, "preempted": 0}
    queries, hits = total(steps, "prefix_cache_queries"), total(steps, "prefix_cache_hits")
    computed = total(steps, "num_prompt_tokens_computed")
    prefill = total(steps, "num_prompt_tokens") if computed is None else computed
    decode = total(steps, "num_generation_tokens")
    timed = steps[has_times(steps)]
    return {
        "prefill_rate": None if prefill is None else prefill / over,
        "decode_rate": None if decode is None else decode / over,
        "steps_rate": len(steps) / over,
        "hit_rate": hits / queries if queries and hits is not None else None,
        "preempted": total(steps, "num_preempted_reqs"),
        "step_time": _two((timed["t_end_ns"] - timed["t_start_ns"]) / 1e9),
    }


def _ago(event: tuple[int, int] | None, now_ns: int) -> tuple[str, float] | None:
    """A kind of event, and how many seconds ago it was."""
    kind = kind_of(event[0]) if event is not None else ""
    return (kind, max(0.0, (now_ns - event[1]) / 1e9)) if event is not None and kind else None


def _two(values: Floats) -> tuple[float, float] | None:
    """p50 and p99."""
    if not len(values):
        return None
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return float(p50), float(p99)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
