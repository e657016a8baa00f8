"""The same scenario of a played engine core, counted in C and in Python, and what each of them made of it."""

from __future__ import annotations

import gc
import random
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from kvhook import _step
from kvhook.core.ledger import LedgerRing
from kvhook.core.recorder import CoreRecorder
from kvhook.core_schema import CORE_KINDS
from kvhook.ring.layout import BODY_AT
from tests.core.played_core import Output, Request, Scheduler, core_of

#: Columns that are times, which differ.
TIMES = ("t_", "kvhook_ns", "preempted_ns", "evicted_ns")


class Number(int):
    """An integer of a class of its own."""


class NoLength:
    """Something without a length, where there was a list."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _raise(error: BaseException) -> Any:
    raise error


#: What a number may be instead.
NUMBERS: tuple[Callable[[int], Any], ...] = (
    Number,
    float,
    str,
    lambda n: None,
    lambda n: n + (1 << 70),
    lambda n: -n - 1,
    lambda n: n == 1,
    lambda n: _raise(AttributeError("gone")),
    lambda n: _raise(ValueError("no")),
    lambda n: _raise(KeyboardInterrupt()),
)


class OddRequest(Request):
    """A request whose computed tokens can be made odd while kvhook looks."""

    odd: Callable[[int], Any] = int

    @property
    def num_computed_tokens(self) -> Any:
        """As kvhook is to see it."""
        return self.odd(self._computed)

    @num_computed_tokens.setter
    def num_computed_tokens(self, value: int) -> None:
        self._computed = value


def _odd_output(r: random.Random, output: Output) -> None:
    what = r.randrange(10)
    number = r.choice(NUMBERS[:7])
    if what == 0:
        output.total_num_scheduled_tokens = number(output.total_num_scheduled_tokens)
    elif what == 1:
        name = next(iter(output.tokens), "0")
        drafts: list[Any] = [None, {name: [1]}, {name: [1, 2], "x": []}, {name: (1,)}, {name: 5}, OrderedDict(), [], 7]
        output.scheduled_spec_decode_tokens = r.choice(drafts)
    elif what == 2:
        output.num_scheduled_tokens = r.choice([OrderedDict, list, dict])(output.tokens)
    elif what == 3:
        output.scheduled_new_reqs = r.choice([tuple(output.scheduled_new_reqs), None, NoLength(), 5])
    elif what == 4:
        name = r.choice([name for name in vars(output) if name != "tokens"])
        delattr(output, name)
    elif what == 5:
        output.total_num_scheduled_tokens += r.choice([-1, 1, 5])
    elif what == 6:
        output.num_scheduled_tokens = {**output.tokens, "nobody": 1}


def _odd_core(r: random.Random, sched: Any) -> Callable[[], None]:
    """Make something odd that is there for longer; gives what puts it right again."""
    queue = sched.kv_cache_manager.block_pool.free_block_queue
    number = r.choice(NUMBERS)
    what = r.randrange(5)
    if what == 0:
        queue.odd = number
        return lambda: setattr(queue, "odd", int)
    requests = [request for request in sched.running if isinstance(request, OddRequest)]
    if what == 1 and requests:
        request = r.choice(requests)
        request.odd = number
        return lambda: setattr(request, "odd", int)
    name = r.choice(["max_num_scheduled_tokens", "max_num_running_reqs", "skipped_waiting"])
    before = getattr(sched, name)
    if what == 2:
        delattr(sched, name)
    elif name == "skipped_waiting":
        setattr(sched, name, r.choice([NoLength(), None, (), "ab"]))
    else:
        setattr(sched, name, r.choice(NUMBERS[:7])(before))
    return lambda: setattr(sched, name, before)


class OddScheduler(Scheduler):
    """What kvhook finds after a ``schedule`` or ``update_from_output`` is odd at times; vLLM's own work is not."""

    oddity = 0.0

    def schedule(self) -> Output:
        """As usual, and then something is odd."""
        output = super().schedule()
        if self.dice.random() < self.oddity:
            _odd_output(self.dice, output)
        self._be_odd()
        return output

    def update_from_output(self, scheduler_output: Output, sampled: Any = None) -> Any:
        """The same."""
        result = super().update_from_output(scheduler_output)
        self._be_odd()
        return result

    def begin(self, dice: random.Random, oddity: float) -> None:
        """From now on."""
        self.dice, self.oddity, self.put_right = dice, oddity, [lambda: None]

    def be_usual(self) -> None:
        """Nothing is odd until the next call."""
        self.put_right.pop()()
        self.put_right.append(lambda: None)

    def _be_odd(self) -> None:
        if self.dice.random() < self.oddity:
            self.put_right[:] = [_odd_core(self.dice, self)]


class Told(NamedTuple):
    """What came out of a scenario."""

    records: list[Any]
    events: list[Any]
    faults: list[str]
    schedule: list[Any]
    tapped: bool


