"""The only place, with `kvhook.hooks`, that knows vLLM's names: one module per era of its stats, each a table.

`table` says what a table is, `compiler` turns it into the code that runs in every step.
"""

from __future__ import annotations

from kvhook.adapters.table import Adapter
from kvhook.adapters.v1 import V1

#: In order of preference: the first whose required targets are all there is used.
ADAPTERS: tuple[Adapter, ...] = (V1,)
