"""What a file says about an engine, in types that can be relied on: files are damaged, edited and forged.

`kvhook.schema.FACT_FIELDS` says of which type each fact is. One of another type is left out, as if it were not known;
nothing in here raises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from kvhook.errors import shown
from kvhook.schema import FACT_FIELDS, RUN_FIELDS

#: Columns that readers count on in each kind of record: no file is read without them, none can call them absent.
NEEDED_COLUMNS: dict[str, frozenset[str]] = {
    "step": frozenset({"step", "t_start_ns", "t_end_ns", "has_scheduler_stats"}),
    "values": frozenset({"step", "series", "count"}),
    "meta": frozenset({"part", "parts", "nbytes"}),
}

_MOST_TEXT = 4096
_MOST_DEPTH = 6
_MOST_NUMBER = 1 << 62
#: Facts that each record of the engine has as a number of 32 bits.
_IN_RECORDS = frozenset({"engine"})
_MOST_IN_RECORDS = (1 << 31) - 1

_TYPES = {field.name: field.type for field in FACT_FIELDS}
_RUN_TYPES = {field.name: field.type for field in RUN_FIELDS}


def clean_facts(raw: Any) -> dict[str, Any]:
    """Facts out of a file: what `raw` holds, less what is not what it should be."""
    if not isinstance(raw, dict):
        return {}
    facts: dict[str, Any] = {}
    for name, value in raw.items():
        kind = _TYPES.get(name, "")
        if name in _IN_RECORDS and type(value) is int and value > _MOST_IN_RECORDS:
            continue
        if kind == "reasons":
            facts[name] = _reasons(value)
        elif (value is None and kind != "count") or _fits(kind, value):
            facts[name] = printable(value) if kind == "text" and value is not None else value
    return facts


def clean_run(raw: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Facts about a run out of a file: those of `kvhook.schema.RUN_FIELDS` with these names that are what they should
    be."""
    facts = {name: raw[name] for name in names if name in raw and _fits(_RUN_TYPES[name], raw[name])}
    return {
        name: printable(value)
        if isinstance(value, str)
        else {key: printable(text) for key, text in value.items()}
        if _RUN_TYPES[name] == "texts"
        else value
        for name, value in facts.items()
    }


def printable(text: str) -> str:
    """Text that cannot move a terminal's cursor."""
    return shown(text[:_MOST_TEXT], kept="")


#: The fact that a recording leaves out what could name somebody: ``kvhook.install(anonymous=True)``.
ANONYMOUS = "anonymous"
#: The facts that are left out then, and those of which the kind of an error alone is kept: what an error says may hold
#: anything. Paths are cut out of all other facts.
_NAMING = frozenset({"model", "program"})
_ERRORS = frozenset({"failed", "faults"})
#: The facts that name a class, in full, which may be the user's; and what else they may be.
_CLASSES = frozenset({"executor", "scheduler_class"})
_EXECUTORS = frozenset({"uni", "mp", "ray", "external_launcher"})
_OWN_CLASS = "(class)"
#: In quotes a path goes on to the closing quote, over quotes that repr() escapes. Elsewhere nobody can tell where it
#: ends, since a name may hold any character: it goes on to the end of the line, but for what kvhook adds itself.
_PATH = re.compile(
    r"(?<=')(?:[/~]|\w+://?)(?:\\.|[^'\\\n])+(?=')"
    r'|(?<=")(?:[/~]|\w+://?)(?:\\.|[^"\\\n])+(?=")'
    r"|(?:(?<![\w.~/)])|(?<=-[A-Z]))(?:\w+://)?(?:/+(?=[^\s/])|~(?=[\w/]))[^\n]*?(?=, level \d+$|$|\n)"
)


def without_names(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of an anonymous recording without what could name somebody; others as they are."""
    if not facts.get(ANONYMOUS):
        return facts
    kept = {name: value for name, value in facts.items() if name not in _NAMING}
    if "ring" in kept:  # readers look for it in the directories of rings
        kept["ring"] = str(kept["ring"]).rpartition("/")[2]
    for name in _CLASSES & kept.keys():
        kept[name] = _without_own_class(kept[name])
    for name in _ERRORS & kept.keys():
        errors = kept[name]
        kept[name] = (
            {where: kind_of_error(each) for where, each in errors.items()}
            if isinstance(errors, dict)
            else kind_of_error(errors)
        )
    return {name: _without_paths(value) for name, value in kept.items()}


def kind_of_error(said: str) -> str:
    """Of an error as `kvhook.faults.described` says it, the name of its type."""
    return str(said).partition(":")[0].partition(" ")[0]


def class_of_vllm(cls: type) -> str:
    """The name of a class, or of the class of vLLM's that a user's class is made of; ``(class)`` if there is none."""
    own = (each for each in cls.__mro__ if each.__module__.partition(".")[0] == "vllm")
    found = next(own, None)
    return _OWN_CLASS if found is None else found.__qualname__


def _without_own_class(value: Any) -> Any:
    own = value is None or value in _EXECUTORS or str(value).removeprefix("<class '").startswith("vllm.")
    return value if own else _OWN_CLASS


def without_paths(text: str) -> str:
    """Text in which each absolute path has become ``(path)``."""
    return _PATH.sub("(path)", text)


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {name: _without_paths(each) for name, each in value.items()}
    return [_without_paths(each) for each in value] if isinstance(value, list) else value


def _fits(kind: str, value: Any) -> bool:
    """Whether a value is of a type of `FactField`; a fact that is not in the table may be anything that JSON holds."""
    if kind == "text":
        return isinstance(value, str)
    if kind in ("i8", "count"):
        return type(value) is int and 0 <= value < _MOST_NUMBER
    if kind == "f8":
        return isinstance(value, (int, float)) and type(value) is not bool and abs(value) < _MOST_NUMBER
    if kind == "flag":
        return type(value) is bool
    if kind == "texts":
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return (kind != "list" or isinstance(value, list)) and _is_moderate_json(value, _MOST_DEPTH)


def _is_moderate_json(value: Any, depth: int) -> bool:
    """Whether a value is JSON of moderate depth with numbers of moderate size."""
    if isinstance(value, dict):
        return depth > 0 and all(_is_moderate_json(v, depth - 1) for v in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_is_moderate_json(v, depth - 1) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < _MOST_NUMBER


def _reasons(value: Any) -> dict[str, dict[str, str]]:
    kinds = value.items() if isinstance(value, dict) else ()
    return {
        kind: {
            name: printable(why)
            for name, why in reasons.items()
            if isinstance(why, str) and name not in NEEDED_COLUMNS.get(kind, ())
        }
        for kind, reasons in kinds
        if isinstance(reasons, dict)
    }


def plain_fact(value: Any) -> Any:
    """A configuration value as JSON can hold it: enums, dtypes and devices differ from release to release."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return str(getattr(value, "value", value))
    except Exception:
        return None
