"""Makes engines and drops them, in a process of its own, and tells what is there after each: for test_many.py.

python -m tests.engine.many with|without MODEL COUNT FOLDER
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.engine import vllm_here
from tests.faults.long_run import descriptors, settled_kb, threads

PROMPTS = [list(range(2, 2 + length)) for length in (40, 70, 100)]


def ours() -> dict[str, int]:
    """Objects of kvhook's classes, by class."""
    found = Counter[str]()
    for each in gc.get_objects():
        kind = type(each)
        if str(getattr(kind, "__module__", "")).partition(".")[0] == "kvhook":
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return dict(found)


def state(rings: Path) -> dict[str, Any]:
    """What this process has, when the engine is gone. Frozen objects are not among those that are counted; they are
    frozen again afterwards, see `collect_engines`."""
    gc.unfreeze()
    found = {
        "kb": settled_kb(),
        "descriptors": descriptors(),
        "threads": threads(),
        "rings": len(list(rings.glob("*.ring"))) if rings.is_dir() else 0,
        "maps of rings": Path("/proc/self/maps").read_text().count(str(rings)),
        "objects": ours(),
    }
    gc.freeze()
    return found


def main() -> None:
    """One line of JSON: the states, the steps that are recorded, and what failed."""
    mode, model, count, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    import kvhook

    rings = folder / "rings"
    os.environ["KVHOOK_DIR"] = str(rings)
    session = kvhook.install(core="blocks", labels="/") if mode == "with" else None
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    vllm_here.stand_numba()
    states, given = [], []
    for _ in range(count):
        llm = LLM(model=model, **vllm_here.options())
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=5)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        given.append([list(output.outputs[0].token_ids) for output in outputs])
        del llm, outputs
        vllm_here.collect_engines()
        states.append(state(rings))
    told: dict[str, Any] = {"states": states, "given": given, "requests": 0, "wrong": []}
    if session is not None:
        told |= {"requests": len(session.requests()), "wrong": [str(seam) for seam in session.health().seams]}
        told["engines"] = session.health().engines
    print(json.dumps(told))


if __name__ == "__main__":
    main()
