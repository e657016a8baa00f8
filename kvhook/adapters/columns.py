"""Which columns this vLLM and this engine can fill, and from what.

`ColumnPlan` goes through an adapter's tables once, when an engine has been built: for each column it takes the first
expression that the loaded vLLM has, or writes down why there is none. `kvhook.adapters.publisher` turns the plan into
the code that runs in every step.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from kvhook.adapters.ids import id_number
from kvhook.adapters.table import Adapter, Read, attributes, has_field, lookup, names
from kvhook.schema import REQUEST_FIELDS, STEP_FIELDS, VALUE_SERIES, Field, blank, stored

#: Columns that the publisher knows by itself, whatever the vLLM.
OWN_COLUMNS = (
    "step",
    "engine_index",
    "t_start_ns",
    "t_end_ns",
    "has_scheduler_stats",
    "scheduler_stats_logged",
    "has_iteration_stats",
    "level",
    "kvhook_ns",
    "vllm_stats_ns",
)
#: The argument of vLLM's ``record`` that is no stats object.
ENGINE_INDEX = "engine_idx"
#: The fact that vLLM makes iteration stats only because kvhook turned them on, in a place where that can be timed.
STATS_FOR_KVHOOK = "stats_for_kvhook"
NO_STATS_FOR_KVHOOK = "vLLM makes no stats here that it would not make without kvhook, or not where it can be timed"
#: The fact that the scheduler's stats are taken from the engine core's outputs, and not from vLLM's loggers.
FROM_CORE = "stats_from_core"
#: The fact that requests are seen when they are added and when they are aborted.
SEES_REQUESTS = "sees_requests"
#: The fact that the scheduler is in this process, where its free blocks can be read when a step has been scheduled.
SEES_SCHEDULE = "sees_schedule"
NO_SCHEDULE = (
    "the scheduler is in another process, or its free blocks cannot be read: the front end does not see a peak inside "
    "a step. Where the engine core was recorded, steps() and core_steps() have it"
)
NO_REQUESTS = "this vLLM's front end has no place where a request can be seen when it is added or aborted"
NOT_LOOKED_AT = "level='light' does not look at what vLLM's loggers are given; kvhook.install(level='full') does"
#: The fact that the hook on finished requests is in place.
FINISHED_HOOK = "finished_hook"
#: Columns of a series of values begin with this.
PREFIXES = dict(zip(VALUE_SERIES, ("ttft", "itl"), strict=True))


def number(value: Any) -> int:
    """A limit as an integer; -1 where it is none."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 19 else -1


def fit(values: Any, size: int, missing: float) -> Any:
    """The values, if there are as many as there should be; else blanks, because it is not known whose each one is."""
    return values if len(values) == size else [missing] * size


#: What expressions may call, besides Python's own and `Adapter.helpers`.
HELPERS: Mapping[str, Any] = {"nan": float("nan"), "number": number, "id_number": id_number, "fit": fit}


