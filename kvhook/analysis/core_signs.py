"""What of the engine cores' records a diagnosis looks at, added up as it comes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvhook.analysis.values import Values
from kvhook.core_schema import LIMITS, MISS_REASONS

if TYPE_CHECKING:
    from kvhook.analysis.raw import Rows

_NOT_LOOKED_UP, _EVICTED, _SHORT = (MISS_REASONS.index(why) for why in ("not_looked_up", "evicted", "short"))

#: A beginning that is shared counts from so many tokens on: a few are common to all texts of a language or template.
WORTH_SHARING = 8
#: So many look-ups that missed what had been evicted wait for the end of their request, which tells when it came.
_MOST_PENDING = 1 << 16


@dataclass(frozen=True)
class CoreSigns:
    """Signs of what a run suffers from."""

    #: steps that scheduled something
    steps: int
    #: limit -> steps in which it held the batch back
    limited_by: Mapping[str, int]
    #: limit -> share of the KV blocks that were not in use in these steps, on average
    free_when: Mapping[str, float]
    #: the most blocks that held anything at one time, cached ones included, as a share
    touched: float
    #: steps that only decoded, and steps that prefilled beside it: how many, and their median time in seconds
    decode_steps: int
    mixed_steps: int
    decode_seconds: float
    mixed_seconds: float
    #: share of all decoded tokens that came in steps with prefill
    mixed_share: float
    #: look-ups of requests that came for the first time
    first_lookups: int
    #: those that found nothing, but share a beginning of less than a block with a prompt just before: look-ups, tokens
    below_block: int
    below_block_tokens: int
    #: those of prompts that are shorter than a block
    short: int
    #: shared tokens of all first look-ups; -1 where that was not recorded
    shared_tokens: int
    #: new requests that were never looked up, their prompt tokens, and those of them in whole blocks that a prompt just
    #: before began with as well
    unasked: int
    unasked_tokens: int
    unasked_whole_blocks: int
    #: look-ups that missed what had been evicted, and tokens that they missed by it
    evicted: int
    evicted_tokens: int
    #: those of them whose request already waited when the block was evicted
    waited_evicted: int
    waited_evicted_tokens: int


class SignTotals:
    """The same while it is added up. See `CoreSigns`.

    Args:
        runs: it will be asked now and then while it grows, see `kvhook.analysis.values.Values`.
    """

    def __init__(self, *, runs: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.limits: Counter[int] = Counter()
        self.free: Counter[int] = Counter()  # in millionths of the blocks, so that sums are exact
        self.touched = 0.0
        self.alone, self.mixed = Values(runs=runs, add_up=False), Values(runs=runs, add_up=False)
        #: (core, request) -> when what it asked for had been evicted, and the tokens that it missed, of each look-up
        self.pending: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}

    def take_steps(self, rows: Rows) -> None:
        """Take in steps of a core."""
        busy = rows.ints("num_scheduled_tokens") > 0
        if not busy.any():
            return
        blocks = np.maximum(rows.ints("num_kv_blocks")[busy], 1)
        empty = rows.ints("num_kv_blocks_empty")[busy]
        free = (rows.ints("num_kv_blocks_cached")[busy] + empty) / blocks
        limit = rows.ints("limited_by")[busy]
        for code in np.unique(limit).tolist():
            mask = limit == code
            self.limits[code] += int(np.count_nonzero(mask))
            self.free[code] += int(np.rint(1e6 * free[mask]).astype(np.int64).sum())
        self.touched = max(self.touched, float(1 - (empty / blocks).min()))
        decoded = rows.ints("num_decode_tokens")[busy]
        prefilled = (rows.ints("num_prefill_tokens") + rows.ints("num_recomputed_tokens"))[busy] > 0
        took = (rows.ints("t_end_ns") - rows.ints("t_schedule_ns"))[busy] / 1e9
        timed = (decoded > 0) & (rows.ints("t_update_ns")[busy] >= 0) & (took > 0)
        self.alone.take(took[timed & ~prefilled])
        self.mixed.take(took[timed & prefilled])
        more = {"steps": np.count_nonzero(busy), "decoded": decoded.sum(), "beside": decoded[timed & prefilled].sum()}
        self.counts.update({name: int(value) for name, value in more.items()})

    def take_lookups(self, core: int, rows: Rows, size: int) -> None:
        """Take in look-ups of a core."""
        why, tokens, found = (rows.ints(name) for name in ("miss_reason", "num_tokens", "num_found_tokens"))
        told = rows.has("num_shared_tokens")
        shared = rows.ints("num_shared_tokens") if told else np.full(len(rows), -1)
        new, asked = rows.ints("resumed") == 0, why != _NOT_LOOKED_UP
        first, unasked = new & asked, new & ~asked
        below = first & (found == 0) & (shared >= WORTH_SHARING) & (shared < max(size, 1))
        whole = np.minimum(np.maximum(shared, 0), tokens - 1) // max(size, 1) * max(size, 1)
        evicted = new & (why == _EVICTED)
        missed = self._missed(rows, size, tokens, found)
        more = {
            "first": np.count_nonzero(first),
            "below": np.count_nonzero(below),
            "below_tokens": shared[below].sum(),
            "short": np.count_nonzero(first & (why == _SHORT)),
            "shared": np.maximum(shared, 0)[first].sum(),
            "untold": np.count_nonzero(first & (shared < 0)),
            "unasked": np.count_nonzero(unasked),
            "unasked_tokens": tokens[unasked].sum(),
            "unasked_whole": whole[unasked].sum(),
            "evicted": np.count_nonzero(evicted),
            "evicted_tokens": missed[evicted].sum(),
        }
        self.counts.update({name: int(value) for name, value in more.items()})
        if evicted.any() and len(self.pending) < _MOST_PENDING:
            columns = (rows.ints("request"), rows.ints("t_ns") - rows.ints("evicted_ns"), missed)
            for request, when, lost in zip(*(column[evicted].tolist() for column in columns), strict=True):
                key = core, request
                self.pending[key] = (*self.pending.get(key, ()), (when, lost))

    def _missed(
        self, rows: Rows, size: int, tokens: npt.NDArray[np.int64], found: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Tokens that each look-up would have found without evictions; at most, where that was not recorded."""
        whole = (tokens - 1) // size * size if size else tokens
        most: npt.NDArray[np.int64] = np.maximum(whole - found, 0)
        if not rows.has("num_evicted_tokens"):
            return most
        told = rows.ints("num_evicted_tokens")
        missed: npt.NDArray[np.int64] = np.where(told >= 0, told, most).astype(np.int64)
        return missed

    def take_requests(self, core: int, rows: Rows) -> None:
        """Take in requests of a core that have ended."""
        if not self.pending:
            return
        for request, arrived in zip(rows.ints("request").tolist(), rows.ints("t_arrived_ns").tolist(), strict=True):
            for when, lost in self.pending.pop((core, request), ()):
                if 0 <= arrived < when:
                    self.counts.update(waited=1, waited_tokens=lost)

    def copy(self) -> SignTotals:
        """These so far; what is taken in there does not count here."""
        new = SignTotals()
        for name in ("counts", "limits", "free", "touched", "pending"):
            setattr(new, name, copy.copy(getattr(self, name)))
        new.alone.add(self.alone)
        new.mixed.add(self.mixed)
        return new

    def signs(self) -> CoreSigns:
        """What they say."""
        n = self.counts
        names = {code: LIMITS[code] if 0 <= code < len(LIMITS) else str(code) for code in self.limits}
        return CoreSigns(
            steps=n["steps"],
            limited_by={name: self.limits[code] for code, name in names.items()},
            free_when={name: self.free[code] / 1e6 / self.limits[code] for code, name in names.items()},
            touched=self.touched,
            decode_steps=self.alone.count,
            mixed_steps=self.mixed.count,
            decode_seconds=self.alone.median() or 0.0,
            mixed_seconds=self.mixed.median() or 0.0,
            mixed_share=n["beside"] / n["decoded"] if n["decoded"] else 0.0,
            first_lookups=n["first"],
            below_block=n["below"],
            below_block_tokens=n["below_tokens"],
            short=n["short"],
            shared_tokens=-1 if n["untold"] else n["shared"],
            unasked=n["unasked"],
            unasked_tokens=n["unasked_tokens"],
            unasked_whole_blocks=n["unasked_whole"],
            evicted=n["evicted"],
            evicted_tokens=n["evicted_tokens"],
            waited_evicted=n["waited"],
            waited_evicted_tokens=n["waited_tokens"],
        )
