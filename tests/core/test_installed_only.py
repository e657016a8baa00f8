"""An installed kvhook does nothing unless it is asked for: vLLM loads its plug-in, and nothing in vLLM is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.entry_point import make_known

pytest.importorskip("vllm.plugins", reason="needs vLLM, without an engine")

LOOK = """
import importlib, json, os, sys, threading

MODULES = ("vllm.v1.engine.llm_engine", "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.engine.core_client",
           "vllm.v1.engine.output_processor", "vllm.v1.metrics.loggers", "vllm.v1.metrics.stats",
           "vllm.v1.core.sched.scheduler", "vllm.v1.core.kv_cache_manager", "vllm.v1.core.block_pool")
modules = [importlib.import_module(name) for name in MODULES]

def everything():
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type):
                found |= {(module.__name__, name, inner): id(method) for inner, method in vars(value).items()}
    return found

def changed(before, after):
    gone = {"__annotations__", "__abstractmethods__", "_abc_impl", "__doc__"}
    return sorted(map(str, (key for key in before.keys() | after.keys()
                            if before.get(key) != after.get(key) and key[-1] not in gone)))

def look(before):
    return {
        "loaded": sorted(name for name in sys.modules if name.partition(".")[0] in ("kvhook", "wrapt")),
        "changed": changed(before, everything()),
        "environment": sorted(k for k in os.environ if os.environ[k] != environment.get(k)),
        "threads": threading.active_count() - threads,
        "rings": os.path.isdir(os.environ["KVHOOK_DIR"]),
    }

environment, threads, before = dict(os.environ), threading.active_count(), everything()
from vllm.plugins import load_general_plugins
load_general_plugins()
first = look(before)
os.environ["KVHOOK"] = "1"
import kvhook.plugin
kvhook.plugin.load()
print(json.dumps([first, look(before)]))
"""


def test_vllm_is_the_very_same_and_two_small_modules_are_loaded(tmp_path: Path):
    plugin = make_known(tmp_path / "plugin")
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, plugin))),
            "KVHOOK_DIR": str(tmp_path / "rings"),
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installed, asked = json.loads(done.stdout.splitlines()[-1])
    nothing = {"changed": [], "environment": [], "threads": 0, "rings": False}
    assert installed == {"loaded": ["kvhook", "kvhook.plugin"], **nothing}
    # the same look sees what is done when it is asked for
    assert "kvhook.recording.installation" in asked["loaded"]
    assert any("LLMEngine" in name for name in asked["changed"])
    assert {"KVHOOK", "KVHOOK_CORE_PLAN"} <= set(asked["environment"])
