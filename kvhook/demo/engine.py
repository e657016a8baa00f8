"""Loading vLLM for the demo: quietly, with its messages kept for the case that something goes wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvhook.demo.workload import BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_GPU_BLOCKS
from kvhook.errors import KvhookError

#: Set unless the user has set them. The first four make a CPU engine start in seconds instead of a minute; the core
#: in this process saves another 15 s; nothing is fetched and nothing reported.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


def require_vllm() -> None:
    """Check that vLLM can be imported.

    Raises:
        KvhookError: it is not installed; says what to type.
    """
    if importlib.util.find_spec("vllm") is None:
        raise KvhookError(
            f"vLLM is not installed for {sys.executable}. In a clone of kvhook `make demo` installs its CPU build and "
            "runs this; on a GPU machine: pip install vllm, then kvhook demo"
        )


def load(model: Path) -> Any:
    """A ``vllm.LLM`` over a model, with the demo's small cache."""
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    return LLM(
        model=str(model),
        enforce_eager=True,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_GPU_BLOCKS,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=True,
        seed=0,
        use_tqdm_on_load=False,
    )


@contextlib.contextmanager
def messages_to(path: Path) -> Iterator[None]:
    """Send what vLLM, torch and their C++ parts write to standard error into a file meanwhile.

    Raises:
        KvhookError: what ran inside failed; the message has the last lines and names the file.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    except KvhookError:
        raise
    except Exception as error:
        raise KvhookError(f"vLLM failed: {type(error).__name__}: {error}\nIts messages are in {path}") from error
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that something is under way: a moving line on a terminal (with rich), one plain line elsewhere."""
    begin = time.monotonic()
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        fancy = False
    else:
        fancy = sys.stdout.isatty()
    if fancy:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=sys.__stdout__), transient=True) as bar:
            bar.add_task(what, total=None)
            yield
    else:
        print(f"{what} ...", flush=True)
        yield
    print(f"{what}: {time.monotonic() - begin:.1f} s", flush=True)
