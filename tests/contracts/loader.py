"""The facts of a vLLM release as Python objects, and stand-in modules made from them.

    facts = load("0.16.0")
    facts.readable("vllm.v1.metrics.stats", "SchedulerStats")    # names an adapter can read
    with stubs(build_stub_modules(facts)):
        import vllm.v1.metrics.loggers                           # as in 0.16.0, but doing nothing

The stand-ins have the classes, fields and signatures of the release and no behaviour: methods return
None, properties the zero of their type. To see what kvhook makes of a vLLM that nobody has seen yet,
change the facts first: `mutated(facts, rename_field)`.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.contracts.extract import ENVS, known, load_raw

Json = dict[str, Any]
Factory = Callable[[], Any]


# --------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------


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


def releases() -> list[str]:
    """Every release that has facts, oldest first."""
    return known()


@functools.cache
def load(release: str) -> ReleaseFacts:
    """The facts of one release; FileNotFoundError when there are none."""
    return from_raw(load_raw(release))


def mutated(facts: ReleaseFacts, change: Callable[[Json], object]) -> ReleaseFacts:
    """The facts of a release that never was: `change` edits a copy of what stands in the file."""
    raw = copy.deepcopy(facts.raw)
    change(raw)
    return from_raw(raw)


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


# --------------------------------------------------------------------------------------------------
# Stand-in modules
# --------------------------------------------------------------------------------------------------


def build_stub_modules(facts: ReleaseFacts, *, use_v1: bool = False) -> dict[str, types.ModuleType]:
    """Modules with the classes, fields and signatures of a release, by name, packages above them too.

    A dataclass is made without arguments: what has no default gets the zero of its type. A class with an
    `__init__` of its own takes the arguments of the release and ignores them.
    `use_v1` is for releases that had both engines: there an alias such as `AsyncLLMEngine = AsyncLLM`
    stands under `if VLLM_USE_V1`, and the name is the V0 class otherwise.
    Environment variables in `vllm.envs` are None until a test sets them.
    """
    return _StubBuilder(facts, use_v1).modules


@contextlib.contextmanager
def stubs(modules: Mapping[str, types.ModuleType], *, lazy: bool = False) -> Iterator[None]:
    """Let `import vllm...` find the stand-ins, and only them; afterwards all is as before.

    With `lazy` they are found by import only, so that import hooks see each of them come in.
    """
    before = {name: module for name, module in sys.modules.items() if _is_vllm(name)}
    for name in before:
        del sys.modules[name]
    finder = _StubFinder(modules)
    sys.meta_path.insert(0, finder)
    if not lazy:
        sys.modules.update(modules)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_vllm(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins, and refuses every other module of vLLM."""

    def __init__(self, modules: Mapping[str, types.ModuleType]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self._modules:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if _is_vllm(fullname):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to do: the module came complete."""


def make_function(facts: MethodFacts, qualname: str, body: str = "return None", **names: Any) -> Any:
    """A function with that name and signature. `names` are what `body` may use."""
    namespace: dict[str, Any] = dict(names)
    prefix = "async " if facts.is_async else ""
    exec(f"{prefix}def {facts.name}{facts.text}:\n    {body}", namespace)
    function = namespace[facts.name]
    function.__qualname__ = qualname
    return function


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


class _StubBuilder:
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
