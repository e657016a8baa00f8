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
from kvhook.core.native import bind, make_state
from kvhook.core.pool import PoolAccount
from kvhook.core.steps import StepAccount
from kvhook.core.taps import Taps
from kvhook.core.writer import Writer, core_layout
from kvhook.facts import without_names
from kvhook.faults import pass_on
from kvhook.recording.recorder import NEEDS_CRC, process_facts
from kvhook.ring.place import RING_SUFFIXES, process_start
from kvhook.ring.writer import RingWriter

if TYPE_CHECKING:
    from kvhook.adapters.core import Core

#: The name of this stream in headers: which kinds of records a file holds.
STREAM = "core"

#: Every core's ring of a process has a number of its own.
_serials = itertools.count()


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
        self._hash_ids = bool(facts.pop("hash_ids", False))
        meta: dict[str, Any] = {
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
            path = directory / f"{pid}-{process_start(pid)}-{serial}{RING_SUFFIXES[STREAM]}"
            self.meta = without_names({**meta, "ring": str(path)})
            with contextlib.suppress(FileExistsError):
                self.ring = RingWriter(path, core_layout(), slots, self.meta, crc=NEEDS_CRC)
                break
        #: gives what counts, while that is there
        self.account: Callable[[], StepAccount | None] = lambda: None

    def follow(
        self,
        core: Core,
        failed: Callable[[BaseException], None],
        ledger: LedgerRing | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin to count.

        Args:
            core: what was found on the scheduler.
            failed: is told of an error, after which nothing is counted any more.
            ledger: where the ledger of blocks goes, if one is wanted.
            is_over: whether nothing is to be recorded any more; it is asked now and then.

        Raises:
            AttributeError: an object of the core does not let its methods be replaced; nothing has been changed.
        """
        publish = self.ring.publish

        given_up = False

        def give_up(error: BaseException) -> None:
            nonlocal given_up
            pass_on(error)
            if given_up:  # several taps may be under way in one call of vLLM's
                return
            given_up = True
            if (account := self.account()) is not None:
                account.state.on = False
            try:
                taps.take_out()
            finally:
                failed(error)

        taps = Taps()
        state = make_state(core)
        client_of = core.reads.get("client_index", lambda request: -1)
        writer = Writer(self.ring.layout, publish, self.number, self.key, state, client_of, self._hash_ids)
        account = StepAccount(core, PoolAccount(core, give_up, state), writer, taps, give_up)
        account.is_over = is_over
        if ledger is not None:
            ring = ledger.ring
            account.ledger = Ledger(
                core, ring.layout, ring.publish, self.number, self.key, account.number_of, give_up, state
            )
        bind(account, self.ring.layout, publish, self.number)
        try:
            account.tap()
        except Exception:
            taps.take_out()
            raise
        self.account = weakref.ref(account)

    def stop(self) -> None:
        """Take the counting out of the engine core, if that is still there."""
        account = self.account()
        if account is not None:
            account.stop()

    def close(self) -> None:
        """Mark the ring closed. Closing twice is fine."""
        self.ring.close()
