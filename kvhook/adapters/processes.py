"""vLLM's own processes: in which of them somebody makes an engine, and in which vLLM only works for one."""

from __future__ import annotations

from types import FrameType

#: Modules that load vLLM's plug-ins in a process where nobody makes an engine: the engine core's own process, its
#: workers, and the program that vLLM starts to look at a model's class.
_WITHOUT_FRONT_END = frozenset(
    {
        "vllm.v1.engine.core",
        "vllm.v1.worker.worker_base",
        "vllm.worker.worker_base",
        "vllm.model_executor.models.registry",
    }
)


def serves_an_engine(frame: FrameType | None) -> bool:
    """Whether this is a process that only works for an engine which another process makes.

    Args:
        frame: the function that loads the plug-ins, or one that it has called.
    """
    while frame is not None:
        spec = frame.f_globals.get("__spec__")  # a module that is run with -m is called __main__
        if getattr(spec, "name", frame.f_globals.get("__name__")) in _WITHOUT_FRONT_END:
            return True
        frame = frame.f_back
    return False


#: What a process of an engine core's own runs, in every release that has one.
_CORE_LOOP = ("vllm.v1.engine.core", "run_engine_core")


def is_of_a_core(frame: FrameType | None) -> bool:
    """Whether this is a process of an engine core's own, rather than one in which somebody makes an engine.

    Args:
        frame: a function that the core's making has called.
    """
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _CORE_LOOP:
            return True
        frame = frame.f_back
    return False
