"""Engines whose user left vLLM's stats off: kvhook gets their stats, and vLLM's own loggers are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvhook.adapters.step_functions import Record
from kvhook.adapters.table import Adapter


def do_nothing(*_: Any, **__: Any) -> None:
    """Does nothing, whatever it is given."""
    return None


class QuietManager:
    """Marks the loggers and managers that `quiet_manager` makes."""

    stat_loggers: list[Any]

    def hand_over_to(self, record: Record) -> None:
        """Let the engine's stats go to `record` from now on, without another Python call in between."""
        self.stat_loggers = [OnlyLogger(record)]
        self.record = record


class OnlyLogger:
    """A stat logger that records. Every other method that a manager may call does nothing."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return do_nothing


def quiet_manager(logger_class: Any) -> Any:
    """A logger or manager that does nothing. It is an instance of vLLM's class, for code that checks its type."""
    silent = {name: do_nothing for name in dir(logger_class) if not name.startswith("_")}
    made: Any = object.__new__(type("KvhookStatLoggerManager", (QuietManager, logger_class), silent))
    made.engine_indexes = [0]
    made.hand_over_to(do_nothing)
    return made


def make_no_stats(engine: Any, holder: str) -> None:
    """Turn an engine's front-end stats off again: kvhook had turned them on, and its user wanted none."""
    processor = getattr(engine, "output_processor", None)
    parts: tuple[Any, ...] = (engine, processor, getattr(processor, "lora_states", None))
    for part in parts:
        if hasattr(part, "log_stats"):
            part.log_stats = False
    if holder:
        setattr(engine, holder, None)


def is_quiet(engine: Any, adapter: Adapter) -> bool:
    """Whether kvhook has made an engine's loggers, because its user left vLLM's stats off."""
    return bool(adapter.holder) and isinstance(getattr(engine, adapter.holder, None), QuietManager)
