"""Publishers as kvhook generates them, to be read: the code that runs in every step, for some releases of vLLM.

`GENERATED` names the files beside this one. They are not imported by anything.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import NamedTuple

from kvhook.adapters import BY_LEVEL
from kvhook.adapters.config import engine_facts
from kvhook.adapters.fit import resolve
from kvhook.adapters.publisher import compile_publisher
from tests.contracts.behaviour import config_of
from tests.contracts.loader import build_stub_modules, load, stubs

HERE = Path(__file__).parent
WRITE = "python -m tests.golden --write"


class Publisher(NamedTuple):
    """One publisher: of which vLLM, with which adapter."""

    release: str
    level: str
    adapter: str
    title: str


#: File -> the publisher in it.
GENERATED = {
    "v1_full_0_32_0.py": Publisher("0.32.0", "full", "v1", "V1's LLMEngine at level full"),
    "v1_light_0_32_0.py": Publisher("0.32.0", "light", "v1-light", "V1's LLMEngine at level light"),
    "v0_0_6_6.py": Publisher("0.6.6", "full", "v0", "V0's LLMEngine"),
}


def generate(publisher: Publisher) -> str:
    """The source for an engine with 1000 KV blocks, with everything switched on that can be."""
    adapter = next(a for a in BY_LEVEL[publisher.level] if a.name == publisher.adapter)
    with stubs(build_stub_modules(load(publisher.release))):
        hooked = any(target.role == "finished" for target in resolve(adapter)[0])
        engine = types.SimpleNamespace(vllm_config=config_of(num_gpu_blocks=1000, kv_cache_metrics=True))
        source = compile_publisher(adapter, engine_facts(adapter, engine) | {"finished_hook": hooked}).source
    head = f"# What kvhook runs in every step of {publisher.title}, vLLM {publisher.release}. Generated: {WRITE}\n\n"
    return head + source
