"""What an adapter is made of: tables that say where vLLM keeps each number, and the look-up that checks them.

An adapter describes one era of vLLM's stats. It holds no code that runs per step: `kvhook.adapters.compiler` turns
its tables into a publisher, with only those columns that this very vLLM can fill.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A place in vLLM that is patched. ``role`` is what `kvhook.hooks` does there; ``path`` is ``module:name``.

    Without a required target nothing is patched at all; without one that is not required, ``loss`` says what is
    missing then. ``field`` names a class and an attribute of it that the hook lives on.
    """

    role: str
    path: str
    required: bool = True
    loss: str = ""
    field: tuple[str, str] | None = None


class Source(NamedTuple):
    """An object that numbers are read from: a variable of the publisher.

    ``path`` names the class that describes it (``module:Class``); ``expression`` says how to get it from the sources
    before it, empty for those that vLLM hands over. An ``optional`` one may be None: its columns are blank then.
    """

    name: str
    path: str
    expression: str = ""
    optional: bool = False


class Read(NamedTuple):
    """Where a column comes from: expressions over the sources, of which the first that this vLLM has is taken.

    ``needs`` names a fact about the engine that must be true; ``absent`` says why the column is missing if it is.
    """

    column: str
    expressions: tuple[str, ...]
    absent: str = ""
    needs: str = ""


class Adapter(NamedTuple):
    """One era of vLLM's stats, as tables."""

    name: str
    #: patched once this module has been imported
    trigger: str
    targets: tuple[Target, ...]
    sources: tuple[Source, ...]
    steps: tuple[Read, ...]
    #: the lists of single values: schema series name -> where the list is
    values: tuple[Read, ...]
    #: the list of finished requests; its items are the source "request"
    finished: Read
    requests: tuple[Read, ...]
    #: fact about the engine -> path below vLLM's VllmConfig
    facts: Mapping[str, str]


def lookup(path: str) -> Any:
    """The object at ``module:dotted.name`` of a module that has been imported already; never imports one.

    Raises:
        LookupError: there is no such module, or no such name in it.
    """
    module_name, _, name = path.partition(":")
    found: Any = sys.modules.get(module_name)
    if found is None:
        raise LookupError(f"module {module_name} is not loaded")
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LookupError(f"{module_name} has no {name}") from None
    return found


def has_field(cls: type, name: str) -> bool:
    """Whether instances of a vLLM class have this attribute, as far as the class can tell.

    Knows dataclasses, msgspec structs, class attributes, properties, annotations, and plain classes whose
    ``__init__`` takes no arguments (vLLM's IterationStats), of which one is made and looked at.
    """
    if name in getattr(cls, "__struct_fields__", ()) or hasattr(cls, name):
        return True
    if dataclasses.is_dataclass(cls):
        return any(f.name == name for f in dataclasses.fields(cls))
    if any(name in getattr(base, "__annotations__", {}) for base in cls.__mro__):
        return True
    try:
        return hasattr(cls(), name)
    except Exception:
        return False


def attributes(expression: str) -> set[tuple[str, str]]:
    """The ``(source, attribute)`` pairs an expression reads first hand: ``sched.a + sched.b.c`` reads a and b."""
    return {
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(expression, mode="eval"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def read_path(start: Any, path: str) -> Any:
    """Follow a dotted path; None where it ends early. Configuration objects move about between releases."""
    for part in path.split("."):
        try:
            start = getattr(start, part)
        except Exception:
            return None
        if start is None:
            return None
    return start


def vllm_version() -> str:
    """``vllm.__version__`` of the vLLM in this process, "" if none is loaded.

    Package metadata is not to be relied on: CPU builds go by another name.
    """
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))
