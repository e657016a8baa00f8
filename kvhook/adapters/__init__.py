"""The only place, with `kvhook.hooks`, that knows vLLM's names: one module per era of its stats, each a table.

`table` says what a table is, `compiler` turns it into the code that runs in every step, `config` reads what vLLM's
configuration tells of an engine.
"""

from __future__ import annotations

from kvhook.adapters.light import ASYNC_LIGHT, ASYNC_LIGHT_0_8, ASYNC_LIGHT_0_9, V1_LIGHT, V1_LIGHT_0_8
from kvhook.adapters.table import Adapter
from kvhook.adapters.v0 import V0
from kvhook.adapters.v1 import ASYNC_LISTS, ASYNC_LISTS_0_8, ASYNC_LLM, V1, V1_NO_LOGGER, V1_ONE_LOGGER

#: Of those for one engine class the first whose required targets are all there is used: the newest first.
ADAPTERS: tuple[Adapter, ...] = (V1, V1_ONE_LOGGER, V1_NO_LOGGER, ASYNC_LLM, ASYNC_LISTS, ASYNC_LISTS_0_8, V0)

#: The same at level light. V0 makes all its stats in one piece: there is nothing to leave out.
LIGHT_ADAPTERS: tuple[Adapter, ...] = (
    V1_LIGHT,
    V1_LIGHT_0_8,
    ASYNC_LIGHT,
    ASYNC_LIGHT_0_9,
    ASYNC_LIGHT_0_8,
    V0,
)

#: Level -> the adapters that can be had at it.
BY_LEVEL = {"full": ADAPTERS, "light": LIGHT_ADAPTERS}

#: The newest vLLM whose contract is in tests/contracts/facts.
NEWEST = "0.33.0"
