"""Parts of a run as runs of their own, and the summary of a run or of a part."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import numpy as np

from kvhook.analysis.core_report import CoreReport
from kvhook.analysis.labelled import of_label
from kvhook.analysis.peaks import NEEDED, cores_of_engine
from kvhook.analysis.prompt_groups import prompt_groups
from kvhook.analysis.summarize import account_of, add_up, summarize, summary_of
from kvhook.analysis.summary import LeftOut
from kvhook.errors import KvhookError
from kvhook.frames import to_arrow, to_pandas, to_polars
from kvhook.records.columns import Table
from kvhook.records.core import NONE_OF_THEM, CoreRecords
from kvhook.records.events import Scope
from kvhook.records.part import Bools, Interval, PartSlots, StepRanges, outside
from kvhook.records.selection import (
    by_number,
    find_scopes,
    interval_of,
    keys_of,
    labelled,
    labels_of_core_requests,
    steps_in,
    steps_of_requests,
    warmups,
)
from kvhook.records.tables import Records
from kvhook.text.summary import PrintedSummary, printed

P = TypeVar("P", bound="Parts")


class Parts(Records, abc.ABC):
    """The part of `kvhook.Trace` that cuts it into parts, and sums it up."""

    #: gives the engine cores of a run whose session is there, or of the run that this is a part of
    of_session: Callable[[], CoreRecords] | None = None

    #: the run that this is a part of; None for a whole run
    whole: Any = None

    @abc.abstractmethod
    def cores(self) -> CoreRecords:
        """What was recorded inside the engine cores of this run."""

    def cores_of(self, engine: int | None) -> CoreRecords:
        """The engine cores of one engine of this run; those of all with None. Which they are is known of engines in
        files of their own, and where it follows from the records; otherwise ``why_none`` says why it is not."""
        cores = self.cores()
        if engine is None or len(self.engines.facts()) < 2:
            return cores
        whole = self.whole_run()
        joined = cores_of_engine(engine, whole.steps_to_join(), whole.cores(), whole.missing())
        if not len(joined):
            return joined
        wanted = [core for core, origin in enumerate(cores.origins) if origin in joined.origins]
        return cores.only(wanted, NONE_OF_THEM)

    def _account(self, engine: int | None) -> CoreReport | None:
        return account_of(self.cores_of(engine), self if engine is None else None)

    def whole_run(self: P) -> P:
        """The run that this is a part of, or a part of a part."""
        whole = self
        while whole.whole is not None:
            whole = whole.whole
        return whole

    def steps_to_join(self) -> Table:
        """All steps, with the columns by which they are joined to those of engine cores."""
        there = {column.name for column in self.columns("step")}
        return Records.steps(self, columns=[name for name in NEEDED if name == "engine" or name in there])

    def missing(self) -> int:
        """How many records of the run are not there."""
        return sum(int(self.meta[which]) for which in ("records_lost", "records_dropped", "damaged"))

    def summary(
        self,
        engine: int | None = None,
        *,
        scope: str | int | Scope | None = None,
        label: str | None = None,
        warmup: bool = False,
    ) -> PrintedSummary:
        """The run in numbers: ``print`` it for people, ``.as_dict()`` for programs. Warm-up is left out, which the
        summary says.

        >>> summary = kvhook.open("run.kvh").summary()
        >>> print(f"{summary.prefix_cache_hit_rate:.3f}", summary.prefix_cache_hits, summary.num_preempted_reqs)
        0.398 320 2
        >>> print(summary)
        vLLM 0.32.0, tiny-llama: 56 steps in 1.53 s
          step time       p50 9.18 ms, p99 155 ms (99% of it inside steps)
        <BLANKLINE>
          KV cache        peak 90.9 %, p95 90.9 %, mean 62.0 % of 11 blocks of 32 tokens
          prefix cache    hit rate 39.8 % of this run: 320 of 804 tokens
                          re-admitted requests: 64 of 130 tokens hit, 16.7 % of all hits
          prompt tokens   804: 484 computed, 320 cached; 529 per second in steps
          generated       168 tokens, 111 per second in steps
        ...

        Args:
            engine: only this engine of the run.
            scope: only this scope: its name, path or number, or the kind of call, such as ``"generate"``.
            label: only the requests with this label. Numbers of steps are then those of the steps in which one of them
                was in the engine, together with all others (`Summary.part` says so).
            warmup: count what is marked as warm-up as well.

        Raises:
            KvhookError: there is no such scope or label; the message names those that there are.
        """
        if label is not None:
            part = self.select(scope=scope, label=label, engine=engine, warmup=warmup)
            return printed(of_label(summarize(part), part.requests()))
        if scope is None and self._engines is None and (totals := add_up(self, warmup=warmup)) is not None:
            # nothing is to be left out: one pass over the file has found that out, and has added it up
            return printed(summary_of(totals, self, engine, self._account(engine)))
        part, left_out = self.measured(scope, warmup)
        summary = dataclasses.replace(summarize(part, engine, part.cores_of(engine)), left_out=left_out)
        return printed(summary)

    def measured(self: P, scope: str | int | Scope | None, warmup: bool) -> tuple[P, LeftOut | None]:
        """This run, or a scope of it, less what is warm-up, and what that was; for what is wanted by a `summary`."""
        whole = self if scope is None else self.select(scope=scope)
        left = [] if warmup else warmups(self.scopes)
        if scope is not None:
            chosen = find_scopes(self.scopes, scope)
            # who asks for a warm-up, or for a part of one, gets it
            left = [w for w in left if not any(c.warmup for c in chosen)]
        if not left:
            return whole, None
        keys = keys_of(whole)
        mask = steps_in(keys, left)
        if not mask.any():
            return whole, None
        named = LeftOut(int(mask.sum()), tuple(dict.fromkeys(s.path for s in left)))
        within = outside([interval_of(s) for s in left])
        known = [e["engine"] for e in whole.engines.facts()]
        return whole.cut(keys, ~mask, "", within, engines=known), named

    def to_pandas(self, table: str = "steps") -> Any:
        """A table as a ``pandas.DataFrame``: ``"steps"`` or ``"requests"``, or of the engine cores ``"core_steps"``,
        ``"core_requests"``, ``"preemptions"``, ``"lookups"`` or ``"blocks"``. What is not known is missing (NaN or NA).

        Raises:
            KvhookError: pandas is not installed (``pip install "kvhook[pandas]"``), or there is no such table.
        """
        return to_pandas(self, table)

    def to_polars(self, table: str = "steps") -> Any:
        """The same as a ``polars.DataFrame`` (``pip install "kvhook[polars]"``); what is not known is null."""
        return to_polars(self, table)

    def to_arrow(self, table: str = "steps") -> Any:
        """The same as a ``pyarrow.Table`` (``pip install "kvhook[arrow]"``); what is not known is null."""
        return to_arrow(self, table)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def select(
        self: P,
        *,
        scope: str | int | Scope | None = None,
        label: str | None = None,
        engine: int | None = None,
        warmup: bool = True,
    ) -> P:
        """A part of the run, as a trace of its own: some of its steps, the requests that finished in them, and their
        latencies. What is chosen by several arguments must be chosen by all of them.

        Args:
            scope: the steps that ended inside this scope: its name, path or number, or the kind of call, such as
                ``"generate"``.
            label: the requests with this label, and the steps in which one of them was in the engine. What these steps
                counted is of all requests in them.
            engine: only this engine.
            warmup: False to leave out what is marked as warm-up.

        Raises:
            KvhookError: there is no such scope or label; the message names those that there are.
        """
        part = self
        if scope is not None:
            chosen = find_scopes(self.scopes, scope)
            keys = keys_of(part)
            what = chosen[0].path if len(chosen) == 1 else str(scope)
            part = part.cut(keys, steps_in(keys, chosen), f"scope {what!r}", [interval_of(s) for s in chosen])
        if engine is not None:
            keys = keys_of(part)
            one = part.cut(keys, keys["engine"] == engine, f"engine {engine}", None, engines=[engine])
            one.of_session = functools.partial(part.cores_of, engine)
            part = one
        if label is not None:
            numbers, rows = labelled(part, label)
            keys = keys_of(part)
            part = part.cut(keys, steps_of_requests(keys, rows), f"label {label!r}", requests=numbers)
        if not warmup:
            part = part.measured(None, False)[0]
        return part

    def prompt_groups(self, engine: int | None = None) -> Table:
        """One row for each prompt with several samples (``n > 1``): how many have finished, and what they together got
        from the prefix cache. The columns of `kvhook.analysis.prompt_groups.PROMPT_GROUP_FIELDS`."""
        return prompt_groups(self.requests(engine))

    def between(self: P, start: float | datetime, end: float | datetime, *, clock: str = "unix") -> P:
        """The steps that ended between two moments, both included, as a trace of its own.

        >>> trace = kvhook.open("run.kvh")
        >>> first = trace.scopes[0]
        >>> len(trace.between(first.began_unix_ns / 1e9, first.ended_unix_ns / 1e9).steps())
        56

        Args:
            start: seconds since 1970 as `time.time` gives them, or a `datetime`; one without a time zone is local time.
            end: the same.
            clock: ``"monotonic"`` if both are seconds of `time.monotonic` on the machine that recorded.

        Raises:
            KvhookError: a moment is none, or the clock is neither of the two.
        """
        if clock not in ("unix", "monotonic"):
            raise KvhookError(f"clock={clock!r}: there are 'unix' and 'monotonic'")
        begin, over = (_nanoseconds(moment) for moment in (start, end))
        keys = keys_of(self)
        at = keys["t_end_ns"] if clock == "monotonic" else self.unix(keys["engine"], keys["t_end_ns"])
        return self.cut(keys, (at >= begin) & (at <= over), f"from {start} to {end}")

    def __getitem__(self: P, which: slice | int) -> P:
        """The steps with these numbers, of each engine: ``trace[100:200]``, ``trace[-50:]``. A trace of its own.

        Raises:
            KvhookError: it is no slice of step numbers.
        """
        keys = keys_of(self)
        what = f"{which.start or 0}:{'' if which.stop is None else which.stop}" if isinstance(which, slice) else which
        return self.cut(keys, by_number(keys, which), f"steps {what}")

    def core_labels(self, core_requests: Table) -> Table:
        """The labels and LoRA adapters of an engine core's requests: a structured array with the columns ``label`` and
        ``lora_name``, one row for each of the rows of ``cores().requests()``; "" where a request has none."""
        return labels_of_core_requests(core_requests, self.engines.events)

    def cut(
        self: P,
        keys: Table,
        mask: Bools,
        what: str,
        intervals: Sequence[Interval] | None = (),
        requests: dict[int, Any] | None = None,
        engines: Iterable[int] | None = None,
    ) -> P:
        """Some steps of this run.

        Args:
            keys: what `kvhook.records.selection.keys_of` gives of it.
            mask: which of these steps.
            what: what to call the part.
            intervals: when the engine cores made these steps; empty: it follows from the steps; None: the cores are
                those of the whole.
            requests: engine -> the numbers of the requests that count; None: all that finished in these steps.
            engines: the engines of the part; by default those that have steps in it, or all if none has.
        """
        ranges = StepRanges(keys["engine"][mask], keys["step"][mask])
        before = self.meta.get("part", "")
        more = {**self._more, "part": f"{before}, {what}" if before and what else before or what}
        sources = [PartSlots(source, ranges, requests) for source in self.sources]
        known = [e["engine"] for e in self.engines.facts()]
        kept = self.engines.only(engines or ranges.engines or known)
        part = type(self)(sources, self.name, more, engines=kept)
        part.whole = self
        part._clock = self.clock  # noqa: SLF001 (of this very class)
        within = intervals if intervals or intervals is None else _intervals(keys, mask)
        numbers = [e["engine"] for e in kept.facts()]

        def cores() -> CoreRecords:
            mine = self.cores().of_engines(numbers)
            return mine if within is None else mine.part(within)

        part.of_session = cores
        return part


def _intervals(keys: Table, mask: Bools) -> list[Interval]:
    """When some steps were made: each from the end of the step before it to its own end."""
    out: list[Interval] = []
    for engine in np.unique(keys["engine"][mask]).tolist():
        mine = keys["engine"] == engine
        ends, chosen = keys["t_end_ns"][mine], mask[mine]
        before = np.append(-1, ends[:-1])
        out += zip((before[chosen] + 1).tolist(), ends[chosen].tolist(), strict=True)
    return out


def _nanoseconds(moment: Any) -> int:
    if isinstance(moment, datetime):
        return round(moment.timestamp() * 1e6) * 1000
    if isinstance(moment, bool) or not isinstance(moment, (int, float, np.integer, np.floating)):
        raise KvhookError(f"a moment is a number of seconds or a datetime, not {moment!r}")
    return round(moment * 1e9)
