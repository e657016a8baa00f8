"""From syntax tree to facts: a module, and the release that the modules make up."""

from __future__ import annotations

import ast
import re

from tests.contracts.extracting.classes import class_facts, method_facts
from tests.contracts.extracting.stored import FORMAT, Json
from tests.contracts.extracting.syntax import statements
from tests.contracts.extracting.wanted import ENV_VARIABLES, ENVS, IMPORTED_NAMES, MODULES, Wanted, places


def module_facts(text: str, module: str, is_package: bool, wanted: Wanted) -> Json:
    """The facts of one module, from its source."""
    tree = ast.parse(text)
    imports, aliases = _imports(tree, module, is_package)
    facts: Json = {"aliases": aliases, "classes": {}, "functions": {}, "imports": imports}
    classes, functions = re.compile(wanted.classes or "(?!)"), re.compile(wanted.functions or "(?!)")
    for statement in statements(tree.body):
        if isinstance(statement, ast.ClassDef) and classes.fullmatch(statement.name):
            facts["classes"][statement.name] = class_facts(statement, wanted)
        elif isinstance(statement, ast.FunctionDef) and functions.fullmatch(statement.name):
            facts["functions"][statement.name] = method_facts(statement, set())
    return {key: value for key, value in facts.items() if value}


def _imports(tree: ast.Module, module: str, is_package: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Imported names, and plain `A = B` assignments of them, each `name -> module:attribute`."""
    package = module if is_package else module.rpartition(".")[0]
    imports: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for statement in statements(tree.body):
        if isinstance(statement, ast.Import):
            imports.update({name.asname: name.name for name in statement.names if name.asname})
        elif isinstance(statement, ast.ImportFrom):
            source = statement.module or ""
            if statement.level:
                parts = package.split(".")
                above = parts[: len(parts) - statement.level + 1]
                source = ".".join([*above, source] if source else above)
            imports.update({name.asname or name.name: f"{source}:{name.name}" for name in statement.names})
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name) and isinstance(statement.value, ast.Name):
                if statement.value.id in imports:
                    aliases[target.id] = imports[statement.value.id]
            elif isinstance(target, ast.Name) and target.id == "MODULE_ATTRS":
                imports.update(_lazy_imports(statement.value, package))

    def matters(name: str, origin: str) -> bool:
        dotted = origin.replace(":", ".")
        if not dotted.startswith("vllm."):
            return False
        return dotted in MODULES or dotted == ENVS or bool(re.fullmatch(IMPORTED_NAMES, name))

    return (
        {name: origin for name, origin in imports.items() if matters(name, origin)},
        {name: origin for name, origin in aliases.items() if matters(name, origin)},
    )


def _lazy_imports(table: ast.expr | None, package: str) -> dict[str, str]:
    """vLLM's own table of names that `vllm/__init__.py` imports on first use."""
    found = {}
    if isinstance(table, ast.Dict):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                source = str(value.value)
                found[str(key.value)] = package + source if source.startswith(".") else source
    return found


def envs_facts(text: str) -> Json:
    """Which of the environment variables that matter exist, and whether reading them can be cached."""
    tree = ast.parse(text)
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {
        "enable_envs_cache": "enable_envs_cache" in functions,
        "variables": [name for name in ENV_VARIABLES if name in constants],
    }


def release_facts(release: str, sources: dict[str, str], archive: str) -> Json:
    """All facts of one release; a module that it does not have is null."""
    modules: Json = {}
    for module, wanted in MODULES.items():
        path = next((place for place in places(module) if place in sources), None)
        modules[module] = path and module_facts(sources[path], module, path.endswith("__init__.py"), wanted)
    envs = envs_facts(sources["vllm/envs.py"])
    return {"envs": envs, "format": FORMAT, "modules": modules, "release": release, "source": archive}