class ColumnPlan:
    """Which columns this vLLM and this engine can fill, and from what: column -> expression."""

    def __init__(self, adapter: Adapter, facts: Mapping[str, Any]) -> None:
        self.adapter, self.facts = adapter, facts
        self.names: dict[str, Any] = {**HELPERS, **adapter.helpers}
        self.arguments = _arguments(adapter.record)
        self.classes: dict[str, type] = {}
        for source in adapter.sources:
            if source.argument and source.argument not in self.arguments:
                continue
            try:
                self.classes[source.name] = lookup(source.path)
            except LookupError:
                if not source.optional and not source.expression:
                    raise
        self.sources = {s.name: s for s in adapter.sources if s.name in self.classes}
        # column -> why it is missing: from this vLLM, then it is not stored, or only from this engine, then it is
        # stored blank. All engines of a process have one slot layout, so that one trace can hold them.
        self.absent: dict[str, dict[str, str]] = {"step": {}, "request": {}}
        self.lists = {r.column: e for r in adapter.values if (e := self._choose(r))}
        self.finished = self._choose(adapter.finished)
        self.steps = self._own_columns() | self._live("step", STEP_FIELDS, adapter.steps)
        self._count_blocks()
        self.requests: dict[str, str] = {}
        self.absent["request"] |= {r.column: r.absent for r in adapter.requests if not r.expressions and r.absent}
        if self.finished:
            self.requests = {"request": "request_number", "step": "step", "t_end_ns": "t_end_ns"}
            self.requests |= self._live("request", REQUEST_FIELDS, adapter.requests)
        for kind, fields, live in (("step", STEP_FIELDS, self.steps), ("request", REQUEST_FIELDS, self.requests)):
            for name in (f.name for f in fields if f.name not in live):
                self.absent[kind].setdefault(name, self._why_unseen(name))

    def _why_unseen(self, column: str) -> str:
        return self.adapter.unseen or f"vLLM's {self.adapter.name} engine has no such number"

    def _choose(self, read: Read) -> str:
        """The first expression that resolves, or ""."""
        return next((e for e in read.expressions if self._resolves(e)), "")

    def _live(self, kind: str, fields: Iterable[Field], table: Iterable[Read]) -> dict[str, str]:
        blanks = {f.name: blank(f) for f in fields}
        live = {}
        for read in table:
            expression = self._choose(read)
            if not expression:
                self.absent[kind][read.column] = read.absent or f"this vLLM has no {' or '.join(read.expressions)}"
                continue
            reason = self._unmet(read, expression)
            if reason:
                self.absent[kind][read.column] = reason
                expression = blanks[read.column]
            live[read.column] = expression
        return live

    def _unmet(self, read: Read, expression: str) -> str:
        """Why this engine cannot fill a column that this vLLM has; "" if it can."""
        needs = read.needs if expression == read.expressions[0] else read.fallback_needs or read.needs
        if needs and not self.facts.get(needs):
            return read.unmet or f"needs {needs}=True"
        used = names(expression) - self.sources.keys() - self.names.keys() - vars(builtins).keys()
        unknown = [n for n in sorted(used) if self.facts.get(n) is None]
        self.names |= {n: self.facts[n] for n in used.difference(unknown)}
        return f"this vLLM does not say its {', '.join(unknown)}" if unknown else ""

    def _count_blocks(self) -> None:
        """The columns that need the number of KV blocks, which is a fact about the engine."""
        blocks = int(self.facts.get("num_kv_blocks") or 0)
        usage = self.steps.get("kv_cache_usage", "")
        root = next((name for name, _ in attributes(usage)), "") if usage else ""
        self.steps["num_kv_blocks"] = str(blocks or -1)
        of, reserved = self.facts.get("kv_usage_of", blocks), self.facts.get("kv_usage_reserved", 0)
        self.steps |= {"num_kv_blocks_peak": "-1", "kv_cache_usage_peak": "nan"}
        if blocks and self.facts.get(SEES_SCHEDULE):
            scheduled = "num_free_kv_blocks >= 0"
            self.steps["num_kv_blocks_peak"] = f"{blocks} - num_free_kv_blocks if {scheduled} else -1"
            # over the same blocks as vLLM's own usage, so that both can be compared
            self.steps["kv_cache_usage_peak"] = (
                f"({blocks + reserved} - num_free_kv_blocks) / {of} if {scheduled} else nan"
            )
        else:
            self.absent["step"] |= dict.fromkeys(("num_kv_blocks_peak", "kv_cache_usage_peak"), NO_SCHEDULE)
        self.steps["num_kv_blocks_used"] = "-1"
        if blocks and root:
            used = f"int(kv_cache_usage * {of} + 0.5){f' - {reserved}' if reserved else ''}"
            self.steps["num_kv_blocks_used"] = f"{used} if {root} is not None else -1"
            return
        if not blocks:
            self.absent["step"]["num_kv_blocks"] = "this vLLM does not say how many KV blocks it has"
        self.absent["step"]["num_kv_blocks_used"] = (
            "this vLLM does not say how full its KV cache is" if blocks else self.absent["step"]["num_kv_blocks"]
        )

    def _own_columns(self) -> dict[str, str]:
        own = {name: name for name in OWN_COLUMNS}
        own["level"] = "LEVEL"
        if self.adapter.level != "full":
            own["scheduler_stats_logged"] = "0"
            self.absent["step"]["scheduler_stats_logged"] = NOT_LOOKED_AT
        own |= {"num_added_reqs": "num_added_reqs", "num_aborted_reqs": "num_aborted_reqs"}
        if not self.facts.get(SEES_REQUESTS):
            self.absent["step"] |= dict.fromkeys(("num_added_reqs", "num_aborted_reqs"), NO_REQUESTS)
        if not self.facts.get(STATS_FOR_KVHOOK):
            self.absent["step"]["vllm_stats_ns"] = NO_STATS_FOR_KVHOOK
        for series in self.lists:
            own |= {f.name: f.name for f in STEP_FIELDS if f.name.startswith(f"{PREFIXES[series]}_")}
        if self.finished:
            own["num_finished_reqs"] = "len(finished) + num_aborted_reqs"
        return own

    def _resolves(self, expression: str) -> bool:
        for name, attribute in attributes(expression):
            if name not in self.sources or not has_field(self.classes[name], attribute):
                return False
            parent = self.sources[name].expression
            if parent and not self._resolves(parent):
                return False
        return True


def _arguments(record: str | tuple[str, ...]) -> list[str]:
    """The arguments of vLLM's ``record``, in its order."""
    if isinstance(record, str):
        parameters = list(inspect.signature(lookup(record)).parameters.values())[1:]
        record = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    named = list(record)
    return named if ENGINE_INDEX in named else [*named, ENGINE_INDEX]


assert {f.name for f in stored(STEP_FIELDS)} >= set(OWN_COLUMNS)
