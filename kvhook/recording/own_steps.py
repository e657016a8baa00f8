"""Engines that are not driven by vLLM's own ``step``: what is written down about them, and said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kvhook import hooks
from kvhook.facts import ANONYMOUS
from kvhook.recording.recorder import Recorder

log = logging.getLogger("kvhook")

WITHOUT_TIMES = (
    "this {} is not driven by vLLM's own LLMEngine.step, but by {}. Its steps are recorded as its stats come, without "
    "step times"
)
COUNTED = "no iteration stats are made there: tokens are counted from the engine core's outputs, as at level light"
TURNED_OFF = (
    "the stats of its front end were turned off, or their logger taken away, after it was made: tokens are counted "
    "from the engine core's outputs, as at level light"
)
_LOOP = "a loop that takes the outputs from the engine core itself"
NOT_COUNTED = "outputs of this {} came that nobody counted: the numbers of tokens of this run are not known"


class OwnSteps:
    """What is known of such engines.

    Args:
        write: writes the facts about an engine, given by its number, into its file again.
    """

    def __init__(self, write: Callable[[int], None]) -> None:
        self._write = write
        #: numbers of the engines of which it was said
        self._said: set[int] = set()

    def without_times(self, engine: Any, recorder: Recorder, more: str = "") -> None:
        """Stats came for which there was no step."""
        if engine is None or recorder.number in self._said:
            return
        self._said.add(recorder.number)
        driver = driver_of(engine)
        if recorder.meta.get(ANONYMOUS) and not driver.startswith(("vllm.", _LOOP)):
            driver = "a function of the user's"
        text = WITHOUT_TIMES.format(recorder.meta["engine_class"], driver)
        recorder.meta["steps_without_times"] = text
        self._write(recorder.number)
        log.warning("kvhook: %s%s", text, f"; {more}" if more else "")

    def counted(self, engine: Any, recorder: Recorder, step: int, stepped: bool) -> None:
        """From this step on its outputs are counted. `stepped`: vLLM's own step drives it."""
        why = TURNED_OFF if stepped else COUNTED
        change = {"step": step, "level": "light", "every": 1, "why": why}
        before = recorder.meta["levels"] if step else []
        recorder.meta["levels"] = [*before, change]
        if stepped:
            log.warning("kvhook: %s: %s", recorder.meta["engine_class"], why)
        else:
            self.without_times(engine, recorder, why)
        self._write(recorder.number)

    def not_counted(self, recorder: Recorder) -> None:
        """Outputs came that nobody counted."""
        if not recorder.meta.get("tokens_not_counted"):
            recorder.meta["tokens_not_counted"] = True
            self._write(recorder.number)
            log.warning("kvhook: %s", NOT_COUNTED.format(recorder.meta["engine_class"]))


def driver_of(engine: Any) -> str:
    """What drives an engine, as far as its class tells."""
    step = getattr(type(engine), "step", None)
    if step is None or hooks.is_vllms_step(step):
        return _LOOP
    return f"{getattr(step, '__module__', '?')}.{getattr(step, '__qualname__', 'step')}"
