"""What an adapter is made of: tables that say where vLLM keeps each number, and the look-up that checks them.

An adapter describes one era of vLLM's stats. It holds no code that runs per step: `kvhook.adapters.publisher` turns
its tables into a publisher, with only those columns that this very vLLM can fill.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A place in vLLM that is patched. ``role`` is what `kvhook.hooks.wrappers` does there, ``path`` is
    ``module:name``.

    A target without a role is only looked at: the adapter relies on it. Without a required target nothing is patched
    at all; without one that is not required, ``loss`` says what is missing then. ``field`` names a class and an
    attribute of it that the hook lives on, ``takes`` the arguments that must be in the signature.
    """

    role: str
    path: str
    required: bool = True
    loss: str = ""
    field: tuple[str, str] | None = None
    takes: tuple[str, ...] = ()


class Source(NamedTuple):
    """An object that numbers are read from: a variable of the publisher.

    ``path`` names the class that describes it (``module:Class``). vLLM hands it over as an ``argument`` of
    `Adapter.record`, or ``expression`` says how to get it from the sources before it. An ``optional`` one may be
    None: its columns are blank then. ``flags`` are the columns that say whether it came.
    """

    name: str
    path: str
    expression: str = ""
    optional: bool = False
    argument: str = ""
    flags: tuple[str, ...] = ()


class Read(NamedTuple):
    """Where a column comes from: expressions over the sources, of which the first that this vLLM has is taken.

    An expression may name facts about the engine (`Adapter.facts`, and those of `kvhook.adapters.config`).
    ``absent`` says why the column is missing if this vLLM has none of them. ``needs`` names a fact that must be true
    besides, and ``unmet`` says why the column is blank if it is not. ``fallback_needs`` is the same for the expressions
    after the first.
    """

    column: str
    expressions: tuple[str, ...]
    absent: str = ""
    needs: str = ""
    unmet: str = ""
    fallback_needs: str = ""


class Adapter(NamedTuple):
    """One era of vLLM's stats, as tables."""

    name: str
    #: adapters of one family are patched together or not at all
    family: str
    #: the engine's class, ``module:Class``; it is patched once that module has been imported
    engine: str
    targets: tuple[Target, ...]
    #: how kvhook gets at the stats: a key of `kvhook.hooks.taps.TAPS`, and the attribute of the engine that it uses
    tap: str
    holder: str
    #: a method whose signature says in which order vLLM hands the sources over; or that order
    record: str | tuple[str, ...]
    sources: tuple[Source, ...]
    steps: tuple[Read, ...]
    #: the lists of single values: schema series name -> where the list is
    values: tuple[Read, ...]
    #: the list of finished requests. Its items are the source of this name if there is one; if not, the expressions
    #: in `requests` are lists of the same length
    finished: Read
    requests: tuple[Read, ...]
    #: fact about the engine -> path below vLLM's VllmConfig
    facts: Mapping[str, str]
    #: False where there is no ``step`` to be timed: a record is one call of `record`
    timed: bool = True
    #: functions that the expressions call; one named "merge" makes one of two stats objects that came in one step
    helpers: Mapping[str, Any] = {}
    #: arguments that keep vLLM's own loggers away where the user had stats off
    quiet: Mapping[str, Callable[[], Any]] = {}
    #: the vLLM that this adapter is too old for: it is not to be taken for a new one that lacks the newer's targets
    until: str = ""
    #: column -> what to know about its numbers from these vLLMs
    notes: Mapping[str, str] = {}
    #: how much is recorded of a step: a name in `kvhook.schema.LEVELS`
    level: str = "full"
    #: whether kvhook must be there when the engine is built
    must_be_built: bool = False
    #: why a column that no table names is absent; "" for the general reason
    unseen: str = ""
    #: fact about the engine -> what gives it, asked when the engine has been built
    asks: Mapping[str, Callable[[], Any]] = {}
    #: the method of the engine core's client that brings the outputs, and with them the scheduler's stats; "" where the
    #: engine core is no object of its own (V0)
    core_output: str = ""
    #: the first vLLM whose ``step`` no longer asserts that the engine core sent the scheduler's stats; "" if none did
    asserts_stats_until: str = ""
    #: expression over ``scheduler``: its free KV blocks; the first that can be evaluated is taken
    free_blocks: tuple[str, ...] = ()
    #: path from the engine to its scheduler, or schedulers, where these are in the same process
    schedulers: str = ""
    #: methods of the engine's output processor in which vLLM fills its iteration stats in
    makes_stats_in: tuple[str, ...] = ()
    #: whether it can be recorded at a level below full
    has_levels: bool = True
    #: whether its block pool may keep a KV block for itself
    may_have_null_block: bool = True
    #: whether its module may hold another family's engine under the same name
    shares_engine_name: bool = False

    @property
    def trigger(self) -> str:
        """The module whose import is waited for."""
        return self.engine.partition(":")[0]


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
    if any(name in vars(base).get("__annotations__", ()) for base in cls.__mro__):
        return True
    try:
        return hasattr(cls(), name)
    except Exception:
        return False


@functools.cache
def attributes(expression: str) -> frozenset[tuple[str, str]]:
    """The ``(source, attribute)`` pairs an expression reads first hand: ``sched.a + sched.b.c`` reads a and b."""
    return frozenset(
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(expression, mode="eval"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    )


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


@functools.cache
def names(expression: str) -> frozenset[str]:
    """The plain names in an expression: sources, helpers, and facts about the engine."""
    return frozenset(n.id for n in ast.walk(ast.parse(expression, mode="eval")) if isinstance(n, ast.Name))


def vllm_version() -> str:
    """``vllm.__version__`` of the vLLM in this process, "" if none is loaded.

    Package metadata is not to be relied on: CPU builds go by another name.
    """
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))


def release(version: str) -> tuple[int, ...]:
    """A version as numbers that can be compared; () for one that is none, as of a build without tags."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()