def play(seed: int, native: Any, folder: Path) -> Told:
    """One scenario; `native` is the extension, or None for the counting in Python."""
    r = random.Random(seed)
    oddity = r.choice([0.0, 0.0, 0.02, 0.1])
    blocks, places = r.choice([24, 60, 200]), r.choice([2, 6, 16])
    sched = OddScheduler(seed, blocks, 4, places, r.choice([12, 40, 400]))
    sched.stats_wanted = r.random() < 0.7
    sched.begin(r, oddity)
    faults: list[str] = []
    with patch.object(_step, "native", native):
        core = core_of(sched)
        recorder = CoreRecorder(0, core, folder, 1 << 11, {"key": "11" * 16})
        ledger = LedgerRing(0, folder, 1 << 9, {"serial": seed}) if r.random() < 0.5 else None
        recorder.follow(core, lambda error: faults.append(repr(error)), ledger)
        try:
            schedule = _drive(r, sched)
            tapped = "schedule" in vars(sched)
            recorder.stop()
            events = [] if ledger is None else _slots(ledger.ring)
            return Told(_rows(recorder.ring), events, faults, schedule, tapped)
        finally:
            recorder.close()
            recorder.ring.path.unlink()
            if ledger is not None:
                ledger.close()
                ledger.ring.path.unlink()


def _drive(r: random.Random, sched: Any) -> list[Any]:
    """Requests come and go; what was scheduled, and what came out of vLLM."""
    told: list[Any] = []
    shared = [r.randrange(100) for _ in range(20)]
    under_way: list[Output] = []
    ahead, made = r.choice([1, 1, 2]), 0
    for _ in range(r.randrange(20, 120)):
        for _ in range(r.choice([0, 0, 0, 0, 1, 3]) if made < 30 else 0):
            prompt = shared[: r.choice([0, 0, 9, 20])] + [r.randrange(100) for _ in range(r.randrange(1, 20))]
            kind = r.choice([Request, OddRequest])
            sched.add_request(kind(str(made), prompt, r.randrange(1, 30), 4))
            made += 1
        try:
            output = sched.schedule()
        except BaseException as error:
            told.append(repr(error))
            return told
        finally:
            sched.be_usual()
        told.append(dict(output.tokens))
        under_way.append(output)
        if len(under_way) < ahead:
            continue
        if r.random() < 0.05:
            under_way.pop(0)  # it came out empty, say
            continue
        output = under_way.pop(0)
        try:
            by_name = r.random() < 0.1
            told.append(
                sched.update_from_output(scheduler_output=output) if by_name else sched.update_from_output(output)
            )
        except BaseException as error:
            told.append(repr(error))
            return told
        finally:
            sched.be_usual()
        told[-1] = told[-1] is None
        if r.random() < 0.02:
            sched.kv_cache_manager.block_pool.reset_prefix_cache()
    return told


def _rows(ring: Any) -> list[Any]:
    """The records in the ring, number by number, without times."""
    names = {code: [c.name for c in ring.layout.columns[kind]] for kind, (code, _) in CORE_KINDS.items()}
    rows = []
    for body in _slots(ring):
        n, kind, engine = struct.unpack_from("<qii", body)
        numbers = struct.unpack_from(f"<{len(names[kind])}q", body, 16)
        kept = [(name, number) for name, number in zip(names[kind], numbers, strict=True) if not name.startswith(TIMES)]
        rows.append((n, kind, engine, kept, body[16 + 8 * len(numbers) :].strip(b"\0")))
    return rows


def _slots(ring: Any) -> list[bytes]:
    size, first = ring.layout.slot_bytes, ring.header_bytes
    whole = bytes(ring.map)
    return [whole[first + i * size + BODY_AT : first + (i + 1) * size] for i in range(min(ring.head, ring.capacity))]


def differences(seed: int) -> list[str]:
    """In what the two differ; empty if in nothing."""
    gc.disable()  # after a fault nothing but a circle holds what has been counted, and it is to be read first
    try:
        with tempfile.TemporaryDirectory() as folder:
            in_c = play(seed, _step.native, Path(folder))
            in_python = play(seed, None, Path(folder))
    finally:
        gc.enable()
    found = []
    for name in Told._fields:
        one, other = getattr(in_c, name), getattr(in_python, name)
        if one != other:
            found.append(f"seed {seed}: {name} differ")
            if isinstance(one, list):
                found += [f"  {i}: {a}\n     {b}" for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b][
                    :2
                ]
                found.append(f"  {len(one)} and {len(other)}")
    if in_c.schedule and isinstance(in_c.schedule[-1], str) and "KeyboardInterrupt" not in in_c.schedule[-1]:
        found.append(f"seed {seed}: {in_c.schedule[-1]} came out of the engine")
    return found
