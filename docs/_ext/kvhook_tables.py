"""Sphinx directives that print kvhook's own tables, so that a page of columns or options cannot be out of date.

``{kvhook-columns} step`` (or ``request``): the columns of a record, from `kvhook.schema`; where the newest vLLM keeps
each of them, from the adapter's table; and from which vLLM on it is filled, found by letting kvhook's own `doctor` look
at the contract of every release.
``{kvhook-facts} engine`` (or ``run``): the facts in ``session.meta``, with their place in vLLM's configuration.
``{kvhook-fields} module:Class``: the fields of a dataclass.
``{kvhook-verbs}``: every verb's help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

V0, V1 = "vllm.engine.llm_engine:LLMEngine", "vllm.v1.engine.llm_engine:LLMEngine"

#: How the types of facts are called in Python.
FACT_TYPES = {
    "text": "str",
    "i8": "int",
    "count": "int",
    "f8": "float",
    "flag": "bool",
    "texts": "dict",
    "reasons": "dict",
    "list": "list",
}


class Columns(SphinxDirective):
    """The columns of one kind of record."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One table."""
        from kvhook.schema import FULL_ONLY, KINDS

        kind = self.arguments[0]
        _, fields = KINDS[kind]
        rows = [
            (
                f"`{f.name}`",
                f.unit,
                f.role,
                releases_with(kind, f.name),
                "full" if kind == "request" or f.name in FULL_ONLY else "all",
                f.meaning + source(kind, f.name),
            )
            for f in fields
        ]
        return self.parse_text_to_nodes(table(("column", "unit", "kind", "vLLM", "level", "meaning"), rows))


class CoreColumns(SphinxDirective):
    """The columns of one kind of record of an engine core."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One table."""
        from kvhook.core_schema import BLOCK_EVENT_FIELDS, BLOCK_EVENT_TIMES, CORE_KINDS
        from kvhook.records.block_lives import BLOCK_LIFE_FIELDS, PREFIX_FIELDS

        kind = self.arguments[0]
        times = tuple((name, "", meaning) for name, meaning in BLOCK_EVENT_TIMES.items())
        of_blocks = {"blocks": BLOCK_EVENT_FIELDS + times, "block_lives": BLOCK_LIFE_FIELDS, "prefixes": PREFIX_FIELDS}
        if kind in of_blocks:
            return self.parse_text_to_nodes(
                table(("column", "meaning"), [(f"`{name}`", meaning) for name, _, meaning in of_blocks[kind]])
            )
        rows = [(f"`{f.name}`", f.unit, f.role, f.meaning) for f in CORE_KINDS[kind][1]]
        return self.parse_text_to_nodes(table(("column", "unit", "kind", "meaning"), rows))


class Facts(SphinxDirective):
    """What ``session.meta`` tells about the run, or about each engine."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One table."""
        from kvhook.adapters.config import FACTS
        from kvhook.schema import FACT_FIELDS, RUN_FIELDS

        engine = self.arguments[0] == "engine"
        rows = []
        for f in FACT_FIELDS if engine else RUN_FIELDS:
            where = f" (`{FACTS[f.name]}`)" if engine and f.name in FACTS else ""
            rows.append((f"`{f.name}`", f.unit, FACT_TYPES[f.type], f.meaning + where))
        return self.parse_text_to_nodes(table(("fact", "unit", "type", "meaning"), rows))


class Fields(SphinxDirective):
    """The fields of a dataclass: type, and what its comment or the schema says of it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One table."""
        from kvhook.schema import KINDS

        module, _, name = self.arguments[0].partition(":")
        comments = ModuleAnalyzer.for_module(module).find_attr_docs()
        columns = {f.name: f.meaning for kind in ("request", "step") for f in KINDS[kind][1]}
        rows = []
        for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
            comment = " ".join(comments.get((name, field.name), ())).strip()
            rows.append((f"`{field.name}`", f"`{field.type}`", (comment or of_column(field.name, columns))))
        return self.parse_text_to_nodes(table(("field", "type", "meaning"), rows))


