"""The methods of vLLM's engines that change what steps do afterwards: sleep, new weights, an emptied cache, adapters.

They lie off the step path, and most of them wait for the workers anyway. Of their arguments only levels, tags, modes
and the names of LoRA adapters are told.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """What a method does: the kind of event (`kvhook.records.engine_events.KINDS`), the arguments that are told, and
    whether False as its result means that it did nothing. That of ``wake_up`` means that some tags still sleep."""

    kind: str
    told: tuple[str, ...] = ()
    refuses: bool = False


#: Method of ``LLMEngine`` or ``AsyncLLM`` -> the event, by their names in all releases. What a release lacks is left
#: out.
METHODS: Mapping[str, Method] = {
    "sleep": Method("sleep", ("level",)),
    "release_kv_cache_memory": Method("sleep"),
    "wake_up": Method("wake_up", ("tags",)),
    "pause_generation": Method("pause", ("mode",)),
    "resume_generation": Method("resume"),
    "update_weights": Method("weights_updated"),
    "apply_model": Method("model_function"),
    "reset_prefix_cache": Method("prefix_cache_reset", refuses=True),
    "reset_mm_cache": Method("mm_cache_reset"),
    "reset_encoder_cache": Method("encoder_cache_reset"),
    "add_lora": Method("lora_added", ("lora_request",), refuses=True),
    "remove_lora": Method("lora_removed", ("lora_id",), refuses=True),
    "pin_lora": Method("lora_pinned", ("lora_id",), refuses=True),
}
#: The method that calls another one in every worker, and its argument that names it.
ANY, NAMED_BY = "collective_rpc", "method"
#: What such a method is called if it brings new weights. vLLM has ``update_weights`` and ``reload_weights``; trainers
#: add their own to the worker, as TRL does with ``update_named_param``.
_WEIGHTS = re.compile(r"(update|load|reload|sync|set|receive|broadcast|copy).*(weight|param)", re.IGNORECASE)
#: The longest text that is taken of one argument.
_LONGEST = 80


class Told(NamedTuple):
    """What is told of a call: the kind of event, details of it as text, and whether its result may be a refusal."""

    kind: str
    detail: str = ""
    refuses: bool = False


def describe(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Told | None:
    """Look at a call that is about to be made; None if it is no event.

    Args:
        function: the method, bound.
        name: its name: a key of `METHODS`, or `ANY`.
        args: what it is called with.
        kwargs: the same by name.
    """
    if name == ANY:
        return _of_workers(kwargs.get(NAMED_BY, args[0] if args else None))
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
    except (TypeError, ValueError):  # vLLM itself will say what is wrong
        return None
    method = METHODS[name]
    details = (_text(argument, arguments.get(argument)) for argument in method.told)
    return Told(method.kind, ", ".join(filter(None, details)), method.refuses)


def _of_workers(called: Any) -> Told | None:
    called = getattr(called, "func", called)  # a functools.partial
    name = called if isinstance(called, str) else getattr(called, "__name__", "")
    if not isinstance(name, str):
        return None
    if name in METHODS:
        return Told(METHODS[name].kind, "called in the workers")
    return Told("weights_updated", name[:_LONGEST]) if _WEIGHTS.search(name) else None


def _text(argument: str, value: Any) -> str:
    """An argument in words; "" if there is nothing to say."""
    if argument == "lora_request":
        value = getattr(value, "lora_name", None)
        return str(value)[:_LONGEST] if isinstance(value, str) else ""
    if isinstance(value, (list, tuple)):
        value = " ".join(str(one) for one in value if isinstance(one, str))
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        return ""
    return f"{argument} {str(value)[:_LONGEST]}"
