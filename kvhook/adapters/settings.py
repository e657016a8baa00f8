"""vLLM's settings as its stats module sees them while kvhook is installed."""

from __future__ import annotations

from typing import Any

from kvhook.adapters.v1 import SETTINGS


class Settings:
    """In place of ``vllm.envs`` in vLLM's stats module: the same, with what is asked for each output kept as a value.

    os.environ is looked up and parsed each time otherwise, for each output of each step: most of what making
    IterationStats takes (`benchmarks/hook_cost.py`). The values are read when an engine has been built; changing the
    environment later has no effect on them, as in the engine core, where vLLM itself keeps all its settings so.
    """

    def __init__(self, envs: Any) -> None:
        self._envs = envs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def forget(self) -> None:
        """Keep no value any more: each is looked up when it is asked for, as without kvhook."""
        for name in SETTINGS:
            vars(self).pop(name, None)

    def read(self) -> None:
        """Take over the values of now."""
        self.forget()
        for name in SETTINGS:
            if hasattr(self._envs, name):
                setattr(self, name, getattr(self._envs, name))
