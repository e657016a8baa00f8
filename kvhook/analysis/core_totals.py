"""What engine cores recorded, added up as it comes: what the account of a run's cores is made from."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvhook.analysis.core_signs import SignTotals
from kvhook.analysis.exact import ExactSum
from kvhook.analysis.raw import Rows, split
from kvhook.analysis.values import Values
from kvhook.core_schema import CORE_KINDS, LIMITS, MISS_REASONS

if TYPE_CHECKING:
    from kvhook.ring.layout import Layout
    from kvhook.ring.slots import Slots

_NOT_LOOKED_UP, _EVICTED = MISS_REASONS.index("not_looked_up"), MISS_REASONS.index("evicted")
#: Kinds of work of which the time is wanted: columns of steps.
_WORK = ("num_prefill_tokens", "num_recomputed_tokens")


class CoreTotals:
    """Engine cores in numbers.

    Args:
        runs: it will be asked now and then while it grows, see `kvhook.analysis.values.Values`.

    Attributes:
        steps: how many.
        sums: column of steps -> its sum.
        limits: code of ``limited_by`` -> steps.
        peak: the most blocks in use in a step.
        seconds: kind of tokens -> the time that steps took for them, shared out by tokens.
        requests: that have ended; `preempted_ns` is how long they waited after preemptions.
        preemptions: how many; `lost_tokens` is what they threw away.
        missed_lookups, missed_tokens: code of ``miss_reason`` -> look-ups, and the tokens in whole blocks that they did
            not find.
        seen: look-ups with a look into the cache: how many, their tokens, those found.
        resumed: the same of requests that had been preempted.
        evicted_steps, evicted_ns: how long ago what a look-up asked for had been evicted.
        evicted_tokens, evicted_tokens_of_new: tokens that look-ups did not find because they had been evicted; those of
            requests that had not been preempted. `evicted_untold` look-ups do not tell.
    """

    def __init__(self, *, runs: bool = False) -> None:
        self.steps = self.peak = self.requests = self.preempted_ns = self.preemptions = self.lost_tokens = 0
        self.sums: Counter[str] = Counter()
        self.limits: Counter[int] = Counter()
        self.seconds = {kind: ExactSum() for kind in _WORK}
        self.missed_lookups: Counter[int] = Counter()
        self.missed_tokens: Counter[int] = Counter()
        self.seen, self.resumed = [0, 0, 0], [0, 0, 0]
        self.evicted_steps, self.evicted_ns = Values(runs=runs, add_up=False), Values(runs=runs, add_up=False)
        self.evicted_tokens = self.evicted_tokens_of_new = self.evicted_untold = 0
        #: for a diagnosis
        self.signs = SignTotals(runs=runs)
        #: core -> when its last step ended
        self._ended: dict[int, int] = {}

    # ---- taking in -------------------------------------------------------------------------------------------------

    def take(self, core: int, slots: Slots, layout: Layout, block_size: int) -> None:
        """Take in usable slots of one core, in the order of the run."""
        ended: list[Rows] = []
        for _, rows in split(slots, layout, CORE_KINDS):
            if rows.kind == "core_step":
                self._take_steps(core, rows)
                self.signs.take_steps(rows)
            elif rows.kind == "lookup":
                self._take_lookups(rows, block_size)
                self.signs.take_lookups(core, rows, block_size)
            elif rows.kind == "core_request":
                self.requests += len(rows)
                self.preempted_ns += int(rows.ints("preempted_ns").sum())
                ended.append(rows)
            elif rows.kind == "preemption":
                self.preemptions += len(rows)
                self.lost_tokens += int(rows.ints("num_lost_tokens").sum())
        for rows in ended:  # after the look-ups of the same requests
            self.signs.take_requests(core, rows)

    def _take_steps(self, core: int, rows: Rows) -> None:
        self.steps += len(rows)
        self.sums.update(rows.sums())
        limit = rows.ints("limited_by")
        for code in range(len(LIMITS)):
            if count := int(np.count_nonzero(limit == code)):
                self.limits[code] += count
        self.peak = max(self.peak, int(rows.ints("num_kv_blocks_peak").max()))
        # with asynchronous scheduling a step begins before the one before it has ended
        begin, end = rows.ints("t_schedule_ns").copy(), rows.ints("t_end_ns")
        begin[1:] = np.maximum(begin[1:], end[:-1])
        begin[0] = max(int(begin[0]), self._ended.get(core, int(begin[0])))
        self._ended[core] = int(end[-1])
        each = np.maximum(end - begin, 0) / 1e9 / np.maximum(rows.ints("num_scheduled_tokens"), 1)
        for kind, seconds in self.seconds.items():
            seconds.take(each * rows.ints(kind))

    def _take_lookups(self, rows: Rows, size: int) -> None:
        why, tokens, found = (rows.ints(name) for name in ("miss_reason", "num_tokens", "num_found_tokens"))
        resumed = rows.ints("resumed") == 1
        seen = why != _NOT_LOOKED_UP
        for of, which in ((self.seen, seen), (self.resumed, seen & resumed)):
            for i, more in enumerate((np.count_nonzero(which), tokens[which].sum(), found[which].sum())):
                of[i] += int(more)
        whole = (tokens - 1) // size * size if size else tokens
        not_found = np.maximum(whole - found, 0)
        for code in range(1, len(MISS_REASONS)):
            if count := int(np.count_nonzero(which := why == code)):
                self.missed_lookups[code] += count
                self.missed_tokens[code] += int(not_found[which].sum())
        evicted = why == _EVICTED
        for values, name in ((self.evicted_steps, "evicted_steps"), (self.evicted_ns, "evicted_ns")):
            ago = rows.ints(name)[evicted]
            values.take(ago[ago >= 0].astype(np.float64))
        asked = rows.ints("num_evicted_tokens") if rows.has("num_evicted_tokens") else np.full(len(rows), -1)
        self.evicted_untold += int(np.count_nonzero(asked < 0))
        self.evicted_tokens += int(asked.sum())
        self.evicted_tokens_of_new += int(asked[~resumed].sum())

    def copy(self) -> CoreTotals:
        """These so far; what is taken in there does not count here."""
        new = CoreTotals()
        for name in _COPIED:
            setattr(new, name, copy.copy(getattr(self, name)))
        new.seconds = {kind: ExactSum() for kind in self.seconds}
        for kind, seconds in self.seconds.items():
            new.seconds[kind].add(seconds)
        new.evicted_steps.add(self.evicted_steps)
        new.evicted_ns.add(self.evicted_ns)
        new.signs = self.signs.copy()
        return new


_COPIED = (
    *("steps", "sums", "limits", "peak", "requests", "preempted_ns", "preemptions", "lost_tokens", "seen", "resumed"),
    *("missed_lookups", "missed_tokens", "evicted_tokens", "evicted_tokens_of_new", "evicted_untold", "_ended"),
)
