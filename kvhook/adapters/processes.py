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


#: The module by which a front end makes an engine core in its own process, in every release of V1.
_CLIENTS = "vllm.v1.engine.core_client"
#: Where a process of `multiprocessing` begins. One that was forked has what its parent was doing below it.
_BEGINNING = ("multiprocessing.process", "_bootstrap")


def is_of_a_core(frame: FrameType | None) -> bool:
    """Whether an engine core is made in a process that is there for it, rather than by a front end in the same process.

    Args:
        frame: a function that the core's making has called.
    """
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == _CLIENTS:
            return False
        if (module, frame.f_code.co_name) == _BEGINNING:
            return True
        frame = frame.f_back
    return True
