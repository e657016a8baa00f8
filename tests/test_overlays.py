"""Methods of single objects that several put something over: each has what it had when all are gone, in every order."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from kvhook.overlays import Overlay


class Thing:
    def go(self) -> list[str]:
        return ["thing"]


def over(thing: Thing, name: str) -> Callable[[], list[str]]:
    """A function that calls what is there now."""
    before = thing.go
    return lambda: [name, *before()]


def put(thing: Thing, name: str) -> Overlay:
    return Overlay(thing, "go", over(thing, name))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("users", [False, True], ids=["the class's own", "the user's below"])
def test_in_whatever_order_they_go_what_was_there_is_there_again(order: tuple[int, ...], users: bool):
    thing = Thing()
    if users:
        thing.go = over(thing, "user")  # type: ignore[method-assign]
    before = dict(vars(thing))
    overlays = [put(thing, name) for name in "abc"]
    assert thing.go() == ["c", "b", "a", *(["user"] if users else []), "thing"]
    for number in order:
        overlays[number].take_out()
    assert vars(thing) == before
    assert ("user" in thing.go()) == users


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_what_somebody_else_has_put_over_it_stays_and_goes_on(order: tuple[int, ...]):
    thing = Thing()
    overlays = [put(thing, name) for name in "ab"]
    theirs = thing.go = over(thing, "user")  # type: ignore[method-assign]
    for number in order:
        overlays[number].take_out()
    assert thing.go is theirs
    assert thing.go()[0] == "user"
    assert thing.go()[-1] == "thing"


def test_what_somebody_else_has_put_between_stays():
    thing = Thing()
    below = put(thing, "a")
    theirs = thing.go = over(thing, "user")  # type: ignore[method-assign]
    above = put(thing, "b")
    below.take_out()
    above.take_out()
    assert thing.go is theirs


def test_it_is_taken_out_once():
    thing = Thing()
    overlay = put(thing, "a")
    overlay.take_out()
    theirs = thing.go = over(thing, "user")  # type: ignore[method-assign]
    overlay.take_out()
    assert thing.go is theirs


def test_an_object_that_is_gone_is_not_kept():
    thing: Any = Thing()
    overlay = put(thing, "a")
    alive = weakref.ref(thing)
    del thing, overlay
    gc.collect()
    assert alive() is None
