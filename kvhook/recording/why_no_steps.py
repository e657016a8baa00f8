"""What to tell a user who sees no steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kvhook import hooks
from kvhook.adapters.fit import lacking
from kvhook.discovery.children import files_of_children

BEFORE = "the engine was made before kvhook.install(): make it afterwards, or call kvhook.attach(llm)"
NOT_BUILT = (
    "there is an engine ({}) that kvhook did not see being built: its class does not call the __init__ of vLLM's. It "
    "is not recorded"
)
NOT_FITTING = "there is an engine ({}) of a vLLM that kvhook cannot record: {}. kvhook doctor says more"
NOT_SEEN = (
    "{} requests were added to an engine, but neither its step() nor the outputs of its core were seen: a framework "
    "drives it in a way that kvhook does not know"
)


def why_no_file(name: str, error: str, counts: Iterable[Mapping[str, int]]) -> str:
    """What to tell of steps that were recorded, where no file could be made for them.

    Args:
        name: of the file.
        error: why.
        counts: per engine, the spool's counts of records.
    """
    lost = sum(each["records_overrun"] + each["records_unwritten"] for each in counts)
    return (
        f"{name} could not be written ({error}): {lost:,} records are lost but for the last ones, which the ring "
        "holds: kvhook.open(session.rings[0])"
    )


def why_no_steps(unrecorded: int, ring_dir: Path, trace: Path | None) -> str:
    """The most likely reason.

    Args:
        unrecorded: engines that existed before kvhook was installed.
        ring_dir: where this process has its rings, and its children theirs.
        trace: the trace file that was asked for, if one was.
    """
    found = not_recorded()
    if found:
        return found
    if hooks.engines_seen():
        return "an engine is being recorded: call llm.generate(...)"
    if unrecorded:
        return BEFORE
    children = files_of_children(ring_dir, trace)
    if children:
        return (
            f"no engine was made in this process; {len(children)} of its child processes recorded engines: "
            f"kvhook ls, or kvhook.open({str(children[0])!r})"
        )
    return "no engine has been made in this process since kvhook.install()"


def not_recorded() -> str:
    """Why an engine that was made or used since kvhook was installed is not recorded; "" if there is none."""
    if hooks.requests_seen():
        return NOT_SEEN.format(hooks.requests_seen())
    if hooks.engines_seen():
        return ""
    if hooks.unknown_engines():
        return f"an engine was made that kvhook does not know ({', '.join(hooks.unknown_engines())})"
    known = (hooks.existed_before, hooks.failed_to_build, hooks.was_recorded)
    alive = [e for e in hooks.engines_alive() if not any(is_so(e) for is_so in known)]
    names = ", ".join(sorted({type(e).__qualname__ for e in alive}))
    for engine in alive:
        missing = lacking(engine)
        if missing:
            return NOT_FITTING.format(names, "; ".join(missing))
    return NOT_BUILT.format(names) if alive else ""
