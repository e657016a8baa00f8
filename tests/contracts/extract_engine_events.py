"""Write down which methods of vLLM's engines change what steps do afterwards, release by release.

    python tests/contracts/extract_engine_events.py ENV...    environments, or folders named vllm
    python tests/contracts/extract_engine_events.py 0.6.6.post1=ENV...    the same, of this release

What is kept is `engine_events_facts.json`: release -> class -> method -> its arguments. Nothing of vLLM is imported,
and no source text is kept. Releases that are there already stay.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvhook.adapters.engine_events import ANY, METHODS
from tests.contracts.extract_core import folders, release_of

FACTS = Path(__file__).with_name("engine_events_facts.json")
CLASSES = {
    "vllm.v1.engine.llm_engine": "LLMEngine",
    "vllm.v1.engine.async_llm": "AsyncLLM",
    "vllm.engine.llm_engine": "LLMEngine",
}


def read(folder: Path) -> dict[str, dict[str, str]]:
    """``module:Class`` -> method -> arguments."""
    found = {}
    for module, name in CLASSES.items():
        path = folder.parent.joinpath(*module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                methods = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
                wanted = {n.name: n.args for n in methods if n.name in (*METHODS, ANY)}
                found[f"{module}:{name}"] = {
                    method: " ".join(a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs))
                    for method, args in sorted(wanted.items())
                }
    return found


def main() -> None:
    """Read each place that was given, and write the facts."""
    facts = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}
    for word in sys.argv[1:]:
        named, _, place = word.rpartition("=")
        for folder in folders(Path(place)):
            facts.setdefault(named or release_of(folder), read(folder))
    ordered = dict(sorted(facts.items(), key=lambda item: [int(n) for n in item[0].split(".")[:3]]))
    FACTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
