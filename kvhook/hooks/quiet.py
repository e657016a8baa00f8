"""Engines whose user left vLLM's stats off: kvhook gets their stats, and vLLM's own loggers are not made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from kvhook.adapters.step_functions import Record


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
    for part in _parts_with_stats(engine):
        part.log_stats = False
    if holder:
        setattr(engine, holder, None)


@contextlib.contextmanager
def stats_as_they_are(engine: Any) -> Iterator[None]:
    """Leave an engine's front-end stats as they are, whatever is done to them meanwhile."""
    before = [(part, part.log_stats) for part in _parts_with_stats(engine)]
    yield
    for part, was in before:
        part.log_stats = was


def _parts_with_stats(engine: Any) -> list[Any]:
    """An engine and those of its parts that make stats if their ``log_stats`` says so."""
    processor = getattr(engine, "output_processor", None)
    parts = (engine, processor, getattr(processor, "lora_states", None))
    return [part for part in parts if hasattr(part, "log_stats")]
