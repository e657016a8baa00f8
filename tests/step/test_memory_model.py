"""The ring's protocol against every execution that C11 allows, on any processor: `kvhook/_step/ring_protocol.h`.

The header itself cannot be read by a checker of this size, so its order of accesses is written down here once more, and
a test holds the two together. The litmus tests show that the checker knows the model: they are the textbook ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import kvhook
from tests.step.rc11 import ACQUIRE, RELAXED, RELEASE, Event, executions, fence, load, store

PROTOCOL = Path(kvhook.__file__).parent / "_step" / "ring_protocol.h"
#: Words of a body: two are enough to be torn.
WORDS = ("body0", "body1")
#: The smallest ring that there is.
CAPACITY = 2


def write(n: int, without: str = "") -> list[Event]:
    """`ring_write` of record n; every word of the body is the record's number."""
    slot = n % CAPACITY
    steps = [
        ("odd stamp", store(f"stamp {slot}", 2 * n + 1)),
        ("fence", fence(RELEASE)),
        *(("body", store(f"{word} {slot}", n)) for word in WORDS),
        ("even stamp", store(f"stamp {slot}", 2 * n + 2, RELAXED if without == "release of the stamp" else RELEASE)),
        ("head", store("head", n + 1, RELAXED if without == "release of the head" else RELEASE)),
    ]
    return [event for name, event in steps if name != without]


def read(n: int, without: str = "") -> list[Event]:
    """`ring_read` of record n: its two looks at the stamp, the copy between them, the head."""
    slot = n % CAPACITY
    steps = [
        ("stamp", load(f"stamp {slot}", RELAXED if without == "acquire of the stamp" else ACQUIRE)),
        *(("body", load(f"{word} {slot}")) for word in WORDS),
        ("acquire fence", fence(ACQUIRE)),
        ("head", load("head")),
        ("stamp again", load(f"stamp {slot}")),
    ]
    return [event for name, event in steps if name != without]


#: Records 0 and 1 have been written.
INITIAL = {"head": 2} | {f"stamp {n}": 2 * n + 2 for n in (0, 1)} | {f"{word} {n}": n for word in WORDS for n in (0, 1)}


class Seen(NamedTuple):
    """What one execution brought a reader of record n."""

    stamp: int
    body: list[int]
    head: int
    again: int


def taken(writer: list[Event], n: int, without: str = "", *, by_head: bool, torn: bool) -> list[Seen]:
    """The executions in which a reader takes what it has copied for record n: as `ring_read` has it, or as it says of
    the head. `torn`: only those in which it is something else."""

    def of(values: list[int]) -> Seen:
        stamp, *body, head, again = values
        return Seen(stamp, body, head, again)

    def wanted(values: list[int]) -> bool:
        one = of(values)
        whole = one.stamp == 2 * n + 2 and (one.head < n + CAPACITY if by_head else one.again == one.stamp)
        return whole and (not torn or one.body != [n] * len(WORDS))

    places = {event.place for event in read(n) if event.place}
    # stores to other places order nothing: they are neither read nor released by what is read
    initial = {place: value for place, value in INITIAL.items() if place in places}
    kept = [event for event in writer if event.place in places or event.what == "fence"]
    return [of(values) for values in executions(initial, kept, read(n, without), wanted)]


def writes(numbers: Iterable[int], without: str = "") -> list[Event]:
    return [event for n in numbers for event in write(n, without)]


WAYS = pytest.mark.parametrize("by_head", [False, True], ids=["by its stamps", "by the head"])


@WAYS
@pytest.mark.parametrize("n", range(6))
def test_no_execution_gives_a_reader_a_torn_record(n: int, by_head: bool):
    assert taken(writes(range(2, 6)), n, by_head=by_head, torn=True) == []


@WAYS
@pytest.mark.parametrize("n", range(2, 4))
def test_a_reader_does_get_records(n: int, by_head: bool):
    assert taken(writes(range(2, 6)), n, by_head=by_head, torn=False)


