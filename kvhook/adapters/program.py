"""From a plan of columns to the publisher in C: the same as `kvhook.adapters.source`, as data.

The adapters' tables are expressions of Python. `Program` compiles them for a small stack machine (`program.c`): it
knows attributes, sums, ``len``, ``int`` and conditions by itself, and calls Python for everything else. So every
table can be compiled, and there is nothing that is written down twice.

A plan's parts lie in the order in which they are evaluated, because an exception in the one path must leave the same
records behind as in the other.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from kvhook.adapters.columns import ENGINE_INDEX, PREFIXES, ColumnPlan
from kvhook.adapters.shape import MEASURE_EVERY, Shape, blank_of, root_of
from kvhook.ring.layout import BODY_AT, Layout
from kvhook.schema import VALUE_SERIES

_OPERATORS: Mapping[type, str] = {ast.Add: "ADD", ast.Sub: "SUBTRACT", ast.Mult: "MULTIPLY", ast.Div: "DIVIDE"}
_COMPARISONS: Mapping[type, int] = {ast.Lt: 0, ast.LtE: 1, ast.Eq: 2, ast.NotEq: 3, ast.Gt: 4, ast.GtE: 5}
#: Python's own functions that the machine does itself.
_BUILT_IN: Mapping[Any, str] = {len: "LEN", int: "INT"}
#: Statements of publish.c.
_SET, _SKIP_IF_NONE, _SKIP = range(3)


class CannotCompile(Exception):
    """An expression has something in it that the machine does not know. The Python path knows everything."""


class Program:
    """Expressions as operations, one behind the other.

    Args:
        native: the extension, whose operations and registers these are.
        names: what an expression may name besides registers and Python's own functions.
    """

    def __init__(self, native: ModuleType, names: Mapping[str, Any]) -> None:
        self._codes = {name: code for code, name in enumerate(native.OPERATIONS)}
        self._depth_limit: int = native.STACK_DEPTH
        self._names = {**vars(builtins), **names}
        self._constants: dict[tuple[type, str | int], int] = {}
        self._compiled: dict[str, int] = {}
        self.operations: list[tuple[int, int, int]] = []
        self.constants: list[Any] = []
        self.registers = {name: i for i, name in enumerate(native.REGISTERS)}

    def register(self, name: str) -> int:
        """The register of this name; it is made if there is none."""
        return self.registers.setdefault(name, len(self.registers))

    def expression(self, text: str) -> int:
        """Compile an expression. Returns where it begins.

        Raises:
            CannotCompile: the machine cannot do it.
        """
        if text not in self._compiled:
            tree = ast.parse(text, mode="eval").body
            if _depth(tree) > self._depth_limit:
                raise CannotCompile(f"{text} is nested too deeply")
            self._compiled[text] = len(self.operations)
            self._compile(tree)
            self._add("END")
        return self._compiled[text]

    def _add(self, name: str, argument: int = 0, attribute: int = 0) -> int:
        self.operations.append((self._codes[name], argument, attribute))
        return len(self.operations) - 1

    def _constant(self, value: Any) -> int:
        # 0, 0.0 and False are equal, and are three constants
        key = (type(value), repr(value) if isinstance(value, (int, float, str)) else id(value))
        if key not in self._constants:
            self._constants[key] = len(self.constants)
            self.constants.append(value)
        return self._constants[key]

    def _compile(self, tree: ast.expr) -> None:
        if isinstance(tree, ast.Name) and tree.id in self.registers:
            self._add("REGISTER", self.registers[tree.id])
        elif isinstance(tree, ast.Name) and tree.id in self._names:
            self._add("CONSTANT", self._constant(self._names[tree.id]))
        elif isinstance(tree, ast.Constant):
            self._add("CONSTANT", self._constant(tree.value))
        elif isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub) and isinstance(tree.operand, ast.Constant):
            self._add("CONSTANT", self._constant(-tree.operand.value))  # type: ignore[operator]
        elif isinstance(tree, ast.Tuple) and not tree.elts:
            self._add("CONSTANT", self._constant(()))
        elif isinstance(tree, ast.Attribute):
            self._attribute(tree)
        elif isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
            self._compile(tree.left)
            self._compile(tree.right)
            self._add(_OPERATORS[type(tree.op)])
        elif isinstance(tree, ast.IfExp):
            self._choice(tree)
        elif isinstance(tree, ast.Call) and not tree.keywords:
            self._call(tree)
        else:
            raise CannotCompile(ast.unparse(tree))

    def _attribute(self, tree: ast.Attribute) -> None:
        name = self._constant(tree.attr)
        if isinstance(tree.value, ast.Name) and tree.value.id in self.registers:
            self._add("REGISTER_ATTRIBUTE", self.registers[tree.value.id], name)
        else:
            self._compile(tree.value)
            self._add("ATTRIBUTE", name)

    def _call(self, tree: ast.Call) -> None:
        function = self._names.get(tree.func.id) if isinstance(tree.func, ast.Name) else None
        if not callable(function):
            raise CannotCompile(ast.unparse(tree))
        itself = next((name for known, name in _BUILT_IN.items() if function is known and len(tree.args) == 1), "")
        if not itself:
            self._add("CONSTANT", self._constant(function))
        for argument in tree.args:
            self._compile(argument)
        self._add(itself or "CALL", 0 if itself else len(tree.args))

    def _choice(self, tree: ast.IfExp) -> None:
        self._test(tree.test)
        over = self._add("JUMP_IF_FALSE")
        self._compile(tree.body)
        out = self._add("JUMP")
        self._jump_here(over)
        self._compile(tree.orelse)
        self._jump_here(out)

    def _jump_here(self, at: int) -> None:
        code, _, _ = self.operations[at]
        self.operations[at] = (code, len(self.operations), 0)

    def _test(self, tree: ast.expr) -> None:
        """A condition. Its value is no bool of Python's, so a comparison stands nowhere else."""
        if not isinstance(tree, ast.Compare):
            self._compile(tree)
            return
        (operator,), (right,) = (tree.ops, tree.comparators) if len(tree.ops) == 1 else ((None,), (tree,))
        self._compile(tree.left)
        if isinstance(operator, (ast.Is, ast.IsNot)) and isinstance(right, ast.Constant) and right.value is None:
            self._add("IS_NONE" if isinstance(operator, ast.Is) else "IS_NOT_NONE")
        elif type(operator) in _COMPARISONS:
            self._compile(right)
            self._add("COMPARE", _COMPARISONS[type(operator)])
        else:
            raise CannotCompile(ast.unparse(tree))


