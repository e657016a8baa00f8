"""What the examples share: an engine that runs anywhere, out of the box, and where the trace goes."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvhook.demo.engine import ENVIRONMENT, require_vllm

#: Of the tiny model's engine: blocks of 32 tokens.
TINY = {"enforce_eager": True, "dtype": "bfloat16", "block_size": 32, "max_model_len": 1024}


def arguments(what: str, trace: str) -> argparse.Namespace:
    """The command line of an example; sets vLLM's environment, so it comes before the first import of vLLM."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--model", help="a model of your own, with vLLM's defaults (without it: a tiny random Llama)")
    parser.add_argument("--out", type=Path, default=Path(trace), metavar="FILE.kvh", help="the trace that is written")
    args = parser.parse_args()
    require_vllm()
    tiny_only = ENVIRONMENT if args.model is None else {"VLLM_LOGGING_LEVEL": ENVIRONMENT["VLLM_LOGGING_LEVEL"]}
    for name, value in tiny_only.items():
        os.environ.setdefault(name, value)
    return args


def make_llm(args: argparse.Namespace, **options: Any) -> Any:
    """A ``vllm.LLM`` with these options."""
    from vllm import LLM

    if args.model is not None:
        options.pop("num_gpu_blocks_override", None)
        return LLM(model=args.model, **options)
    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    with _quiet():
        return LLM(model=str(make_tiny_model(tiny_model_dir())), seed=0, use_tqdm_on_load=False, **TINY, **options)


def sampling(max_tokens: int) -> Any:
    """Greedy, and always so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def encode(llm: Any, texts: list[str]) -> list[dict[str, list[int]]]:
    """Texts as prompts of token ids, so that what is sent can be computed with."""
    tokenizer = llm.get_tokenizer()
    return [{"prompt_token_ids": tokenizer.encode(text)} for text in texts]


def percent(share: float | None) -> str:
    """A share as text."""
    return "none" if share is None else f"{100 * share:.1f} %"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages of vLLM's C++ parts while the tiny model is loaded."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
