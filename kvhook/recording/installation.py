"""Which session is installed in this process: `install`, `uninstall`, `attach`."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

from kvhook import forks, hooks
from kvhook.errors import KvhookError, StatsOffError
from kvhook.options import HISTORY, RING_SLOTS, LabelOf, Options
from kvhook.recording.from_environment import completed, is_anonymous, make_absolute
from kvhook.recording.owner import lock
from kvhook.recording.session import Session
from kvhook.recording.subscription import EVERY, Callback, Subscription, check_arguments

log = logging.getLogger("kvhook")

_current: Session | None = None


def current_session() -> Session | None:
    """The session that is installed; None if there is none. It may be closed, or a parent process's."""
    return _current


def set_current_session(session: Session | None) -> None:
    """Take a session for the installed one, without patching anything. For benchmarks that switch between sessions."""
    global _current
    _current = session


def install(
    *,
    trace: str | os.PathLike[str] | None = None,
    history: int | str = HISTORY,
    ring_dir: str | os.PathLike[str] | None = None,
    ring_slots: int = RING_SLOTS,
    level: str = "full",
    max_overhead: float | None = None,
    core: str = "steps",
    labels: LabelOf = None,
    request_ids: str = "numbers",
    anonymous: bool = False,
) -> Session:
    """Record every vLLM engine that is made from now on.

    Call it before ``LLM(...)``; before or after ``import vllm`` does not matter, and vLLM need not even be
    installed. Installing twice is installing once: the second call returns the session that is there.

    Args:
        trace: stream the run to this ``.kvh`` file. Without it, the run is kept in a temporary file until the
            process ends.
        history: how much of the run is kept on disk without `trace`: bytes, or text such as ``"500MB"``. Beyond it
            the oldest part is dropped, and counted.
        ring_dir: directory of the ring, instead of shared memory; also ``KVHOOK_DIR``.
        ring_slots: records the ring holds, rounded up to a power of two. It is what other processes see live, and
            what is left after a crash.
        level: ``"full"``, or ``"light"``: the scheduler's stats and exact token counts of every step, without latencies
            and single requests (`Summary.not_recorded`). vLLM's front end then works as it does without kvhook.
        max_overhead: the most that kvhook may take, as a share of the time inside steps, 0.01 say, what vLLM takes to
            make stats for it included. When that is exceeded for long (three times 256 steps), kvhook steps down to
            level light, and then counts the outputs of every 4th, 16th, 64th step only; the trace says when and why.
        core: ``"steps"``: what the scheduler and the block pool do in each step is recorded inside the engine core, in
            this process or in one of its own (`Session.core_steps` and others). ``"blocks"``: also every event of every
            KV block (`Session.blocks`), in a file of its own, which takes more. ``"off"``: nothing is done there.
            ``session.cores().why_none`` says so where a vLLM's engine core cannot be recorded.
        labels: how a request's id tells its label: a separator (``"/"``: the label of ``"agent-7/12"`` is
            ``"agent-7"``), or a function that is given the id and returns a label, or None for none. Requests that get
            none by this have that of `kvhook.label`.
        request_ids: ``"numbers"``: an id that is a number of up to nine digits is recorded as it is, because ``LLM``
            counts its prompts so. Of any other id there is only a keyed digest, in `Session.core_requests`.
            ``"hashed"``: the column ``request_id`` is a keyed digest of every id (see `Session.request_key`). The key
            is made anew for each run, and is in no file.
        anonymous: leave out what could name somebody: the model's name or path, the program's name, absolute paths,
            the names of LoRA adapters, and labels that a separator finds in request ids (both are numbered instead);
            and ``request_ids="hashed"``. Labels and scopes that the program names itself stay.
            ``KVHOOK_ANONYMOUS=1`` does the same, also for programs that call ``install`` themselves.

    With ``KVHOOK=1`` in the environment, ``KVHOOK_TRACE``, ``KVHOOK_LEVEL``, ``KVHOOK_CORE``, ``KVHOOK_LABEL``
    stand for the arguments that are left out (`kvhook.recording.from_environment`).

    Raises:
        RingDirectoryError: there is no place for the ring; the message gives each place that was tried.
        KvhookError: an argument is not usable; the message says which and why.
    """
    global _current
    options = Options(
        trace=trace,
        history=history,
        ring_dir=ring_dir,
        ring_slots=ring_slots,
        level=level,
        max_overhead=max_overhead,
        core=core,
        labels=labels,
        request_ids=request_ids,
        anonymous=anonymous,
    )
    options.check()
    make_absolute()
    options = completed(options)
    with lock:
        if _current is not None and _current.is_closed:
            hooks.disarm()  # closed by hand: it records nothing any more
            _current = None
        session = _reusable_session()
        if session is None:
            session = _new_session(options)
        elif session.is_unused:
            # it came into this process with a fork; nothing has been recorded yet
            session.begin(options)
            if hooks.armed() and hooks.armed_level() != session.level:
                hooks.disarm()
        else:
            _warn_of_ignored(options, session)
        if not hooks.armed():
            _warn_if_slow()
            _warn_of_engines(session)
            hooks.arm(session, session.level)
            session.arm_core()
            session.by_logger = False
        return session


def for_logger() -> Session:
    """The session that a `kvhook.StatLogger` records into: the one that is there, or a new one that patches nothing."""
    with lock:
        session = _reusable_session()
        if session is None:
            session = _new_session(Options(anonymous=is_anonymous()))
            session.by_logger = True
        return session


