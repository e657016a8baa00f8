"""The facts of a vLLM release as Python objects: its modules, classes, fields and methods, and how to ask for them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.contracts.extracting.stored import Json


@dataclass(frozen=True)
class FieldFacts:
    """A field of a dataclass, or what `__init__` assigns to `self`."""

    name: str
    annotation: str | None = None
    default: str | None = None
    """A literal, `X()` for something made anew each time, `...` for anything else; None: no default."""


@dataclass(frozen=True)
class MethodFacts:
    """A method or function: arguments with kinds and constant defaults, without annotations."""

    name: str
    text: str
    is_async: bool = False
    is_abstract: bool = False
    is_classmethod: bool = False
    is_staticmethod: bool = False

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(make_function(self, self.name))


def make_function(facts: MethodFacts, qualname: str, body: str = "return None", **names: Any) -> Any:
    """A function with that name and signature. `names` are what `body` may use."""
    namespace: dict[str, Any] = dict(names)
    prefix = "async " if facts.is_async else ""
    exec(f"{prefix}def {facts.name}{facts.text}:\n    {body}", namespace)
    function = namespace[facts.name]
    function.__qualname__ = qualname
    return function


@dataclass(frozen=True)
class CallFacts:
    """How a class uses stat loggers; see README.md."""

    stat_logger_attribute: str | None = None
    made_by: tuple[str, ...] = ()
    hard_coded_log_stats_false: tuple[str, ...] = ()
    refuses_stat_loggers: bool = False
    sets_disable_log_stats: bool = False
    stat_calls: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """(method, what it calls, arguments): `("step", "self.logger_manager.record", ("iteration_stats=",))`."""

    def arguments(self, method: str, call: str) -> tuple[str, ...] | None:
        """With which arguments `method` calls `call`; None if it does not."""
        for where, called, arguments in self.stat_calls:
            if (where, called) == (method, call):
                return arguments
        return None


@dataclass(frozen=True)
class ClassFacts:
    name: str
    module: str
    kind: str
    """dataclass, struct (msgspec), enum, protocol or plain."""
    bases: tuple[str, ...]
    options: Mapping[str, str]
    fields: tuple[FieldFacts, ...]
    attributes: tuple[FieldFacts, ...]
    properties: Mapping[str, str]
    methods: Mapping[str, MethodFacts]
    members: Mapping[str, Any]
    calls: CallFacts


@dataclass(frozen=True)
class ModuleFacts:
    name: str
    imports: Mapping[str, str]
    aliases: Mapping[str, str]
    functions: Mapping[str, MethodFacts]
    classes: Mapping[str, ClassFacts]


@dataclass(frozen=True)
class ReleaseFacts:
    release: str
    source: str
    modules: Mapping[str, ModuleFacts]
    absent: tuple[str, ...]
    """Modules that were looked for and are not in this release."""
    env_variables: tuple[str, ...]
    enable_envs_cache: bool
    raw: Json = dataclasses.field(repr=False, compare=False)
    """What stands in the file; leave it alone, `mutated` works on a copy."""

    def find(self, module: str, name: str) -> ClassFacts | None:
        """The class that `module.name` is, also when it is imported or an alias there."""
        facts = self.modules.get(module)
        if facts is None:
            return None
        if name in facts.classes:
            return facts.classes[name]
        origin = facts.aliases.get(name) or facts.imports.get(name)
        if origin is None or ":" not in origin:
            return None
        source, _, attribute = origin.partition(":")
        return self.find(source, attribute)

    def lineage(self, module: str, name: str) -> list[ClassFacts]:
        """The class and those of its bases that are known, nearest first."""
        cls = self.find(module, name)
        if cls is None:
            return []
        found = [cls]
        for base in cls.bases:
            found += self.lineage(cls.module, base.rpartition(".")[2])
        return found

    def readable(self, module: str, name: str) -> frozenset[str]:
        """What an instance has to read: fields, attributes and properties, inherited ones too."""
        return frozenset(
            readable
            for cls in self.lineage(module, name)
            for readable in (*(field.name for field in (*cls.fields, *cls.attributes)), *cls.properties)
        )

    def method(self, module: str, name: str, method: str) -> MethodFacts | None:
        """A method of a class, inherited ones too."""
        lineage = self.lineage(module, name)
        return next((cls.methods[method] for cls in lineage if method in cls.methods), None)


def from_raw(raw: Json) -> ReleaseFacts:
    present = {name: content for name, content in raw["modules"].items() if content is not None}
    modules = {name: _module(name, content) for name, content in present.items()}
    return ReleaseFacts(
        release=raw["release"],
        source=raw["source"],
        modules=modules,
        absent=tuple(sorted(raw["modules"].keys() - modules.keys())),
        env_variables=tuple(raw["envs"]["variables"]),
        enable_envs_cache=raw["envs"]["enable_envs_cache"],
        raw=raw,
    )


def _module(name: str, raw: Json) -> ModuleFacts:
    classes = raw.get("classes", {})
    return ModuleFacts(
        name=name,
        imports=raw.get("imports", {}),
        aliases=raw.get("aliases", {}),
        functions={function: _method(function, fact) for function, fact in raw.get("functions", {}).items()},
        classes={class_name: _class(name, class_name, fact) for class_name, fact in classes.items()},
    )


def _class(module: str, name: str, raw: Json) -> ClassFacts:
    return ClassFacts(
        name=name,
        module=module,
        kind=raw["kind"],
        bases=tuple(raw["bases"]),
        options=raw.get("options", {}),
        fields=tuple(FieldFacts(**field) for field in raw.get("fields", ())),
        attributes=tuple(FieldFacts(**field) for field in raw.get("attributes", ())),
        properties=raw.get("properties", {}),
        methods={method: _method(method, fact) for method, fact in raw.get("methods", {}).items()},
        members=raw.get("members", {}),
        calls=_calls(raw.get("calls", {})),
    )


def _method(name: str, raw: Json) -> MethodFacts:
    return MethodFacts(
        name=name,
        text=raw["signature"],
        is_async=raw.get("async", False),
        is_abstract=raw.get("abstractmethod", False),
        is_classmethod=raw.get("classmethod", False),
        is_staticmethod=raw.get("staticmethod", False),
    )


def _calls(raw: Json) -> CallFacts:
    stat_calls = raw.get("stat_calls", ())
    return CallFacts(
        stat_logger_attribute=raw.get("stat_logger_attribute"),
        made_by=tuple(raw.get("made_by", ())),
        hard_coded_log_stats_false=tuple(raw.get("hard_coded_log_stats_false", ())),
        refuses_stat_loggers=raw.get("refuses_stat_loggers", False),
        sets_disable_log_stats=raw.get("sets_disable_log_stats", False),
        stat_calls=tuple((call["in"], call["call"], tuple(call["arguments"])) for call in stat_calls),
    )
