"""An engine for the checks: started quietly, recorded, and gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.adapters.table import read_path
from kvhook.demo import engine as demo
from kvhook.ring.directory import remove_path

if TYPE_CHECKING:
    from kvhook.recording.session import Session

#: Everything that is to be compared is switched on.
COMPARED = {"disable_log_stats": False, "enable_prefix_caching": True}
#: Of the tiny model's engine.
TINY: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "max_model_len": 1024,
    "seed": 0,
    "use_tqdm_on_load": False,
}


@contextlib.contextmanager
def recorded_engine(model: str | None) -> Iterator[tuple[Any, Session]]:
    """A ``vllm.LLM`` and the session that records it; afterwards the process is as it was, but that vLLM is loaded.

    A session that is there already is used, and left there. Of a session of our own the rings are removed as well.
    vLLM takes down with an engine what others in the process need: those that were made before can run no more.

    Args:
        model: a model of the user's, with vLLM's defaults; None for the tiny one.

    Raises:
        KvhookError: vLLM is not installed, or kvhook cannot record here.
        Exception: whatever vLLM raises if it cannot load the model.
    """
    import kvhook
    from kvhook.recording.installation import current_session

    demo.require_vllm()
    with _environment(model):
        before = current_session()
        session = kvhook.install()
        rings = len(session.rings)
        llm = None
        try:
            llm = _make(model)
            yield llm, session
        finally:
            made = session.rings[rings:]
            if llm is not None:
                _shut_down(llm)
            del llm
            gc.collect()
            if before is None:
                kvhook.uninstall()
                for ring in made:
                    remove_path(ring)


def _make(model: str | None) -> Any:
    from vllm import LLM

    if model is not None:
        return LLM(model=model, **COMPARED)
    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    return LLM(model=str(make_tiny_model(tiny_model_dir())), **TINY, **COMPARED)


def _shut_down(llm: Any) -> None:
    """End the engine's processes now rather than when it is garbage-collected. Its metrics are taken out of the
    process's Prometheus registry, where a collector would find them for ever."""
    core = read_path(llm, "llm_engine.engine_core")
    shutdown = getattr(core, "shutdown", None)
    if callable(shutdown):
        with contextlib.suppress(Exception):  # the engine ends anyway, and the results matter more
            shutdown()
    unregister = getattr(sys.modules.get("vllm.v1.metrics.prometheus"), "unregister_vllm_metrics", None)
    if callable(unregister):
        with contextlib.suppress(Exception):
            unregister()


@contextlib.contextmanager
def _environment(model: str | None) -> Iterator[None]:
    """vLLM's environment for a quick and quiet start, where the user has not set it."""
    quick = demo.ENVIRONMENT if model is None else {"VLLM_LOGGING_LEVEL": demo.ENVIRONMENT["VLLM_LOGGING_LEVEL"]}
    ours = [name for name in quick if name not in os.environ]
    os.environ.update({name: quick[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append to a file what this process and its children write meanwhile.

    vLLM's log goes to standard output, warnings and the messages of its C++ parts to standard error.
    """
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    saved = []
    try:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            saved.append((stream, number, os.dup(number)))
            os.dup2(log, number)
        yield
    finally:
        os.close(log)
        for stream, number, before in saved:
            stream.flush()
            os.dup2(before, number)
            os.close(before)