def uninstall() -> None:
    """Take kvhook out of vLLM: the patched names are the very objects they were, the session is closed.

    Its data can still be read. Without a session, nothing happens.
    """
    global _current
    with lock:
        session, _current = _current, None
        if session is not None:
            session.stop_measuring()
        hooks.disarm()
        if session is not None:
            session.close()


def attach(llm: Any) -> Session:
    """Record an engine that exists already; installs kvhook if that has not happened.

    Args:
        llm: a ``vllm.LLM``, its ``llm_engine``, or an ``AsyncLLM``.

    Raises:
        StatsOffError: the engine was built with its stats off (``LLM``'s default).
        KvhookError: it is not a vLLM engine that this kvhook knows.
    """
    # LLM has its engine in `llm_engine`, V0's AsyncLLMEngine in `engine`; V1's AsyncLLM is one
    engine = getattr(llm, "llm_engine", getattr(llm, "engine", llm))
    if not hasattr(engine, "step") and not hasattr(engine, "add_request"):
        raise KvhookError(f"attach() takes a vllm.LLM or its llm_engine, not {type(llm).__name__}")
    if _current is not None and not _current.belongs_to_parent and hooks.is_recorded(engine):
        return _current
    if getattr(engine, "log_stats", None) is False:
        raise StatsOffError(
            "this engine makes no stats, and that cannot be changed any more: it was built with them off (the default "
            "of vllm.LLM), or kvhook turned them off again when it was uninstalled. Call kvhook.install() before "
            "LLM(...), or build the engine with LLM(..., disable_log_stats=False)"
        )
    session = install()
    if hooks.adapter_of(engine) is None:
        raise KvhookError("the engine's class is not from a vLLM that this kvhook knows, so it cannot be recorded")
    hooks.watch(engine, stats_were_on=True)
    session.attach_core(engine)
    return session


def on_step(callback: Callback, *, every: float = EVERY) -> Subscription:
    """Call a function with the engine's steps while it works, for those who send them elsewhere. Installs kvhook if
    that has not happened.

    The function is called on a thread of kvhook's own with a list of steps, oldest first, never in the engine's thread.
    Each step is a dictionary: the columns of `Session.steps`, with None for what is not known, ``engine``, and
    ``time``, the end of the step in seconds since 1970. If the function is too slow, the oldest records are dropped and
    counted: ``dropped`` of what is returned. An exception in it is logged once and counted in `Session.faults`, and it
    is called again. When the recording ends, it is called with what is left, and has 10 seconds for it. If it did not
    get all, a warning and `Session.health` say so.

    Args:
        callback: the function; not an ``async`` one, which nobody would await.
        every: seconds between two calls.

    Returns:
        The subscription: ``steps`` handed over and records ``dropped`` so far; ``close()`` ends it.

    Raises:
        KvhookError: an argument is not usable.
    """
    check_arguments(callback, every)  # before anything is installed
    return install().on_step(callback, every=every)


def _reusable_session() -> Session | None:
    """The installed session, if engines can still be recorded into it."""
    session = _current
    return session if session is not None and not session.is_closed and not session.belongs_to_parent else None


def _new_session(options: Options) -> Session:
    global _current
    _current = Session(options, on_exit=_uninstall_if_current)
    atexit.register(_current.end)
    return _current


def _uninstall_if_current(session: Session) -> None:
    if _current is session:
        uninstall()


def _warn_of_ignored(options: Options, session: Session) -> None:
    """Say which arguments of a second `install` have no effect."""
    ignored: dict[str, Any] = {}
    if options.trace is not None and options.trace_path != session.options.trace_path:
        ignored["trace"] = str(options.trace)
    if options.level not in ("full", session.level):
        ignored["level"] = options.level
    if options.core not in ("steps", session.options.core):
        ignored["core"] = options.core
    if options.labels not in (None, session.options.labels):
        ignored["labels"] = options.labels
    for name in ("request_ids", "anonymous"):
        if getattr(options, name) not in (getattr(Options, name), getattr(session.options, name)):
            ignored[name] = getattr(options, name)
    if options.max_overhead not in (None, session.options.max_overhead):
        ignored["max_overhead"] = options.max_overhead
    for name, value in ignored.items():
        log.warning("kvhook is installed already; %s=%r has no effect. kvhook.uninstall() first.", name, value)


def _warn_if_slow() -> None:
    import wrapt

    if wrapt.FunctionWrapper.__module__ == "wrapt.wrappers":
        log.warning(
            "kvhook: wrapt runs without its C extension here, which makes each step some 2 us dearer. "
            "pip install --force-reinstall wrapt brings it back"
        )


def _warn_of_engines(session: Session) -> None:
    """Say so if engines exist already: they were made before `install`, and are not recorded."""
    kinds = hooks.note_engines_before()
    session.unrecorded_engines = len(kinds)
    if kinds:
        log.warning(
            "kvhook: %s already (%s), not recorded: call kvhook.install() before LLM(...), or kvhook.attach(llm)",
            "an engine exists" if len(kinds) == 1 else f"{len(kinds)} engines exist",
            ", ".join(sorted({type(each).__name__ for each in kinds})),
        )


def _in_child() -> None:
    """This process was forked off. Whoever holds the session can go on using it, for engines that are made here."""
    # threading does the same with its own locks: another thread of the parent may have held it
    lock._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001
    if _current is not None and not _current.is_closed:
        _current.begin_in_child()


forks.call_in_child(_in_child)
