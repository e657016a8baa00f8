"""A small checker for the C11 memory model: every execution of two threads, by the axioms of RC11.

The axioms are those of Lahav, Vafeiadis, Kang, Hur and Dreyer, "Repairing Sequential Consistency in C/C++11" (PLDI
2017, section 3), without the one for SC accesses, which the ring has none of:

- coherence: ``hb ; eco?`` is irreflexive, where ``eco = (rf | mo | rb)+``;
- no thin air: ``sb | rf`` has no cycle;
- ``hb = (sb | sw)+``, and ``sw`` goes from a release store, or a release fence before a store, to an acquire load, or
  an acquire fence behind a load, that reads from that store or from its release sequence.

One thread writes and one reads. The modification order of every place is then the order in the writer's program, so an
execution is settled by the store that each load reads from, and all of them can be tried. Plain accesses count as
relaxed ones: a copy of bytes promises as little.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

RELAXED, RELEASE, ACQUIRE = "relaxed", "release", "acquire"


class Event(NamedTuple):
    """One access or fence. A fence has no place; a load has no value before it is run."""

    what: str
    place: str
    order: str
    value: int = 0


def store(place: str, value: int, order: str = RELAXED) -> Event:
    return Event("store", place, order, value)


def load(place: str, order: str = RELAXED) -> Event:
    return Event("load", place, order)


def fence(order: str) -> Event:
    return Event("fence", "", order)


Edges = set[tuple[int, int]]


def executions(
    initial: dict[str, int],
    writer: list[Event],
    reader: list[Event],
    wanted: Callable[[list[int]], bool] = lambda _: True,
) -> Iterator[list[int]]:
    """The values that the reader's loads can bring, in the order of its program, once for each allowed execution.

    Args:
        initial: what each place holds before; the stores of it happen before everything else.
        writer: stores and fences, in program order.
        reader: loads and fences, in program order.
        wanted: only executions that bring these values are checked; it saves the time for the others.
    """
    first = [store(place, value) for place, value in initial.items()]
    events = [*first, *writer, *reader]
    n, w, r = len(events), len(first), len(first) + len(writer)
    sb: Edges = {(i, j) for i in range(w) for j in range(w, n)}
    sb |= set(itertools.combinations(range(w, r), 2)) | set(itertools.combinations(range(r, n), 2))
    loads = [i for i in range(r, n) if events[i].what == "load"]
    stores = {p: [i for i in range(r) if events[i].what == "store" and events[i].place == p] for p in initial}
    mo = {(a, b) for ones in stores.values() for a, b in itertools.combinations(ones, 2)}
    for chosen in itertools.product(*(stores[events[i].place] for i in loads)):
        values = [events[a].value for a in chosen]
        if wanted(values) and _allowed(events, sb, mo, set(zip(chosen, loads, strict=True))):
            yield values


def _allowed(events: list[Event], sb: Edges, mo: Edges, rf: Edges) -> bool:
    rb = {(load, later) for earlier, load in rf for at, later in mo if at == earlier}
    hb = _closure(sb | _synchronises(events, sb, mo, rf))
    eco = _closure(rf | mo | rb)
    coherent = all(a != b and (b, a) not in eco for a, b in hb)
    return coherent and all(a != b for a, b in _closure(sb | rf))


def _synchronises(events: list[Event], sb: Edges, mo: Edges, rf: Edges) -> Edges:
    found: Edges = set()
    for a, b in rf:
        # the release sequence: earlier stores of the same thread to the same place head it as well
        heads = {a} | {earlier for earlier, later in mo if later == a and (earlier, a) in sb}
        froms = {h for h in heads if events[h].order == RELEASE}
        froms |= {f for f, h in sb if h in heads and events[f].what == "fence" and events[f].order == RELEASE}
        tos = {b} if events[b].order == ACQUIRE else set()
        tos |= {f for at, f in sb if at == b and events[f].what == "fence" and events[f].order == ACQUIRE}
        found |= set(itertools.product(froms, tos))
    return found


def _closure(edges: Edges) -> Edges:
    """All that can be reached; a bit set for each event."""
    after: dict[int, int] = {}
    for a, b in edges:
        after[a] = after.get(a, 0) | 1 << b
    for k in list(after):
        bit, more = 1 << k, after[k]
        for i in after:
            if after[i] & bit:
                after[i] |= more
    return {(a, b) for a, bits in after.items() for b in range(bits.bit_length()) if bits >> b & 1}
