"""The layers of the package: a module imports from its own layer or from one below, also inside functions and for
types alone. Nothing imports in a circle. A file of code has fewer than 400 lines, also of the tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import kvhook
from tests.conftest import ROOT

PACKAGE = Path(kvhook.__file__).parent

#: From bottom to top. A name stands for a module or for a package with everything in it. This is the one list.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "schema", "core_schema", "files", "faults", "forks", "labels", "overlays", "streams"),
    ("facts", "_step"),
    ("ring",),
    ("records", "options"),
    ("analysis", "whatif"),
    ("text", "export", "report"),
    ("trace", "parts", "places", "exported", "frames", "window"),
    ("discovery",),
    ("adapters",),
    ("hooks",),
    ("recording", "core"),
    ("plugin",),
    ("stat_logger", "collector", "doctor", "launch"),
    ("kvhook",),  # the public face: kvhook/__init__.py
    ("demo", "pytest_plugin", "top"),
    ("check",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> Iterator[str]:
    """The modules of kvhook that a module imports. `__version__` is no import: it stands in the package itself."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for name in (alias.name for alias in node.names):
                inner = f"{node.module}.{name}"
                if inner in MODULES:
                    yield inner
                elif (node.module, name) != ("kvhook", "__version__"):
                    yield node.module


def layer_of(module: str) -> str:
    return module.removeprefix("kvhook.").partition(".")[0]


GRAPH = {module: set(imports(module)) - {module} for module in MODULES}


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in MODULES} == set(HEIGHT)


def test_no_module_imports_from_a_layer_above_its_own():
    arrows = [
        f"{module} imports {target}: {layer_of(module)} lies below {layer_of(target)}"
        for module, targets in GRAPH.items()
        for target in sorted(targets)
        if HEIGHT[layer_of(module)] < HEIGHT[layer_of(target)]
    ]
    assert not arrows, "\n" + "\n".join(sorted(arrows))


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_every_file_has_fewer_than_400_lines():
    code = (".py", ".c", ".h", ".js", ".css")
    folders = ("kvhook", "tests", "benchmarks", "examples", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in code]
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {name: count for name, count in lines.items() if count >= 400} == {}
    assert len(lines) > 500, "the files of the checkout"
