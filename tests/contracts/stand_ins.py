"""Modules in the place of vLLM's, made from the facts of a release: what they hold, and what its fields start with."""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.contracts.extracting.wanted import ENVS
from tests.contracts.release_facts import ClassFacts, FieldFacts, MethodFacts, ModuleFacts, ReleaseFacts, make_function

Factory = Callable[[], Any]


_CONTAINERS: Mapping[str, Factory] = {
    "list": list,
    "dict": dict,
    "set": set,
    "tuple": tuple,
    "deque": collections.deque,
    "defaultdict": lambda: collections.defaultdict(int),
    "Counter": collections.Counter,
}
_ZEROS: Mapping[str, Factory] = {"int": int, "float": float, "bool": bool, "str": str, **_CONTAINERS}


def _nothing() -> None:
    return None


def _property(zero: Factory) -> property:
    return property(lambda _self: zero())


class StubBuilder:
    def __init__(self, facts: ReleaseFacts, use_v1: bool) -> None:
        self._facts = facts
        self._use_v1 = use_v1
        self._classes: dict[tuple[str, str], type] = {}
        self._attributes: dict[type, dict[str, Factory]] = {}
        self.modules: dict[str, types.ModuleType] = {}
        for name in [*facts.modules, ENVS]:
            self._add_module(name)
        self.modules["vllm"].__dict__["__version__"] = facts.release
        self._fill_envs()
        for module in facts.modules.values():
            for name in module.classes:
                setattr(self.modules[module.name], name, self._class(module.name, name))
            for name, function in module.functions.items():
                setattr(self.modules[module.name], name, make_function(function, name))
        for module in facts.modules.values():
            self._bind_imports(module)

    def _add_module(self, name: str) -> None:
        if name in self.modules:
            return
        module = types.ModuleType(name, f"Stand-in for {name} of vLLM {self._facts.release}.")
        module.__path__ = []
        self.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            self._add_module(parent)
            setattr(self.modules[parent], child, module)

    def _fill_envs(self) -> None:
        envs = self.modules[ENVS]
        for variable in self._facts.env_variables:
            setattr(envs, variable, None)
        if self._facts.enable_envs_cache:
            function = MethodFacts("enable_envs_cache", "()")
            envs.__dict__[function.name] = make_function(function, function.name)

    def _bind_imports(self, module: ModuleFacts) -> None:
        stub = self.modules[module.name]
        for name, origin in {**module.imports, **module.aliases}.items():
            source, _, attribute = origin.partition(":")
            cls = self._facts.find(source, attribute)
            if name in module.classes and not (self._use_v1 and name in module.aliases):
                continue
            if cls is not None:
                setattr(stub, name, self._class(cls.module, cls.name))
            elif origin.replace(":", ".") in self.modules:
                setattr(stub, name, self.modules[origin.replace(":", ".")])
            elif hasattr(self.modules.get(source), attribute):
                setattr(stub, name, getattr(self.modules[source], attribute))

    # Classes

    def _class(self, module: str, name: str) -> type:
        key = module, name
        if key not in self._classes:
            self._classes[key] = self._make_class(self._facts.modules[module].classes[name])
        return self._classes[key]

    def _make_class(self, facts: ClassFacts) -> type:
        if facts.kind == "enum":
            kind: Any = getattr(enum, facts.bases[-1].rpartition(".")[2], enum.Enum)
            in_order = sorted(facts.members.items(), key=lambda member: member[1])
            members: type = kind(facts.name, in_order, module=facts.module)
            return members
        bases = tuple(self._bases(facts))
        namespace: dict[str, Any] = {"__module__": facts.module, "__qualname__": facts.name}
        for name, annotation in facts.properties.items():
            namespace[name] = _property(self._zero(annotation, facts.module))
        for method in facts.methods.values():
            namespace[method.name] = self._method(facts, method)
        if facts.kind == "dataclass":
            return self._make_dataclass(facts, bases, namespace)
        if facts.kind == "struct":
            self._add_struct_init(facts, namespace)
        made = type(facts.name, bases, namespace)
        self._attributes[made] = {one.name: self._factory(one, facts.module) for one in facts.attributes}
        return made

    def _bases(self, facts: ClassFacts) -> Iterator[type]:
        for base in facts.bases:
            known_base = self._facts.find(facts.module, base.rpartition(".")[2])
            if known_base is not None:
                yield self._class(known_base.module, known_base.name)

    def _method(self, cls: ClassFacts, facts: MethodFacts) -> Any:
        qualname = f"{cls.name}.{facts.name}"
        body = "_set_attributes(self)" if facts.name == "__init__" else "return None"
        function = make_function(facts, qualname, body, _set_attributes=self._set_attributes)
        function.__module__ = cls.module
        if facts.is_classmethod:
            return classmethod(function)
        return staticmethod(function) if facts.is_staticmethod else function

    def _set_attributes(self, instance: object) -> None:
        for cls in reversed(type(instance).__mro__):
            for name, factory in self._attributes.get(cls, {}).items():
                setattr(instance, name, factory())

    def _make_dataclass(self, facts: ClassFacts, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        fields: list[tuple[str, Any, Any]] = []
        for field in facts.fields:
            factory = self._factory(field, facts.module)
            if (field.annotation or "").startswith("ClassVar"):
                namespace[field.name] = factory()
            else:
                fields.append((field.name, field.annotation, dataclasses.field(default_factory=factory)))
        options = {name: text == "True" for name, text in facts.options.items() if text in ("True", "False")}
        # Set afterwards: `dataclasses` looks into a module that is not in sys.modules.
        del namespace["__module__"]
        made = dataclasses.make_dataclass(facts.name, fields, bases=bases, namespace=namespace, **options)
        made.__module__ = facts.module
        return made

    def _add_struct_init(self, facts: ClassFacts, namespace: dict[str, Any]) -> None:
        factories = {field.name: self._factory(field, facts.module) for field in facts.fields}

        def __init__(self: object, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(factories, args, strict=False)), **kwargs}
            if len(args) > len(factories) or given.keys() - factories.keys():
                raise TypeError(f"{facts.name} has the fields {', '.join(factories)}")
            for name, factory in factories.items():
                setattr(self, name, given[name] if name in given else factory())

        namespace["__init__"] = __init__
        namespace["__struct_fields__"] = tuple(factories)

    # Values

    def _factory(self, field: FieldFacts, module: str) -> Factory:
        """What makes the value that a field starts with."""
        text = field.default
        if text is None or text == "...":
            return self._zero(field.annotation, module)
        try:
            value = ast.literal_eval(text)
        except ValueError:
            name = text.removesuffix("()")
            return self._zero("float" if name.startswith("time.") else name, module)
        return lambda: copy.copy(value)

    def _zero(self, annotation: str | None, module: str) -> Factory:
        """What makes the zero of a type: 0, "", an empty list, a new nested object; else None."""
        if not annotation or "None" in annotation.split(" | "):
            return _nothing
        name = annotation.partition("[")[0].rpartition(".")[2]
        if name == "ClassVar":
            return self._zero(annotation[len("ClassVar[") : -1], module)
        if name in _ZEROS:
            return _ZEROS[name]
        cls = self._facts.find(module, name) or self._value_class(name)
        if cls is None:
            return _nothing
        if cls.kind == "enum":
            return lambda: next(iter(self._class(cls.module, cls.name)), None)  # type: ignore[call-overload]
        return lambda: self._class(cls.module, cls.name)()

    def _value_class(self, name: str) -> ClassFacts | None:
        """A class that holds values, by name alone: some modules import it for type checkers only."""
        for module in self._facts.modules.values():
            cls = module.classes.get(name)
            if cls is not None and cls.kind in ("dataclass", "enum", "struct"):
                return cls
        return None
