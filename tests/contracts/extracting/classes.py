"""From syntax tree to facts: a class, and how it uses stat loggers."""

from __future__ import annotations

import ast
import json
import re

from tests.contracts.extracting.stored import Json
from tests.contracts.extracting.syntax import (
    Function,
    annotation_of,
    default_of,
    field_facts,
    last_name,
    self_attribute,
    signature_of,
    statements,
)
from tests.contracts.extracting.wanted import Wanted


def class_facts(node: ast.ClassDef, wanted: Wanted) -> Json:
    kind = _kind(node)
    facts: Json = {"bases": [ast.unparse(base) for base in node.bases], "kind": kind}
    if kind == "enum":
        facts["members"] = _members(node)
        return facts
    methods = _methods(node)
    if kind == "dataclass":
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and last_name(decorator) == "dataclass":
                facts["options"] = {keyword.arg: default_of(keyword.value) for keyword in decorator.keywords}
    if kind in ("dataclass", "struct"):
        facts["fields"] = [
            field_facts(statement.target.id, statement.annotation, statement.value)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]
    facts["attributes"] = _self_attributes(methods.get("__init__"), wanted.attributes)
    facts["properties"], facts["methods"] = {}, {}
    for name, method in methods.items():
        decorators = {last_name(decorator) for decorator in method.decorator_list}
        if not re.fullmatch(wanted.methods, name):
            continue
        if decorators & {"property", "cached_property"}:
            facts["properties"][name] = annotation_of(method.returns) if method.returns else ""
        else:
            facts["methods"][name] = method_facts(method, decorators)
    if wanted.calls and re.fullmatch(wanted.calls, node.name):
        facts["calls"] = _call_facts(node, methods)
    return {key: value for key, value in facts.items() if value or key == "bases"}


def _kind(node: ast.ClassDef) -> str:
    bases = {last_name(base) for base in node.bases}
    if "Struct" in bases:
        return "struct"
    if "dataclass" in map(last_name, node.decorator_list):
        return "dataclass"
    if "Protocol" in bases:
        return "protocol"
    if bases & {"Enum", "IntEnum", "StrEnum"}:
        return "enum"
    return "plain"


def _members(node: ast.ClassDef) -> Json:
    return {
        statement.targets[0].id: statement.value.value
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
    }


def _methods(node: ast.ClassDef) -> dict[str, Function]:
    """Name to definition; of several definitions the last that is neither overload nor setter."""
    return {
        statement.name: statement
        for statement in statements(node.body)
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not {"overload", "setter"} & set(map(last_name, statement.decorator_list))
    }


def method_facts(method: Function, decorators: set[str]) -> Json:
    facts: Json = {"signature": signature_of(method)}
    if isinstance(method, ast.AsyncFunctionDef):
        facts["async"] = True
    for decorator in ("abstractmethod", "classmethod", "staticmethod"):
        if decorator in decorators:
            facts[decorator] = True
    return facts


def _self_attributes(init: Function | None, wanted: str) -> list[Json]:
    """What `__init__` assigns to `self`, in order, the first assignment of each name."""
    found: dict[str, tuple[int, Json]] = {}
    for node in ast.walk(init) if init else ():
        if isinstance(node, ast.Assign):
            targets, annotation = node.targets, None
        elif isinstance(node, ast.AnnAssign):
            targets, annotation = [node.target], node.annotation
        else:
            continue
        for target in targets:
            name = self_attribute(target)
            if name is None or not re.fullmatch(wanted, name):
                continue
            if name not in found or node.lineno < found[name][0]:
                found[name] = node.lineno, field_facts(name, annotation, node.value)
    return [fact for _, fact in sorted(found.values(), key=lambda one: one[0])]


# How a class uses stat loggers

_LOGGER_ATTRIBUTES = ("logger_manager", "stat_logger", "stat_loggers")
_STAT_CALLS = ("record", "log", "_record_stats", "_get_stats", "do_log_stats", "do_log_stats_with_interval")


def _call_facts(node: ast.ClassDef, methods: dict[str, Function]) -> Json:
    init = methods.get("__init__")
    attribute: str | None = None
    made_by: set[str] = set()
    hard_coded: set[str] = set()
    sets_disable_log_stats = refuses = False
    for inner in ast.walk(init) if init else ():
        if isinstance(inner, ast.Call):
            for keyword in inner.keywords:
                value = keyword.value
                if keyword.arg == "log_stats" and isinstance(value, ast.Constant) and value.value is False:
                    hard_coded.add(ast.unparse(inner.func))
        elif isinstance(inner, (ast.Assign, ast.AnnAssign)):
            target = inner.targets[0] if isinstance(inner, ast.Assign) else inner.target
            name = self_attribute(target)
            if name in _LOGGER_ATTRIBUTES:
                attribute = name
                made_by |= _logger_makers(inner.value)
            elif ast.unparse(target) == "kwargs['disable_log_stats']":
                sets_disable_log_stats = True
        elif isinstance(inner, ast.If) and ast.unparse(inner.test) == "stat_loggers is not None":
            refuses |= any(isinstance(one, ast.Raise) for one in inner.body)
    facts: Json = {
        "hard_coded_log_stats_false": sorted(hard_coded),
        "made_by": sorted(made_by),
        "refuses_stat_loggers": refuses,
        "sets_disable_log_stats": sets_disable_log_stats,
        "stat_calls": _stat_calls(node.name, methods),
        "stat_logger_attribute": attribute,
    }
    return {key: value for key, value in facts.items() if value}


def _logger_makers(value: ast.expr | None) -> set[str]:
    calls = (call for call in (ast.walk(value) if value else ()) if isinstance(call, ast.Call))
    return {name for call in calls if "logger" in (name := last_name(call.func)).lower()}


def _stat_calls(class_name: str, methods: dict[str, Function]) -> list[Json]:
    """Where stats are handed on: the method, what it calls, and with which arguments."""
    found: dict[str, Json] = {}
    for name, method in methods.items():
        for call in ast.walk(method):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            receiver = re.sub(r"\[.*\]", "[...]", ast.unparse(call.func.value))
            concerns_stats = "logger" in receiver or receiver in ("self", class_name)
            if call.func.attr in _STAT_CALLS and concerns_stats:
                arguments = [one.id if isinstance(one, ast.Name) else "_" for one in call.args]
                arguments += [f"{keyword.arg or '**'}=" for keyword in call.keywords]
                fact = {
                    "arguments": arguments,
                    "call": f"{receiver}.{call.func.attr}",
                    "in": name,
                }
                found[json.dumps([fact["in"], fact["call"], fact["arguments"]])] = fact
    return [found[key] for key in sorted(found)]
