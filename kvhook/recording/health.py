"""How a recording fares: what failed inside kvhook, what is switched off, what is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvhook.faults import Faults


@dataclasses.dataclass(frozen=True)
class SeamHealth:
    """A place at which kvhook failed while it worked inside an engine or beside it.

    Attributes:
        where: what kvhook was doing.
        errors: how often it failed.
        off: whether it is switched off by now, for the engine at which it failed or for the whole session.
        then: what that means.
        first_error: the first error, as one line.
        last_error: the last one.
    """

    where: str
    errors: int
    off: bool
    then: str
    first_error: str
    last_error: str

    def __str__(self) -> str:
        times = "once" if self.errors == 1 else f"{self.errors:,} times"
        last = "" if self.last_error == self.first_error else f", last {self.last_error}"
        off = ", switched off" if self.off else ""
        return f"{self.where}: failed {times}{off} ({self.first_error}{last}); {self.then}"


@dataclasses.dataclass(frozen=True)
class Health:
    """What `kvhook.Session.health` gives: ``print`` it, or look at ``ok``.

    Attributes:
        engines: engines that were recorded so far.
        records: records that were published so far, of steps, requests and latencies.
        records_lost: records that were overwritten before they could be copied, or could not be written; also those of
            engine cores.
        seams: what failed inside kvhook. No engine was affected by any of it.
        why_no_steps: why nothing is recorded, if nothing is.
    """

    engines: int
    records: int
    records_lost: int
    seams: tuple[SeamHealth, ...]
    why_no_steps: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing failed and nothing is lost."""
        return not self.seams and not self.records_lost

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists, with ``ok``."""
        plain = dataclasses.asdict(self)
        return {"ok": self.ok, **plain, "seams": list(plain["seams"])}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        engines = "1 engine" if self.engines == 1 else f"{self.engines} engines"
        state = "healthy" if self.ok else "NOT healthy"
        lost = f"{self.records_lost:,} LOST" if self.records_lost else "none lost"
        yield f"kvhook is {state}: {engines}, {self.records:,} records, {lost}"
        for each in self.seams:
            yield f"  {each}"
        if self.why_no_steps:
            yield f"  no steps are recorded: {self.why_no_steps}"


def health_of(
    faults: Iterable[Faults],
    cores: Iterable[Mapping[str, Any]],
    counts: Iterable[Mapping[str, int]],
    why_no_steps: str,
    lost_in_cores: int = 0,
) -> Health:
    """Put together how a recording fares.

    Args:
        faults: what was counted, in the front end and in the engine cores of this process.
        cores: the facts about each engine core, also those of other processes.
        counts: per engine, the spool's counts of records.
        why_no_steps: why nothing is recorded; "" if something is.
        lost_in_cores: records of engine cores that are lost.
    """
    seams = [
        SeamHealth(
            where, errors, each.is_off(where), each.then.get(where, ""), each.first_errors.get(where, ""),
            each.last_errors.get(where, ""),
        )
        for each in faults
        for where, errors in each.counts.items()
    ]  # fmt: skip
    known = {seam.last_error for seam in seams}
    for number, facts in enumerate(cores):
        failed = str(facts.get("failed") or "")
        if failed and failed not in known:
            where = f"counting inside the engine core (core {number}, process {facts.get('pid', '?')})"
            seams.append(SeamHealth(where, 1, True, "this engine core is not recorded any further", failed, failed))
    totals = list(counts)
    return Health(
        engines=len(totals),
        records=sum(each["records_published"] for each in totals),
        records_lost=sum(each["records_overrun"] + each["records_unwritten"] for each in totals) + lost_in_cores,
        seams=tuple(seams),
        why_no_steps=why_no_steps,
    )