@WAYS
@pytest.mark.parametrize(
    ("of_writer", "of_reader"),
    [("fence", ""), ("release of the stamp", ""), ("", "acquire of the stamp"), ("", "acquire fence")],
)
def test_each_fence_and_order_is_needed(of_writer: str, of_reader: str, by_head: bool):
    found = [taken(writes(range(2, 6), of_writer), n, of_reader, by_head=by_head, torn=True) for n in range(6)]
    assert any(found), "the protocol would do without it, as far as this checker can tell"


def test_a_head_that_is_seen_brings_the_record_that_it_counts():
    # a reader that begins with the head, as `ring_head` does
    initial = {place: value for place, value in INITIAL.items() if "1" not in place.split()}
    reader = [load("head", ACQUIRE), load("stamp 0"), *(load(f"{word} 0") for word in WORDS)]
    for head, stamp, *body in executions(initial, write(2), reader):
        assert head < 3 or (stamp == 6 and body == [2, 2])
    relaxed = executions(initial, write(2, "release of the head"), reader)
    assert any(head == 3 and (stamp != 6 or body != [2, 2]) for head, stamp, *body in relaxed)


# That what is checked is what is compiled.

SAID = {
    "memory_order_relaxed": RELAXED,
    "memory_order_release": RELEASE,
    "memory_order_acquire": ACQUIRE,
}


def accesses(function: str) -> list[str]:
    """The order of accesses in a function of the header: `store stamp relaxed`, `fence release`, `body`."""
    text = PROTOCOL.read_text()
    body = text[text.index(f"{function}(const Ring *ring") :]
    body = re.sub(r"/\*.*?\*/", "", body[: body.index("\n}")], flags=re.S)
    found = []
    pattern = r"atomic_(store|load)_explicit\((.*?), (memory_order_\w+)\)|atomic_thread_fence\((memory_order_\w+)\)"
    for match in re.finditer(rf"{pattern}|memcpy\((?:slot \+ BODY_AT|body), ", body):
        what, where, order, fenced = match.groups()
        if what:
            found.append(f"{what} {'head' if 'HEAD_AT' in where else 'stamp'} {SAID[order]}")
        else:
            found.append(f"fence {SAID[fenced]}" if fenced else "body")
    return found


def told(events: list[Event]) -> list[str]:
    names: list[str] = []
    for event in events:
        place = event.place.split(" ")[0]
        name = "body" if place in WORDS else f"{event.what} {place} {event.order}".replace("  ", " ")
        if names[-1:] != ["body"] or name != "body":
            names.append(name)
    return names


def test_the_header_has_the_accesses_that_are_checked_here_in_this_order():
    assert accesses("ring_write") == told(write(2))
    assert accesses("ring_read") == told(read(2))


# Litmus tests: what the model allows and forbids, as the paper and every textbook have it.


def test_message_passing():
    reader = [load("flag", ACQUIRE), load("data")]
    strong = executions({"data": 0, "flag": 0}, [store("data", 1), store("flag", 1, RELEASE)], reader)
    assert sorted(strong) == [[0, 0], [0, 1], [1, 1]]
    weak = executions({"data": 0, "flag": 0}, [store("data", 1), store("flag", 1)], reader)
    assert [1, 0] in list(weak)


def test_message_passing_by_fences():
    writer = [store("data", 1), fence(RELEASE), store("flag", 1)]
    both = executions({"data": 0, "flag": 0}, writer, [load("flag"), fence(ACQUIRE), load("data")])
    assert [1, 0] not in list(both)
    one = executions({"data": 0, "flag": 0}, writer, [load("flag"), load("data")])
    assert [1, 0] in list(one)


def test_a_place_is_never_read_backwards():
    reads = executions({"x": 0}, [store("x", 1), store("x", 2)], [load("x"), load("x")])
    assert sorted(reads) == [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 2]]


def test_a_release_sequence_goes_on_over_later_stores_of_the_same_thread():
    writer = [store("data", 1), store("flag", 1, RELEASE), store("flag", 2)]
    found = list(executions({"data": 0, "flag": 0}, writer, [load("flag", ACQUIRE), load("data")]))
    assert [2, 0] not in found
    assert [2, 1] in found
