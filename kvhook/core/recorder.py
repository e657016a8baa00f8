"""Records one engine core into one ring."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.core.ledger import Ledger, LedgerRing
from kvhook.core.lives import Life, read_id, request_key
from kvhook.core.pool import PoolAccount
from kvhook.core.steps import StepAccount
from kvhook.core.taps import Taps
from kvhook.core_schema import CORE_KINDS, CORE_REQUEST, CORE_STEP, LOOKUP, PREEMPTION
from kvhook.recording.recorder import NEEDS_CRC, process_facts
from kvhook.ring.layout import Layout, make_layout
from kvhook.ring.place import process_start
from kvhook.ring.writer import RingWriter

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.ring.writer import Publish

#: Rings of engine cores do not lie among those that `kvhook ls` shows: they go by another name.
CORE_RING_SUFFIX = ".core"
#: The name of this stream in headers: which kinds of records a file holds.
STREAM = "core"

#: Every core's ring of a process has a number of its own.
_serials = itertools.count()


def core_layout() -> Layout:
    """The slots of an engine core. All have the same columns: what a vLLM cannot give is blank in them."""
    return make_layout({}, CORE_KINDS)


class Writer:
    """Packs records and publishes them; it knows their numbers and nothing of vLLM."""

    def __init__(self, layout: Layout, publish: Publish, engine: int, key: bytes) -> None:
        self._publish, self._engine, self._key = publish, engine, key
        self._pack_step = layout.struct_of("core_step").pack
        self._pack_request = layout.struct_of("core_request").pack
        self._pack_preemption = layout.struct_of("preemption").pack
        self._pack_lookup = layout.struct_of("lookup").pack
        self._n = 0

    def step(self, columns: tuple[int, ...]) -> None:
        """A step: the columns of `CORE_STEP_FIELDS`, in order."""
        n = self._n
        self._n = self._publish(n, self._pack_step(n, CORE_STEP, self._engine, *columns))

    def request(self, life: Life, step: int, now: int, reason: int) -> None:
        """A request that has ended."""
        n, request = self._n, life.request
        answered = life.t_first_token >= 0 and request.num_output_tokens > 0  # a pooling request is not
        name, sample = read_id(request.request_id)
        record = self._pack_request(
            n,
            CORE_REQUEST,
            self._engine,
            life.number,
            _number(name),
            sample,
            request_key(self._key, name),
            reason,
            life.arrived_step,
            life.first_scheduled_step,
            life.first_token_step if answered else -1,
            step,
            life.t_arrived,
            life.t_first_scheduled,
            life.t_first_token if answered else -1,
            now,
            request.num_prompt_tokens,
            request.num_output_tokens,
            max(life.cached, 0),
            life.prefilled,
            life.recomputed,
            life.preemptions,
            life.preempted_ns,
        )
        self._n = self._publish(n, record)

    def preemption(self, step: int, life: Life, lost: int, freed: int) -> None:
        """A request lost its blocks."""
        n = self._n
        name, _ = read_id(life.request.request_id)
        record = self._pack_preemption(
            n,
            PREEMPTION,
            self._engine,
            step,
            life.number,
            _number(name),
            life.preempted_at,
            life.preemptions,
            lost,
            freed,
            life.request.num_output_tokens,
        )
        self._n = self._publish(n, record)

    def lookup(self, step: int, life: Life, resumed: int) -> None:
        """A request was scheduled with what it had found in the prefix cache."""
        n = self._n
        name, _ = read_id(life.request.request_id)
        record = self._pack_lookup(
            n,
            LOOKUP,
            self._engine,
            step,
            life.number,
            _number(name),
            life.t_looked_up,
            resumed,
            life.tries,
            life.looked_up,
            life.found,
            *life.miss,
        )
        self._n = self._publish(n, record)


class CoreRecorder:
    """The ring of one engine core, and what is told of it.

    The counting itself (`follow`) hangs on the core's own objects, and goes with them.

    Args:
        number: number of the core in this process, from 0.
        core: what was found on its scheduler.
        directory: where the ring goes.
        slots: its capacity, a power of two.
        facts: what else is to be said of it.

    Raises:
        OSError: the ring cannot be made.
    """

    def __init__(self, number: int, core: Core, directory: Path, slots: int, facts: dict[str, Any]) -> None:
        self.number = number
        self.key = bytes.fromhex(facts.pop("key", "")) or secrets.token_bytes(16)
        self.meta: dict[str, Any] = {
            "engine": number,
            "stream": STREAM,
            **process_facts(),
            **core.facts,
            **facts,
            "absent": {"core_step": dict(core.absent)},
        }
        pid = os.getpid()
        for serial in _serials:
            self.serial = serial
            path = directory / f"{pid}-{process_start(pid)}-{serial}{CORE_RING_SUFFIX}"
            self.meta["ring"] = str(path)
            with contextlib.suppress(FileExistsError):
                self.ring = RingWriter(path, core_layout(), slots, self.meta, crc=NEEDS_CRC)
                break
        self._account: Callable[[], StepAccount | None] = lambda: None

    def follow(self, core: Core, failed: Callable[[BaseException], None], ledger: LedgerRing | None = None) -> None:
        """Begin to count.

        Args:
            core: what was found on the scheduler.
            failed: is told of an error, after which nothing is counted any more.
            ledger: where the ledger of blocks goes, if one is wanted.

        Raises:
            AttributeError: an object of the core does not let its methods be replaced; nothing has been changed.
        """
        publish = self.ring.publish

        def give_up(error: BaseException) -> None:
            taps.take_out()
            failed(error)

        taps = Taps()
        writer = Writer(self.ring.layout, publish, self.number, self.key)
        account = StepAccount(core, PoolAccount(core, give_up), writer, taps, give_up)
        if ledger is not None:
            ring = ledger.ring
            account.ledger = Ledger(core, ring.layout, ring.publish, self.number, self.key, account.number_of, give_up)
        try:
            account.tap()
        except Exception:
            taps.take_out()
            raise
        self._account = weakref.ref(account)

    def stop(self) -> None:
        """Take the counting out of the engine core, if that is still there."""
        account = self._account()
        if account is not None:
            account.stop()

    def close(self) -> None:
        """Mark the ring closed. Closing twice is fine."""
        self.ring.close()


def _number(name: str) -> int:
    return int(name) if name.isdecimal() and len(name) < 19 else -1