def _depth(tree: ast.expr) -> int:
    """How many values the machine keeps at once while it evaluates an expression."""
    if isinstance(tree, ast.Attribute):
        return _depth(tree.value)
    if isinstance(tree, ast.BinOp):
        return _depth_of((tree.left, tree.right))
    if isinstance(tree, ast.Compare):
        return _depth_of((tree.left, *tree.comparators))
    if isinstance(tree, ast.IfExp):
        return max(map(_depth, (tree.test, tree.body, tree.orelse)))
    if isinstance(tree, ast.Call):
        return _depth_of((tree.func, *tree.args))
    return 1


def _depth_of(trees: Sequence[ast.expr]) -> int:
    """The same for expressions whose values are kept until the last of them is there."""
    return max(kept + _depth(tree) for kept, tree in enumerate(trees))


def compile_program(plan: ColumnPlan, layout: Layout, native: ModuleType) -> dict[str, Any]:
    """The plan of `native.Publisher`. It lacks the packers, which are bound with everything else that is called.

    Raises:
        CannotCompile: an adapter's expression is beyond the machine.
    """
    return _ProgramWriter(plan, layout, native).as_dict()


class _ProgramWriter(Shape):
    """Writes the plan, part by part, in the order in which `SourceWriter` writes the same parts."""

    def __init__(self, plan: ColumnPlan, layout: Layout, native: ModuleType) -> None:
        super().__init__(plan, layout)
        self.program = Program(native, plan.names)
        self.statements: list[tuple[int, int, int]] = []

    def as_dict(self) -> dict[str, Any]:
        register, merge = self.program.register, self.plan.names.get("merge")
        roots = tuple(register(root) for root in self.roots)
        for root in self.roots:
            self.root(root)
        series = tuple(self.list(name, expression) for name, expression in self.plan.lists.items())
        finished = self.finished()
        gone = self.kind("request", self.aborted_cells())
        step = self.kind("step", self.step_cells())
        record, take = self.record_arguments(), self.take_arguments()
        first = self.scheduler_argument()
        return {
            "operations": tuple(self.program.operations),
            "constants": tuple(self.program.constants),
            "registers": len(self.program.registers),
            "statements": tuple(self.statements),
            "roots": roots,
            "series": series,
            **finished,
            "gone": gone,
            "step": step,
            "record": record,
            "take": take,
            "logged": record[0].index(first) if first else -1,
            "uncounted": register(self.counts) if self.counts else -1,
            "from_core": int(self.from_core),
            "merge": merge,
            "measure_every": MEASURE_EVERY,
            "values_per_slot": self.layout.values_per_slot,
            "body_bytes": self.layout.slot_bytes - BODY_AT,
        }

    def set(self, name: str, expression: str) -> None:
        self.statements.append((_SET, self.program.register(name), self.program.expression(expression)))

    def unless_none(self, name: str, blanks: Callable[[], None], reads: Callable[[], None]) -> None:
        """Blanks where an object is None, and reads where it is not."""
        over = len(self.statements)
        self.statements.append((_SKIP_IF_NONE, self.program.register(name), 0))
        reads()
        out = len(self.statements)
        self.statements.append((_SKIP, 0, 0))
        self.statements[over] = (*self.statements[over][:2], len(self.statements))
        blanks()
        self.statements[out] = (_SKIP, 0, len(self.statements))

    def root(self, root: str) -> None:
        columns, flags = self.columns_of(root), self.roots[root].flags

        def blanks() -> None:
            for name in columns:
                self.set(name, blank_of(name))
            for flag in flags:
                self.set(flag, "0")

        def reads() -> None:
            for flag in flags:
                self.set(flag, "1")
            for column in columns:
                if self.reads[column] == {root}:
                    self.set(column, self.plan.steps[column])
            for child in self.children_of(root):
                self.child(
                    child.name, child.expression, [c for c in columns if child.name in self.reads[c]], child.optional
                )

        if columns or flags:
            self.unless_none(root, blanks, reads)

    def child(self, name: str, expression: str, columns: list[str], optional: bool) -> None:
        def blanks() -> None:
            for column in columns:
                self.set(column, blank_of(column))

        def reads() -> None:
            for column in columns:
                self.set(column, self.plan.steps[column])

        if not columns:
            return
        self.set(name, expression)
        if optional:
            self.unless_none(name, blanks, reads)
        else:
            reads()

    def list(self, series: str, expression: str) -> tuple[int, ...]:
        register = self.program.register
        parts = (register(f"{PREFIXES[series]}_{what}") for what in ("count", "sum", "min", "max"))
        root, program = register(root_of(expression)), self.program.expression(expression)
        return (VALUE_SERIES.index(series), root, program, *parts)

    def finished(self) -> dict[str, Any]:
        if not self.plan.finished:
            return {"finished_root": -1, "finished": -1, "rows": -1, "parts": (), "request": None}
        rows = self.rows()
        root, finished = root_of(self.plan.finished), self.program.expression(self.plan.finished)
        zipped = self.program.expression(self.zipped_rows()) if rows else -1
        parts = [f"of_{c}" for c in rows] if rows else [self.plan.adapter.finished.column]
        return {
            "finished_root": self.program.register(root),
            "finished": finished,
            "rows": zipped,
            "parts": tuple(self.program.register(part) for part in parts),
            "request": self.kind("request", self.request_cells()),
        }

    def kind(self, kind: str, cells: Sequence[str]) -> tuple[str, tuple[int, ...]] | None:
        if not cells:
            return None
        types = "".join("d" if c.type == "<f8" else "q" for c in self.layout.columns[kind])
        return types, tuple(self.program.expression(cell) for cell in cells)

    def record_arguments(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        register = {argument: self.program.register(root) for root, argument in self.recorded().items()}
        register[ENGINE_INDEX] = self.program.register("engine_index")
        names = (*self.plan.arguments, "spent")
        return names, tuple(register.get(name, -1) for name in names)

    def take_arguments(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        taken = self.taken()
        registers = [self.program.register(s.name) for s in taken]
        return (*(s.argument for s in taken), ENGINE_INDEX, "spent", "num_free", "outputs"), (
            *registers,
            -1,
            -1,
            -1,
            -1,
        )
