"""Write down what the classes of vLLM's engine core have, release by release, from installed or unpacked vLLM folders.

    python tests/contracts/extract_core.py ENV_OR_FOLDER...      a folder named vllm, or an environment that has one
    python tests/contracts/extract_core.py 0.9.0.1=FOLDER...     the same, of this release: post releases do not say it

What is kept is `core_facts.json`: release -> module -> class -> its names (methods, properties, fields, what `__init__`
assigns to self); under "" the names of the module itself. Nothing of vLLM is imported, and no source text is kept.
Releases that are there already stay.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FACTS = Path(__file__).with_name("core_facts.json")

#: Module -> classes whose names are kept.
MODULES: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.scheduler": ("Scheduler",),
    "vllm.v1.core.sched.interface": ("SchedulerInterface",),
    "vllm.v1.core.sched.output": ("SchedulerOutput", "NewRequestData", "CachedRequestData"),
    "vllm.v1.core.kv_cache_manager": ("KVCacheManager",),
    "vllm.v1.core.block_pool": ("BlockPool",),
    "vllm.v1.core.kv_cache_utils": (
        "KVCacheBlock",
        "FreeKVCacheBlockQueue",
        "BlockHashWithGroupId",
        "BlockHashType",
        "BlockHash",
    ),
    "vllm.v1.request": ("Request",),
    "vllm.v1.engine.core": ("EngineCore",),
}

#: Class -> its names, with spaces between them.
Names = dict[str, str]


def read(folder: Path) -> dict[str, Names]:
    """Module -> class -> names, of a folder named vllm."""
    found = {}
    for module, classes in MODULES.items():
        path = folder.parent.joinpath(*module.split(".")).with_suffix(".py")
        if path.is_file():
            found[module] = _names(ast.parse(path.read_text(encoding="utf-8")), classes)
    return found


def _names(tree: ast.Module, classes: tuple[str, ...]) -> Names:
    found: Names = {"": _text(_defined(tree.body))}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            found[node.name] = _text((*_defined(node.body), *_assigned(node)))
    return found


def _text(names: Iterable[str]) -> str:
    return " ".join(sorted(set(names)))


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements define."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _assigned(cls: ast.ClassDef) -> Iterator[str]:
    """Names that ``__init__`` assigns to self."""
    for method in cls.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for node in ast.walk(method):
                if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
                    continue
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    yield node.attr


def folders(place: Path) -> Iterator[Path]:
    if place.name == "vllm" and (place / "v1").is_dir():
        yield place
    else:
        yield from (path.parent for path in place.glob("lib/python*/site-packages/vllm/_version.py"))


def release_of(folder: Path) -> str:
    text = (folder / "_version.py").read_text(encoding="utf-8")
    (release,) = re.findall(r"^__version__ = version = '(\d+\.\d+\.\d+(?:\.post\d+)?)", text, re.MULTILINE)
    return str(release)


def main() -> None:
    """Read the folders that are named, and write the facts."""
    known = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    for place in sys.argv[1:]:
        named, _, where = place.rpartition("=")
        for folder in folders(Path(where)):
            release = named or release_of(folder)
            known[release] = read(folder)
            print(release, folder)
    known = {release: found for release, found in known.items() if found}  # some have no V1
    order = sorted(known, key=lambda text: [int(part) for part in re.findall(r"\d+", text)])
    FACTS.write_text(json.dumps({release: known[release] for release in order}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
