"""Which adapter fits the vLLM that is loaded: every target of its tables is looked at, and nothing is changed."""

from __future__ import annotations

import inspect
import sys

from kvhook.adapters import BY_LEVEL
from kvhook.adapters.table import Adapter, Target, has_field, lookup, release, vllm_version


def choose(engine: str, level: str = "full") -> tuple[Adapter, tuple[Target, ...], list[str]]:
    """The first adapter for this engine class that fits, and its targets; or the one of this vLLM's era, and what it
    lacks."""
    answers = [(a, *resolve(a)) for a in BY_LEVEL[level] if a.engine == engine]
    fitting = next((answer for answer in answers if not answer[2]), None)
    return fitting or next((answer for answer in reversed(answers) if not _too_old(answer[0])), answers[0])


def adapter_for(engine: str) -> Adapter:
    """The adapter that fits the loaded vLLM for an engine class, patched or not.

    Raises:
        LookupError: there is none; the message says what is missing.
    """
    adapter, _, missing = choose(engine)
    if missing:
        raise LookupError("; ".join(missing))
    return adapter


def lacking(engine: object) -> list[str]:
    """What this vLLM lacks for recording an engine, in words; nothing if its class is none of vLLM's."""
    for name, trigger in {a.engine: a.trigger for a in BY_LEVEL["full"]}.items():
        if any(c.__module__ == trigger and c.__qualname__ == name.partition(":")[2] for c in type(engine).__mro__):
            return choose(name)[2]
    return []


def resolve(adapter: Adapter) -> tuple[tuple[Target, ...], list[str]]:
    """Which targets of an adapter the loaded vLLM has; and why it cannot be used, in words, if it cannot."""
    found, missing = [], []
    if _too_old(adapter):
        missing.append(f"the {adapter.name} engine is of a vLLM before {adapter.until}")
    needed = [s.path for s in adapter.sources if s.argument and not s.optional]
    for target in (*adapter.targets, *(Target("", path) for path in needed)):
        try:
            check(target)
            found.append(target)
        except LookupError as error:
            if target.required:
                missing.append(str(error))
    return tuple(found), missing


def _too_old(adapter: Adapter) -> bool:
    return bool(adapter.until) and release(vllm_version()) >= release(adapter.until)


def check(target: Target) -> None:
    """LookupError if a target is not what the adapter says."""
    what = lookup(target.path)
    if target.field and not has_field(lookup(target.field[0]), target.field[1]):
        raise LookupError(f"{target.field[0]} has no {target.field[1]}")
    if target.takes:
        parameters = inspect.signature(what).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        lacking = [name for name in target.takes if name not in parameters]
        if lacking:
            raise LookupError(f"{target.path} takes no {', '.join(lacking)}")


def is_there(adapter: Adapter) -> bool:
    """Whether the adapter's module is loaded, and its engine is the module's own: not another family's under an old
    name, as ``vllm.engine.llm_engine.LLMEngine`` is V1's from 0.11 and under VLLM_USE_V1=1."""
    if adapter.trigger not in sys.modules:
        return False
    try:
        return bool(lookup(adapter.engine).__module__ == adapter.trigger)
    except (LookupError, AttributeError):
        return not adapter.shares_engine_name
