"""What the ledger of blocks says of contents: from being cached to being evicted, and who shares them.

Pure: a table of events in, tables out. Where the same content comes again it has the same digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table

Ints = npt.NDArray[np.int64]

#: One content of one block, from being cached until it was evicted. Steps are -1 for what has not happened.
BLOCK_LIFE_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("core", "<i8", "number of the engine core"),
    ("block", "<i8", "number of the block"),
    ("group", "<i8", "KV cache group"),
    ("digest", "<u8", "keyed digest of the content, with all before it"),
    ("index", "<i8", "the how-manieth block of its request, from 0; -1 if not known"),
    ("request", "<i8", "number of the request that computed it; -1 if not known"),
    ("cached_step", "<i8", "step in which it could be found from; -1 if it was there before kvhook"),
    ("last_used_step", "<i8", "step in which it was cached or last found"),
    ("freed_step", "<i8", "step in which it was last given back; -1 if it never was"),
    ("evicted_step", "<i8", "step in which it was evicted; -1 if it was not"),
    ("reset_step", "<i8", "step in which the whole cache was reset; -1 if that did not end it"),
    ("num_hits", "<i8", "how often it was found in this block"),
    ("asked_again_step", "<i8", "step in which the content was computed again after its eviction; -1 if it never was"),
)

#: One prefix of whole blocks.
PREFIX_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("group", "<i8", "KV cache group"),
    ("digest", "<u8", "keyed digest of all its tokens"),
    ("parent", "<u8", "digest of the prefix that is a block shorter; 0 if it is one block, or that is not known"),
    ("num_blocks", "<i8", "its length in blocks"),
    ("num_tokens", "<i8", "its length in tokens"),
    ("num_requests", "<i8", "how many requests begin with it"),
    ("num_hits", "<i8", "how often its last block was found in the cache"),
)

_NONE = -1


def block_lives(events: Table) -> Table:
    """One row per content of a block: the columns of `BLOCK_LIFE_FIELDS`, in the order in which the lives began.

    Args:
        events: the ledger, `kvhook.records.core.CoreRecords.blocks`.
    """
    lives_of = np.flatnonzero((events["digest"] != 0) & (events["event"] != "allocate"))
    order = lives_of[np.lexsort((lives_of, events["block"][lives_of], events["core"][lives_of]))]
    rows = events[order]
    out = np.empty(0, [(name, kind) for name, kind, _ in BLOCK_LIFE_FIELDS])
    if not len(rows):
        return out
    cached, ended = rows["event"] == "cache", np.isin(rows["event"], ("evict", "reset"))
    begins = cached.copy()
    begins[0] = True
    other = (rows["block"][1:] != rows["block"][:-1]) | (rows["core"][1:] != rows["core"][:-1])
    begins[1:] |= other | ended[:-1]
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(rows)) - 1
    out.resize(len(first), refcheck=False)
    for name in ("core", "block", "group", "digest"):
        out[name] = rows[name][first]
    for name, what in (("index", "index"), ("request", "request"), ("cached_step", "step")):
        out[name] = np.where(cached[first], rows[what][first], _NONE)
    used = cached | (rows["event"] == "hit")
    out["last_used_step"] = _latest(rows["step"], used, first)
    out["freed_step"] = _latest(rows["step"], rows["event"] == "free", first)
    out["num_hits"] = np.add.reduceat((rows["event"] == "hit").astype(np.int64), first)
    for name, event in (("evicted_step", "evict"), ("reset_step", "reset")):
        out[name] = np.where(rows["event"][last] == event, rows["step"][last], _NONE)
    out["asked_again_step"] = _asked_again(out, cached[first], order[first], order[last], events["step"])
    return out[np.argsort(order[first], kind="stable")]


def _latest(steps: Ints, counts: npt.NDArray[np.bool_], first: npt.NDArray[np.intp]) -> Ints:
    latest: Ints = np.maximum.reduceat(np.where(counts, steps, _NONE), first)
    return latest


def _asked_again(
    lives: Table, cached: npt.NDArray[np.bool_], began: npt.NDArray[Any], ended: npt.NDArray[Any], steps: Ints
) -> Ints:
    """The step of the next time that an evicted content was cached; -1 if it was evicted in another block before.

    Args:
        lives: with their ends.
        cached: whether a life began with being cached.
        began: place of its first event in the ledger.
        ended: place of its last event.
        steps: of all events.
    """
    content = _content_of(lives)
    again = np.full(len(lives), _NONE)
    evicted = lives["evicted_step"] != _NONE
    span = len(steps) + 1
    asked_for = content[evicted] * span + ended[evicted]
    next_cached = _next(np.sort(content[cached] * span + began[cached]), asked_for, span)
    next_evicted = _next(np.sort(asked_for), asked_for, span)
    is_again = (next_cached != _NONE) & ((next_evicted == _NONE) | (next_cached < next_evicted))
    again[evicted] = np.where(is_again, steps[np.where(is_again, next_cached, 0)], _NONE)
    return again


def _next(places: Ints, after: Ints, span: int) -> Ints:
    """The next place of the same content behind each of `after`; -1 if there is none."""
    at = np.searchsorted(places, after, "right")
    found = np.append(places, _NONE)[at]
    there: Ints = np.where((found != _NONE) & (found // span == after // span), found % span, _NONE)
    return there


def _content_of(rows: Table) -> Ints:
    """Numbers that are equal where core, group and digest are."""
    content = np.unique(rows["digest"], return_inverse=True)[1].astype(np.int64).reshape(-1)
    for name in ("group", "core"):
        content = content * (int(rows[name].max(initial=0)) + 1) + rows[name]
    return content


def steps_between_uses(events: Table) -> Ints:
    """Reuse distances: for each time that a content was needed again, found in the cache or not, the steps since it had
    been needed before. In no particular order."""
    uses = events[np.isin(events["event"], ("cache", "hit")) & (events["digest"] != 0)]
    content = _content_of(uses) if len(uses) else np.empty(0, np.int64)
    order = np.argsort(content, kind="stable")
    content, steps = content[order], uses["step"][order]
    between: Ints = np.diff(steps)[content[1:] == content[:-1]]
    return between


def prefixes(events: Table, block_sizes: Mapping[int, int]) -> Table:
    """The tree of prefixes: one row per prefix of whole blocks, the columns of `PREFIX_FIELDS`, the shortest first.

    A request counts once for each prefix that it begins with, whether it found it in the cache or computed it.

    Args:
        events: the ledger.
        block_sizes: KV cache group -> tokens of a block.
    """
    uses = events[np.isin(events["event"], ("cache", "hit")) & (events["digest"] != 0) & (events["request"] >= 0)]
    out = np.zeros(0, [(name, kind) for name, kind, _ in PREFIX_FIELDS])
    if not len(uses):
        return out
    digest, number = np.unique(uses["digest"], return_inverse=True)
    groups = int(uses["group"].max()) + 1
    # a prefix is a digest in a group
    code, name = np.unique(number.reshape(-1) * groups + uses["group"], return_inverse=True)
    name = name.reshape(-1)
    length = np.zeros(len(code), np.int64)
    is_cache = uses["event"] == "cache"
    length[name[is_cache]] = uses["index"][is_cache] + 1
    out.resize(len(code), refcheck=False)
    out["group"], out["digest"], out["num_blocks"] = code % groups, digest[code // groups], length
    out["num_tokens"] = length * np.array([block_sizes.get(int(group), 0) for group in out["group"]])
    out["num_hits"] = np.bincount(name[~is_cache], minlength=len(code))
    # each request's prefixes, once, from the shortest to the longest
    who = [uses["core"], uses["request"], uses["group"], length[name], name]
    order = np.lexsort(who[::-1])
    who = [column[order] for column in who]
    new = np.append(True, np.any([column[1:] != column[:-1] for column in who], axis=0))
    core, request, group, blocks, name = (column[new] for column in who)
    out["num_requests"] = np.bincount(name, minlength=len(code))
    same = (core[1:] == core[:-1]) & (request[1:] == request[:-1]) & (group[1:] == group[:-1])
    follows = np.flatnonzero(same & (blocks[1:] == blocks[:-1] + 1)) + 1
    out["parent"][name[follows]] = out["digest"][name[follows - 1]]
    known: Table = out[out["num_blocks"] > 0]  # of the others it is not known how long they are: they were there before
    tree: Table = known[np.lexsort((known["digest"], known["num_blocks"]))]
    return tree
