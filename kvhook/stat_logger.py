"""`kvhook.StatLogger`, for those who want no name of vLLM patched: a stat logger to be handed to vLLM::

    engine = AsyncLLM.from_engine_args(args, stat_loggers=[kvhook.StatLogger])
    ...
    print(kvhook.StatLogger.session().summary())

Or as a plug-in, in the package metadata of a project of one's own, for every engine of the environment::

    [project.entry-points."vllm.stat_logger_plugins"]
    kvhook = "kvhook.stat_logger:StatLogger"

In an `LLMEngine`, behind ``LLM``, it records what vLLM hands to its loggers, without step times; a warning says what
`kvhook.install` has beyond that.

vLLM asks for a subclass of its own `StatLoggerBase`, so the class is made, and vLLM imported, when it is first used.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

from kvhook import hooks
from kvhook.adapters.columns import FINISHED_HOOK, SEES_REQUESTS
from kvhook.adapters.fit import adapter_for
from kvhook.adapters.step_functions import Record, StepFunctions
from kvhook.adapters.v1 import ASYNC_LLM, LOGGERS, V1
from kvhook.errors import KvhookError
from kvhook.hooks.quiet import do_nothing
from kvhook.recording.installation import for_logger

if TYPE_CHECKING:
    from kvhook.recording.session import Session

    StatLogger: Any


log = logging.getLogger("kvhook")

NO_TIMES = "kvhook.StatLogger sees no step of an LLMEngine; with kvhook.install() before it is made they are timed"
IN_LLM_ENGINE = (
    "kvhook.StatLogger is in an LLMEngine, where it records only what vLLM hands to its loggers: no step times, "
    "nothing of requests before they finish, nothing of steps that vLLM keeps from its loggers. kvhook.install() "
    "before the engine is made records all of that, without this logger"
)


class _Logger:
    """What `StatLogger` has beyond vLLM's own base class.

    Under `kvhook.install` the engine is recorded by its hooks already; a logger that is made then does nothing.
    """

    #: the arguments of vLLM's ``record``, in its order
    order: tuple[str, ...] = ()

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.vllm_config = vllm_config
        self.engine_index = engine_index
        self._record: Record | None = None
        if not hooks.being_built():
            session = for_logger()
            self.made_in = _made_in()
            alive = weakref.ref(self)
            self._record = hooks.EventLoopRecorder(lambda rank: _open(session, alive(), rank), session.fault).record
            weakref.finalize(self, session.close_engine, id(self)).atexit = False

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM with the stats of each step."""
        if self._record is not None:
            given = {**dict(zip(self.order, args, strict=False)), **kwargs}
            self._record(**{**given, "engine_idx": self.engine_index})

    @staticmethod
    def session() -> Session:
        """The session that is recorded into: its `steps`, `summary`, `dump`..."""
        return for_logger()


def _open(session: Session, logger: _Logger | None, rank: int) -> StepFunctions | None:
    """The functions of the step path, when the first stats come: only then does vLLM know the number of KV blocks."""
    if logger is None:
        return None
    facts: dict[str, Any] = {"stats_on": True, "timed_steps": False, "engine_index": rank}
    facts |= {FINISHED_HOOK: False, SEES_REQUESTS: False}
    engine = logger.made_in
    if engine == V1.engine:
        facts["steps_without_times"] = NO_TIMES
        log.warning("kvhook: %s", IN_LLM_ENGINE)
    return session.open_engine(logger, adapter_for(engine), facts)


def _made_in() -> str:
    """The engine whose ``__init__`` makes the logger at this moment: LLMEngine, or else AsyncLLM."""
    at: FrameType | None = sys._getframe(1)  # noqa: SLF001 (there is no public way to the callers)
    while at is not None:
        if at.f_globals.get("__name__") == V1.trigger:
            return V1.engine
        at = at.f_back
    return ASYNC_LLM.engine


def _make() -> type:
    try:
        base: Any = importlib.import_module(LOGGERS).StatLoggerBase
    except (ImportError, AttributeError) as error:
        raise KvhookError(f"kvhook.StatLogger needs vLLM 0.8.5 or newer with its V1 engine: {error}") from None
    # vLLM asks its loggers for more and more; what is not `record` is not for us
    names: dict[str, Any] = {n: do_nothing for n in getattr(base, "__abstractmethods__", ()) if not hasattr(_Logger, n)}
    names |= {"__doc__": _Logger.__doc__, "__module__": __name__, "__qualname__": "StatLogger"}
    names["order"] = tuple(inspect.signature(base.record).parameters)[1:]
    made: type = type(base)("StatLogger", (_Logger, base), names)
    return made


def __getattr__(name: str) -> Any:
    if name != "StatLogger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _make()
    return made
