"""Runs that step down because nothing can keep to their budget, and what is then recorded of them."""

from __future__ import annotations

from typing import Any

import kvhook
from tests.contracts.core import Said, Sent
from tests.contracts.core_engines import SYNC
from tests.contracts.light.script import begin, go

#: Every eighth step is measured, from the first one on: with windows of one sample these steps are the last of a level.
CHANGES = {1: ("light", 1), 9: ("sparse", 4), 17: ("sparse", 16), 25: ("sparse", 64)}
STEPS = 40
#: Steps whose outputs are counted, worked out by hand: 9 and 13 of every fourth, 17 of every 16th, 25 of every 64th.
COUNTED_STEPS = {*range(9), 9, 13, 17, 25}


def script(steps: int) -> tuple[Sent, ...]:
    """Two requests; the first step brings their prompts, step i brings i + 2 tokens."""
    return tuple(Sent((Said("a", tokens=1 + i), Said("b")), running=2 + i) for i in range(steps))


def over_budget(steps: int = STEPS, *, log_stats: bool = False, **install: Any) -> tuple[kvhook.Session, Any]:
    """An engine that took some steps under a budget that nothing can keep to."""
    session = kvhook.install(max_overhead=1e-9, **install)
    engine = begin(SYNC, script=script(steps), log_stats=log_stats)
    go(engine)
    return session, engine
