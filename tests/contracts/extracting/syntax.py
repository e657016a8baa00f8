"""From syntax tree to facts, the small pieces: an annotation, a default, a field, a signature."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator

from tests.contracts.extracting.stored import Json

Function = ast.FunctionDef | ast.AsyncFunctionDef


_BUILTIN = {name.capitalize(): name for name in ("dict", "list", "set", "tuple", "type")}


class _OneSpelling(ast.NodeTransformer):
    """One spelling for one type, so that a change of style is no drift.

    `Optional["List[X]"]` becomes `list[X] | None`.
    """

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            try:
                return self.visit(ast.parse(node.value, mode="eval").body)
            except SyntaxError:
                return node
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(_BUILTIN.get(node.id, node.id), ast.Load())

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        base = node.value.id if isinstance(node.value, ast.Name) else ""
        if base == "Literal":
            return node
        inside = self.visit(node.slice)
        if base == "Optional":
            return ast.BinOp(inside, ast.BitOr(), ast.Constant(None))
        if base == "Union" and isinstance(inside, ast.Tuple):
            return functools.reduce(lambda left, right: ast.BinOp(left, ast.BitOr(), right), inside.elts)
        return ast.Subscript(self.visit(node.value), inside, ast.Load())


def annotation_of(node: ast.expr) -> str:
    return ast.unparse(_OneSpelling().visit(copy.deepcopy(node)))


def default_of(node: ast.expr) -> str:
    """A literal as it is, `X()` for something made anew each time, `...` for anything else."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return ast.unparse(node)
    if isinstance(node, (ast.List, ast.Tuple)) and not node.elts:
        return ast.unparse(node)
    if isinstance(node, ast.Dict) and not node.keys:
        return "{}"
    if isinstance(node, ast.Call) and last_name(node.func) == "field":
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default" in options:
            return default_of(options["default"])
        factory = options.get("default_factory")
        return f"{ast.unparse(factory)}()" if isinstance(factory, (ast.Name, ast.Attribute)) else "..."
    if isinstance(node, ast.Call) and not node.args and not node.keywords:
        function = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        return f"{ast.unparse(function)}()"
    return "..."


def last_name(node: ast.expr) -> str:
    """`a.b.C[int](...)` -> `C`."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def field_facts(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Json:
    fact: Json = {"name": name}
    if annotation is not None:
        fact["annotation"] = annotation_of(annotation)
    if default is not None:
        fact["default"] = default_of(default)
    return fact


def signature_of(function: Function) -> str:
    """The argument list without annotations; a default that is no constant is written `...`."""

    def plain(default: ast.expr) -> ast.expr:
        return default if isinstance(default, ast.Constant) else ast.Constant(...)

    arguments = copy.deepcopy(function.args)
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*every, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [plain(default) for default in arguments.defaults]
    arguments.kw_defaults = [default and plain(default) for default in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, also those inside `if` and `try`; not `if TYPE_CHECKING`."""
    for statement in body:
        if isinstance(statement, ast.If):
            if last_name(statement.test) != "TYPE_CHECKING":
                yield from statements(statement.body)
            yield from statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from statements(statement.body)
            for handler in statement.handlers:
                yield from statements(handler.body)
            yield from statements(statement.orelse)
        else:
            yield statement


def self_attribute(node: ast.expr) -> str | None:
    """The name, for `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None
