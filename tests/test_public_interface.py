"""What CONTRIBUTING.md calls the public interface goes on working: nothing of `data/public_interface.json` is gone or
has changed so that a program, a script or a trace of yesterday would notice.

What is new is no fault. ``REWRITE_INTERFACE=1 python -m pytest tests/test_public_interface.py`` writes the list again,
for a release, or where something was taken away on purpose after it had been deprecated.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import kvhook
from kvhook import pytest_plugin
from kvhook.analysis.distribution import Distribution
from kvhook.analysis.summary import Summary
from kvhook.cli import VERBS, make_parser
from kvhook.core_schema import BLOCKS_KINDS, CORE_KINDS
from kvhook.recording.subscription import Subscription
from kvhook.records.core import CoreRecords
from kvhook.records.events import Scope
from kvhook.schema import FACT_FIELDS, KINDS, RUN_FIELDS

LIST = Path(__file__).parent / "data/public_interface.json"
API = Path(__file__).parents[1] / "docs/reference/api.md"
#: Classes whose objects people are given, beside those in ``kvhook.__all__``.
GIVEN = (CoreRecords, Distribution, Scope, Subscription, Summary)
Interface = dict[str, Any]


def parameters(function: Any) -> dict[str, list[str]]:
    """Name -> kind and default of each parameter."""
    return {
        p.name: [p.kind.name, "" if p.default is p.empty else repr(p.default)]
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    }


def documented(kind: type) -> set[str]:
    """The members of a class that the reference page lists."""
    text = API.read_text(encoding="utf-8")
    found = re.search(rf"autoclass:: \S*\b{kind.__name__}\b.*\n((?:   .*\n)*)", text)
    listed = re.search(r":members:((?:.*\n)(?:      .*\n)*)", found[1]) if found else None
    return set(re.findall(r"\w+", listed[1])) if listed else set()


def members(kind: type) -> Interface:
    """Public methods with their parameters, and the names of what else an object has. Where the reference page lists
    them, what it lists: other members are there for kvhook's own use."""
    found: Interface = {}
    promised = documented(kind) or dir(kind)
    for name in sorted(promised):
        value = inspect.getattr_static(kind, name, None)
        if name.startswith("_") or any(vars(base).get(name) is value for base in (object, BaseException, Exception)):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        found[name] = parameters(value) if inspect.isfunction(value) else "attribute"
    if dataclasses.is_dataclass(kind):
        found |= {field.name: "attribute" for field in dataclasses.fields(kind)}
    return found


def options() -> Interface:
    """Verb -> the options and arguments that its help names."""
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        verb: sorted(name for action in parser._actions for name in (action.option_strings or [action.dest]))
        for verb, parser in commands.choices.items()
    }


class Noted:
    """In the place of pytest's parser: which options the plug-in adds."""

    def __init__(self) -> None:
        self.options: list[str] = []

    def getgroup(self, *_: Any) -> Noted:
        return self

    def addoption(self, *names: str, **_: Any) -> None:
        self.options += names

    def addini(self, name: str, *_: Any, **__: Any) -> None:
        self.options.append(name)


def interface() -> Interface:
    """The public interface as it is."""
    functions = {n: getattr(kvhook, n) for n in kvhook.__all__ if inspect.isfunction(getattr(kvhook, n))}
    classes = [getattr(kvhook, n) for n in kvhook.__all__ if inspect.isclass(getattr(kvhook, n))]
    noted: Any = Noted()
    pytest_plugin.pytest_addoption(noted)
    kinds = {**KINDS, **CORE_KINDS, **BLOCKS_KINDS}
    return {
        "names": dict.fromkeys(kvhook.__all__, "attribute"),
        "functions": {name: parameters(function) for name, function in functions.items()},
        "classes": {kind.__name__: members(kind) for kind in [*classes, *GIVEN]},
        "columns": {kind: {f.name: [f.type, f.unit] for f in fields} for kind, (_, fields) in kinds.items()},
        "facts": {f.name: [f.type, f.unit] for f in (*FACT_FIELDS, *RUN_FIELDS)},
        "verbs": {verb: dict.fromkeys(names, "option") for verb, names in options().items()},
        "pytest": dict.fromkeys(noted.options, "option"),
    }


def broken(before: Any, now: Any, where: str = "") -> list[str]:
    """What of an interface is gone or changed. A parameter that is new has to have a default."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"{where}: {before} has become {now}"]
    found = [f"{where}.{name} is gone" for name in before.keys() - now.keys()]
    for name in before.keys() & now.keys():
        found += broken(before[name], now[name], f"{where}.{name}")
    for name in now.keys() - before.keys():
        if isinstance(now[name], list) and now[name][0] in inspect._ParameterKind.__members__:
            needed = not now[name][1] and not now[name][0].startswith("VAR_")
            found += [f"{where}: the new parameter {name} has no default"] * needed
    return sorted(found)


def test_nothing_that_was_promised_is_gone():
    now = json.loads(json.dumps(interface()))
    if os.environ.get("REWRITE_INTERFACE"):
        LIST.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert broken(json.loads(LIST.read_text(encoding="utf-8")), now) == []


def test_the_comparison_finds_what_would_break_a_program():
    now = json.loads(json.dumps(interface()))
    gone = json.loads(json.dumps(now))
    del gone["names"]["install"], gone["columns"]["step"]["kv_cache_usage"], gone["verbs"]["summary"]["--json"]
    gone["functions"]["install"]["trace"][1] = "'run.kvh'"
    gone["functions"]["install"]["more"] = ["POSITIONAL_OR_KEYWORD", ""]
    gone["columns"]["step"]["ttft_sum"] = ["f8", "ms"]
    assert broken(now, gone) == [
        ".columns.step.kv_cache_usage is gone",
        ".columns.step.ttft_sum: ['f8', 's'] has become ['f8', 'ms']",
        ".functions.install.trace: ['KEYWORD_ONLY', 'None'] has become ['KEYWORD_ONLY', \"'run.kvh'\"]",
        ".functions.install: the new parameter more has no default",
        ".names.install is gone",
        ".verbs.summary.--json is gone",
    ]


def test_what_is_new_breaks_nothing():
    now = json.loads(json.dumps(interface()))
    more = json.loads(json.dumps(now))
    more["names"]["new"] = "attribute"
    more["functions"]["install"]["new"] = ["KEYWORD_ONLY", "None"]
    more["columns"]["step"]["new"] = ["i8", ""]
    assert broken(now, more) == []


def test_every_verb_is_in_the_list_of_verbs():
    assert set(options()) == {verb for verbs in VERBS.values() for verb in verbs}
