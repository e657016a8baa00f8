"""Objects that do harm when they are asked for an attribute, handed to the publisher in C.

An attribute's getter is any Python code. Here it raises, deletes what it belongs to, empties the lists that are being
read, calls the publisher again, lets other threads run, and frees the objects that the caller holds on to.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from kvhook.adapters.step_functions import Counters
from tests.step import odd_objects, two_paths

#: Calls of the publisher from inside of itself go no deeper.
DEEPEST = 3


class Field:
    """The objects of one call, which the attackers among them know."""

    def __init__(self, r: random.Random) -> None:
        self.r = r
        self.members: list[dict[str, Any]] = []
        self.lists: list[list[Any]] = []
        self.again: Callable[[], Any] = lambda: None
        self.depth = 0
        self.attacks = 0

    def attack(self, mine: dict[str, Any]) -> None:
        """Do one of the things that nobody expects of an attribute."""
        self.attacks += 1
        how = self.r.randrange(8)
        if how == 0:
            raise self.r.choice((AttributeError("gone"), ValueError("no"), KeyboardInterrupt(), MemoryError()))
        if how == 1:
            mine.clear()
        elif how == 2:
            for each in self.members:
                each.clear()
        elif how == 3:
            for one in self.lists:
                one.clear()
        elif how == 4 and self.depth < DEEPEST:
            self.depth += 1
            try:
                self.again()
            finally:
                self.depth -= 1
        elif how == 5:
            time.sleep(0)
        elif how == 6:
            for one in self.lists:
                one[:] = [object()] * len(one)
            gc.collect(0)
        elif self.members:
            self.r.choice(self.members).update(dict.fromkeys(mine, self.r.choice((None, 10**30, "x", []))))


def attacker(field: Field, members: dict[str, Any]) -> Any:
    """An object with these attributes that now and then attacks before it gives one."""

    def get(self: Any, name: str) -> Any:
        if name.startswith("__") or name not in members:
            raise AttributeError(name)
        value = members[name]
        if field.r.random() < 0.2:
            field.attack(members)
        return value

    field.members.append(members)
    field.lists += [value for value in members.values() if type(value) is list]
    return type("Attacker", (), {"__getattr__": get})()


def play(seed: int, calls: int = 12) -> list[str]:
    """A scenario that follows from the seed. Returns what went wrong, [] if nothing did: that this process is still
    there is what is tested, and that the next publisher records."""
    r = random.Random(seed)
    with two_paths.table(*r.choice(two_paths.TABLES)) as adapter:
        compiled = two_paths.compile_one(adapter, r)
        made = two_paths.Made(compiled, r.choice((0.0, 0.4)))
        path = two_paths._path(compiled._bind_native, Counters())
        usual = odd_objects.holder
        field = Field(r)
        field.again = lambda: two_paths.call(path, made, r.choice(two_paths.CALLS), r.getrandbits(40))
        odd_objects.holder = lambda r, members, odd: attacker(field, members)
        try:
            for _ in range(calls):
                field.members.clear()
                field.lists.clear()
                two_paths.call(path, made, r.choice(two_paths.CALLS), r.getrandbits(40))
        finally:
            odd_objects.holder = usual
        # what an attack has left in a publisher stays there, as in the Python one: the hooks take that one out. The
        # next one is as good as new
        path.functions.left()
        made.odd = 0.0
        python, c = two_paths.paths(compiled, Counters())
        if (_clean_steps(python, made), python.records) != (_clean_steps(c, made), c.records) or not c.records:
            return [f"seed {seed}: {len(c.records)} records after {field.attacks} attacks"]
    return []


def _clean_steps(path: two_paths.Path, made: two_paths.Made) -> Any:
    """Steps with stats as vLLM makes them; gives what was raised."""
    r = random.Random(1)
    said = []
    for _ in range(3):
        try:
            kwargs = {}
            for argument in made.shape.plan.arguments:
                while argument != "engine_idx" and (value := made.stats(argument, r)) is None:
                    pass
                if argument != "engine_idx":
                    kwargs[argument] = value
            path.functions.record(**kwargs)
            path.functions.publish(1000, 2000)
        except BaseException as error:
            said.append(repr(error))
    return said


def attacks(scenarios: int, first: int = 0) -> list[str]:
    """So many scenarios, with another thread that uses each moment in which the lock is released."""
    over = threading.Event()

    def rummage() -> None:
        while not over.wait(0.001):
            gc.collect(0)

    thread = threading.Thread(target=rummage, daemon=True)
    thread.start()
    try:
        return [problem for seed in range(first, first + scenarios) for problem in play(seed)]
    finally:
        over.set()
        thread.join()
