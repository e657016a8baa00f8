"""vLLM's entry point into kvhook: ``vllm.general_plugins`` loads `load` in every process of vLLM's.

It acts only where the environment says so: with ``KVHOOK=1`` it installs kvhook, and in the process of an engine core
it carries out the plan that `kvhook.install` has left there.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # that of `typing` would be one more import in every process of vLLM's
if TYPE_CHECKING:
    from collections.abc import Callable


def load() -> None:
    """Called by vLLM. Where the environment asks for nothing, nothing happens and nothing is imported."""
    if "KVHOOK_CORE_PLAN" in os.environ:
        _contained(_arm_core, "the engine core is not recorded")
    if os.environ.get("KVHOOK"):
        _contained(_install, "nothing is recorded")


def _arm_core() -> None:
    from kvhook.core.plan import read_plan
    from kvhook.core.process import process

    plan = read_plan()
    if plan is not None and process.plan is None and plan.is_meant_for_this_process():
        process.arm(plan)


def _install() -> None:
    from kvhook.adapters.processes import serves_an_engine

    if not serves_an_engine(sys._getframe()):  # noqa: SLF001 (there is no public way to the caller)
        from kvhook.recording.unasked import install_if_asked

        install_if_asked()


def _contained(act: Callable[[], None], then: str) -> None:
    """An error of kvhook's must not reach vLLM."""
    try:
        act()
    except (KeyboardInterrupt, SystemExit):  # `kvhook.faults.USERS`, without importing it
        raise
    except BaseException as error:
        import logging

        from kvhook.errors import KvhookError

        log = logging.getLogger("kvhook")
        if isinstance(error, KvhookError):
            log.warning("kvhook: %s: %s", then, error)
        else:
            log.warning("kvhook: %s", then, exc_info=True)
