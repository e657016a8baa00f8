"""vLLM's entry point into kvhook: ``vllm.general_plugins`` loads `load` in every process of vLLM's.

It acts only where `kvhook.install` has said so in the environment: in a process that is spawned for an engine core.
"""

from __future__ import annotations

import os


def load() -> None:
    """Called by vLLM. Without a plan in the environment nothing happens and nothing is imported."""
    if "KVHOOK_CORE_PLAN" not in os.environ:
        return
    try:
        from kvhook.core.plan import read_plan
        from kvhook.core.process import process

        plan = read_plan()
        if plan is not None and process.plan is None and plan.is_meant_for_this_process():
            process.arm(plan)
    except Exception:
        import logging

        logging.getLogger("kvhook").warning("kvhook: the engine core is not recorded", exc_info=True)