class Verbs(SphinxDirective):
    """What every verb of the command line says when it is asked for help."""

    def run(self) -> list[nodes.Node]:
        """A section per verb."""
        from kvhook.cli import VERBS

        parts = []
        for purpose, verbs in VERBS.items():
            parts.append(f"## To {purpose}\n")
            parts += [f"### kvhook {verb}\n\n```none\n{help_of(verb)}```\n" for verb in verbs]
        text = "\n".join(parts)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def help_of(verb: str) -> str:
    """What ``kvhook VERB --help`` prints."""
    from kvhook.cli import make_parser

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        make_parser().parse_args([verb, "--help"])
    return printed.getvalue()


def table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    lines = [heading, tuple("---" for _ in heading), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def of_column(field: str, columns: dict[str, str]) -> str:
    """What a field of the summary says that is named for a column: the sum, or a mean or peak over the steps."""
    for suffix, what in (("", ""), ("_mean", "mean over the steps: "), ("_peak", "largest of all steps: ")):
        column = field.removesuffix(suffix) if suffix else field
        if column in columns and (not suffix or field.endswith(suffix)):
            return what + columns[column].replace(" in this step", "").replace(" at the end of the step", "")
    return ""


def source(kind: str, column: str) -> str:
    """Where the newest vLLM keeps a column, as text for behind its meaning: ``(`PrefixCacheStats.queries`)``."""
    from kvhook.adapters import ADAPTERS

    adapter = next(a for a in ADAPTERS if a.engine == V1)
    reads = adapter.steps if kind == "step" else adapter.requests
    classes = {one.name: one.path.partition(":")[2] for one in adapter.sources}
    for read in reads:
        names = re.findall(r"\b(\w+)\.(\w+)", read.expressions[0])
        if read.column == column and names:
            return f" ({' + '.join(f'`{classes[variable]}.{name}`' for variable, name in names)})"
    return ""


def releases_with(kind: str, column: str) -> str:
    """Which engines fill a column: V0, and V1 from a release on."""
    old, new = live_columns(V0), live_columns(V1)
    parts = []
    if any(column in live[kind] for live in old.values()):
        parts.append("V0")
    if first := first_of_the_last_run([(release, column in live[kind]) for release, live in new.items()]):
        oldest = next(iter(new))
        parts.append("V1" if first == oldest else f"V1\u00a0≥\u00a0{first}")
    return ", ".join(parts) or "sometimes"


def first_of_the_last_run(seen: list[tuple[str, bool]]) -> str:
    """The release from which on all have it, to the newest; empty if the newest has not."""
    found = ""
    for release, there in reversed(seen):
        if not there:
            break
        found = release
    return found


@functools.cache
def live_columns(engine: str) -> dict[str, dict[str, set[str]]]:
    """Release -> kind -> the columns that are live behind `LLM`, for the releases whose engine kvhook records."""
    return {
        release: {kind: set(names) for kind, names in found.live.items()}
        for release, found in engines()
        if found.engine == engine and not found.problems
    }


@functools.cache
def engines() -> tuple[tuple[str, Any], ...]:
    """What `kvhook doctor` finds in each release, the oldest first: stand-ins with its classes are imported for it."""
    return tuple(_look())


def _look() -> Iterator[tuple[str, Any]]:
    from kvhook.doctor import examine
    from tests.contracts.loader import build_stub_modules, load, releases, stubs

    for release in releases():
        modules = build_stub_modules(load(release))
        with stubs(modules, lazy=True):
            for name in modules:
                importlib.import_module(name)
            yield from ((release, found) for found in examine().engines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("kvhook-columns", Columns)
    app.add_directive("kvhook-core-columns", CoreColumns)
    app.add_directive("kvhook-facts", Facts)
    app.add_directive("kvhook-fields", Fields)
    app.add_directive("kvhook-verbs", Verbs)
    return {"version": "1", "parallel_read_safe": True}
