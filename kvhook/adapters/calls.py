"""The methods of vLLM's ``LLM`` that run an engine, and what is told of a call: how many prompts, with which settings.

Only numbers are taken from the arguments, and never a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: The module that ``LLM`` is in, its name there, and where it has its engine.
MODULE, CLASS, ENGINE = "vllm.entrypoints.llm", "LLM", "llm_engine"

#: Method -> the arguments that may hold its prompts, by their names in all releases. What a release lacks is left out.
METHODS: Mapping[str, tuple[str, ...]] = {
    "generate": ("prompts", "prompt_token_ids"),
    "chat": ("messages",),
    "beam_search": ("prompts",),
    "encode": ("prompts", "prompt_token_ids"),
    "embed": ("prompts",),
    "classify": ("prompts",),
    "reward": ("prompts",),
    "score": ("data_2", "text_2"),
    "wait_for_completion": (),
}

#: Arguments that may hold settings, and the settings of them that are told where they are not vLLM's default.
_SETTINGS_IN = ("sampling_params", "params", "pooling_params")
_SETTINGS = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "beam_width"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "logprobs", "prompt_logprobs"),
)


class Call(NamedTuple):
    """What is told of a call: the method, how many prompts (-1: not known), and an outline of its settings."""

    method: str
    num_prompts: int = -1
    params: str = ""


def describe_call(function: Callable[..., Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Look at the arguments of a call that is about to be made.

    Args:
        function: the method, bound.
        method: its name, a key of `METHODS`.
        args: what it is called with.
        kwargs: the same by name.
    """
    try:
        arguments = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    except TypeError:  # vLLM itself will say what is wrong
        return Call(method)
    arguments = arguments | arguments.get("kwargs", {})
    prompts = next((a for name in METHODS[method] if (a := arguments.get(name)) is not None), None)
    settings = next((a for name in _SETTINGS_IN if (a := arguments.get(name)) is not None), None)
    return Call(method, _count(prompts, method), _outline(settings))


def _count(prompts: Any, method: str) -> int:
    """How many prompts there are: a text, a dictionary and a list of token ids are one; so is a list of messages."""
    if prompts is None:
        return -1
    if isinstance(prompts, (str, bytes, dict)):
        return 1
    try:
        count, first = len(prompts), next(iter(prompts), None)
    except TypeError:
        return -1
    one = isinstance(first, int) or (method == "chat" and not isinstance(first, (list, tuple)))
    return 1 if one and count else count


def _outline(settings: Any) -> str:
    several = isinstance(settings, (list, tuple))
    first = settings[0] if several and settings else settings
    if first is None or (several and not settings):
        return ""
    default = _default_of(type(first))
    told = []
    for name in _SETTINGS:
        value = getattr(first, name, None)
        if type(value) in (int, float, bool) and value != getattr(default, name, None):
            told.append(f"{name}={value}")
    more = f" (the first of {len(settings)})" if several and len(settings) > 1 else ""
    return f"{', '.join(told)}{more}"


def _default_of(kind: type) -> Any:
    try:
        return kind()
    except Exception:  # some need an argument
        return None
