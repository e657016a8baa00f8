"""The engine core's steps: what each call of ``Scheduler.schedule`` did, and what came of it.

A step begins with ``schedule`` and ends with the ``update_from_output`` that is given its result; with asynchronous
scheduling or a pipeline the next step begins in between. Its record is written when it ends. So what is counted goes to
the step in whose ``schedule`` or ``update_from_output`` it was, and what was between two of them to the one that comes.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvhook.core import native
from kvhook.core.limits import limited_by
from kvhook.core.lives import Life
from kvhook.core.lookups import Lookups
from kvhook.core.pool import PoolAccount
from kvhook.core.preemptions import Preemptions
from kvhook.core.prefills import NOTHING, Prefills
from kvhook.core.scheduled import Scheduled, new_holders
from kvhook.core_schema import LIMITS
from kvhook.faults import USERS, contained

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.core.ledger import Ledger
    from kvhook.core.taps import Taps
    from kvhook.core.writer import Writer

clock = time.monotonic_ns
Failed = Callable[[BaseException], None]

_NONE_WAITING = LIMITS.index("none_waiting")
#: Once in so many steps (less one, and a power of two) it is looked up whether the session has been closed: 2 us.
_LOOK_UP = 255


class StepAccount:
    """Follows one scheduler, and hands each step, request, preemption and look-up to a writer."""

    def __init__(self, core: Core, pool: PoolAccount, writer: Writer, taps: Taps, failed: Failed) -> None:
        self.core, self.pool, self.writer, self._taps, self._failed = core, pool, writer, taps, failed
        self.state = writer.state
        self.lookups = Lookups(core, pool, self.life_of)
        #: what writes down every block's events, where that is wanted; set before `tap`
        self.ledger: Ledger | None = None
        #: whether nothing is to be recorded any more
        self.is_over: Callable[[], bool] = lambda: False
        self._sched, self._reads, self._states = core.sched, core.reads, core.reads["states"]
        self._block_size: int = core.facts["block_size"]
        self._tokens_known = "num_kv_tokens" not in core.absent
        self._lives: dict[str, Life] = {}
        self._prefills = Prefills(core.reads["computed"])
        self._preemptions = Preemptions(core, writer, self._prefills, self.life_of, failed)
        #: of each request that has ended and is not written: its life, when, why, and whether an update ended it
        self._finished: list[tuple[Life, int, int, bool]] = []
        self._requests = 0
        for request in list(core.sched.requests.values()):  # it has been at work already
            life = self._know(request, -1)
            life.reached = self._reads["computed"](request)
            if 0 < life.reached < request.num_tokens - 1:
                self._prefills.lives[request.request_id] = life

    def tap(self) -> None:
        """Put the counting in place."""
        self.state.on = True
        sched, taps = self._sched, self._taps
        self.pool.tap(taps)
        if self.ledger is not None:
            self.ledger.tap(taps)
        self.lookups.tap(taps, self._failed)
        in_each_step = {
            "schedule": self._on_schedule,
            "update_from_output": self._on_update,
            "make_stats": self._on_make_stats,
        }
        for name, make in in_each_step.items():
            taps.put(sched, name, native.tap(self.state, name) or make)
        taps.put(sched, "add_request", self._on_add_request)
        taps.put(sched, "_free_request", self._on_free_request)
        self._preemptions.tap(taps)

    def parts(self) -> dict[str, Any]:
        """For the extension: what it has to look at, and what does the steps that it does not do."""
        calls = {
            "failed": self._failed,
            "begin_lookups": self.lookups.begin,
            "end_lookups": self.lookups.end,
            "scheduled": self._scheduled,
            "write": self._write,
            "make_scheduled": Scheduled,
            "write_finished": self._write_finished,
            "flush": self.lookups.end if self.ledger is None else self.ledger.flush,
            "look_up": self._look_up,
        }
        lives, preempted = self._prefills.lives, self._preemptions.lives
        return {"calls": calls, "prefilling": lives, "preempted": preempted, "finished": self._finished}

    def life_of(self, request: Any) -> Life:
        """What is known of a request."""
        return self._lives.get(request.request_id) or self._know(request, -1)

    def number_of(self, request: Any) -> int:
        """The number of a request; -1 if it has ended, which it may have before it gives back its blocks."""
        life = self._lives.get(request.request_id)
        return -1 if life is None else life.number

    def stop(self) -> None:
        """Take the counting out, and write what is known and has not been written."""
        self._taps.take_out()
        self.state.on = False
        self._write_finished()
        if self.ledger is not None:
            self.ledger.flush()

    def _know(self, request: Any, now: int) -> Life:
        life = self._lives[request.request_id] = Life(self._requests, request, self.state.step, now)
        self._requests += 1
        return life

    # ---- schedule ------------------------------------------------------------------------------------------------

    def _on_schedule(self, original: Callable[..., Any]) -> Callable[..., Any]:
        state, lookups, scheduled = self.state, self.lookups, self._scheduled

        def schedule(*args: Any, **kwargs: Any) -> Any:
            if not self.state.on:
                return original(*args, **kwargs)
            start = clock()
            preempted = self.state.num_preempted
            if state.looked:
                with contained(self._failed):
                    lookups.begin()
            output = original(*args, **kwargs)
            try:
                end = clock()
                if state.looked:
                    lookups.end()
                scheduled(output, start, end, preempted)
            except USERS:
                raise
            except BaseException as error:
                self._failed(error)
            return output

        return schedule

    def _scheduled(self, output: Any, start: int, end: int, preempted: int) -> None:
        tokens: dict[str, int] = output.num_scheduled_tokens
        total: int = output.total_num_scheduled_tokens
        drafts = output.scheduled_spec_decode_tokens
        spec = sum(map(len, drafts.values())) if drafts else 0
        pool, state = self.pool, self.state
        # most steps only decode: the others are looked at more closely
        new, resumed, work = 0, 0, NOTHING
        if self._prefills.lives or self._preemptions.lives or output.scheduled_new_reqs or pool.just_evicted:
            new, resumed = self._changed(output, tokens, start)
            work = self._prefills.go_on(output, tokens, self.state.step)
        prefill, recomputed, decoded, prefill_reqs, cut, begun = work
        decode = total - prefill - recomputed - spec
        if decode - decoded > len(tokens) - prefill_reqs:
            more = self._prefills.fall_back(output, tokens, self.state.step, self._sched.requests, self.life_of)
            prefill, recomputed, decoded, prefill_reqs, cut, begun = map(operator.add, work, more)
            decode = total - prefill - recomputed - spec
        budget, waiting, skipped, running, free = self._states()
        limit = _NONE_WAITING
        stalled = self._prefills.stalled(tokens) if self._prefills.lives else None
        if waiting or cut or total >= budget or stalled is not None or preempted != state.num_preempted:
            limit = limited_by(
                self.core,
                self.lookups,
                running=running,
                scheduled=len(tokens),
                total=total,
                budget=budget,
                waiting=waiting,
                cut=cut,
                preempted=state.num_preempted - preempted,
                stalled=stalled,
            )
        in_use, cached = pool.total - free, state.cached
        held = -1
        if self._tokens_known:
            # a block that several requests hold counts once: it is always a full one
            held = -state.shared * self._block_size
            for request in self._sched.running:
                held += request.num_computed_tokens
        step = self.state.step
        columns = (total, prefill, recomputed, decode, spec, budget, len(tokens), prefill_reqs, new, resumed)
        states = (running, waiting, skipped, limit, pool.total, in_use, cached, free - cached, held)
        state.step = step + 1
        state.push(Scheduled(output, step, start, end, columns, states, begun, clock() - end, state.take()))

    def _changed(self, output: Any, tokens: dict[str, int], start: int) -> tuple[int, int]:
        """Requests came or were preempted: how many are new, how many resumed."""
        new = resumed = 0
        if self.pool.just_evicted:
            self.pool.blame(new_holders(self.core.reads["new_blocks"](output), self._lives))
        for data in output.scheduled_new_reqs:
            life = self._lives.get(data.req_id) or self._know(self._sched.requests[data.req_id], -1)
            if data.req_id not in self._preemptions.lives:
                new += life.first_scheduled_step < 0
                self._admit(data.req_id, life, tokens.get(data.req_id, 0), start)
        for request_id, life in self._preemptions.over(tokens, start):
            resumed += 1
            self._admit(request_id, life, tokens[request_id], start, again=1)
        return new, resumed

    def _admit(self, request_id: str, life: Life, tokens: int, now: int, again: int = 0) -> None:
        """A request is scheduled for the first time, or again after a preemption."""
        self._prefills.lives[request_id] = life
        if life.first_scheduled_step < 0:
            life.first_scheduled_step, life.t_first_scheduled = self.state.step, now
            life.cached = self._reads["computed"](life.request) - tokens
        if life.tries:
            self.lookups.admitted(life)
            self.writer.lookup(self.state.step, life, again)
            life.tries = 0

    # ---- update_from_output ----------------------------------------------------------------------------------------

    def _on_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update_from_output(*args: Any, **kwargs: Any) -> Any:
            if not self.state.on:
                return original(*args, **kwargs)
            start = clock()
            made = self.state.stats_made
            self.state.inside = True
            try:
                result = original(*args, **kwargs)
            finally:
                self.state.inside = False
            end = clock()
            try:
                output = args[0] if args else kwargs["scheduler_output"]
                self._updated(output, start, end, made if self.state.stats_made > made else -1)
            except USERS:
                raise
            except BaseException as error:
                self._failed(error)
            return result

        return update_from_output

    def _updated(self, output: Any, start: int, end: int, stats: int) -> None:
        state, pending = self.state, self.state.pending
        # one that is not there was scheduled before kvhook came
        if any(step.output is output for step in pending):
            while pending[0].output is not output:
                # vLLM drops the result of a schedule that came out empty
                early = pending.popleft()
                self._write(early, -1, early.t_scheduled, -1)
            self._write(pending.popleft(), start, end, stats)
        if self._finished:
            self._write_finished()
        if self.ledger is not None:
            self.ledger.flush()
        if not state.step & _LOOK_UP:
            self._look_up()
        state.own_ns += clock() - end

    def _look_up(self) -> None:
        if self.is_over():
            self.stop()

    def _write(self, step: Scheduled, start: int, end: int, stats: int) -> None:
        for life in step.begun:
            life.t_first_token = end
        state = self.state
        # with its update; one that had none is written when the update of another has been made
        counts = map(operator.add, step.counts, state.take()) if start >= 0 else step.counts
        preempted, finished, allocated, freed, reused, revived, evicted, lookups, looked_up, found, resets = counts
        running, waiting, skipped, limit, total, peak, cached, empty, held = step.states
        state.updated = step.step
        self.writer.step(
            (
                step.step,
                stats,
                step.t_schedule,
                step.t_scheduled,
                start,
                end,
                *step.batch,
                preempted,
                finished,
                running,
                waiting,
                skipped,
                limit,
                total,
                allocated,
                freed,
                reused,
                revived,
                evicted,
                peak,
                cached,
                empty,
                self.pool.total - self.pool.free,
                held,
                lookups,
                looked_up,
                found,
                1 if resets else 0,
                state.own_ns,
            )
        )
        state.own_ns = step.own_ns

    def _write_finished(self) -> None:
        state = self.state
        for life, now, reason, inside in self._finished:
            # a request ends inside the update at whose end its last token, perhaps its first, counts as there
            step = state.updated if inside and state.updated >= 0 else state.step - 1
            self.writer.request(life, step, max(now, life.t_first_token), reason)
        self._finished.clear()

    # ---- requests --------------------------------------------------------------------------------------------------

    def _on_make_stats(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def make_stats(*args: Any, **kwargs: Any) -> Any:
            stats = original(*args, **kwargs)
            if stats is not None:
                self.state.stats_made += 1
            return stats

        return make_stats

    def _on_add_request(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(request, *args, **kwargs)
            with contained(self._failed):
                if request.request_id not in self._lives:
                    self._know(request, clock())
            return result

        return add_request

    def _on_free_request(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _free_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            with contained(self._failed):
                self._ended(request)
            try:
                return original(request, *args, **kwargs)
            finally:
                self._forget(request)

        return _free_request

    def _forget(self, request: Any) -> None:
        with contained(self._failed):
            self._lives.pop(request.request_id, None)

    def _ended(self, request: Any) -> None:
        life = self._lives.get(request.request_id)
        if life is None or not self.state.on:
            return
        now = clock()
        self._prefills.lives.pop(request.request_id, None)
        self._preemptions.over((request.request_id,), now)
        self.state.num_finished += 1
        reason = request.get_finished_reason()
        self._finished.append((life, now, -1 if reason is None else int(reason), self.state.inside))
        if not self.state.inside:
            self._write_finished()
