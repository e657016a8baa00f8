"""Where vLLM keeps each number: one table per era of its stats and kind of engine.

`v0`, `v1` and `light` hold the tables, and `table` says what a table is. `fit` finds the one that fits the loaded vLLM.
`config` reads facts about an engine from vLLM's configuration. `columns` plans which columns this vLLM and this engine
can fill, and `publisher` turns that plan into the code that runs in every step.
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
