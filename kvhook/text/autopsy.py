"""An `Autopsy` as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvhook.analysis.autopsy import LIMITED_BY, Autopsy, Change
from kvhook.text.core_report import LIMITS
from kvhook.text.numbers import percent, seconds
from kvhook.text.steps import StepLines
from kvhook.text.summary import as_text as summary_text

_ENDS = {
    "killed": "The process ended without closing its ring: it was killed (kill -9, out of memory), crashed, or left "
    "by os._exit.",
    "closed": "The ring was closed cleanly: the engine was deleted, kvhook uninstalled, or the program ended.",
    "alive": "The process still runs; this is how it is now.",
}


def as_text(a: Autopsy, lines: StepLines) -> str:
    """How it ended, what changed before, who was still there, the last steps as a table, the summary.

    Args:
        a: the autopsy.
        lines: formats the steps.
    """
    return "\n".join(_lines(a, lines))


def _lines(a: Autopsy, lines: StepLines) -> Iterator[str]:
    yield _ENDS.get(a.ended, a.ended)
    yield ""
    yield "What changed before the end"
    if a.changes:
        yield from (f"  {sentence}" for sentence in sentences(a.changes))
    elif a.summary.steps:
        yield "  nothing: the last steps were like those before"
    else:
        yield "  no step is left"
    yield ""
    yield "Requests"
    if a.still_running is None:
        yield "  how many were running or waiting at the end is not known"
    else:
        yield f"  {a.still_running:,} running and {a.still_waiting or 0:,} waiting after the last step"
    yield from (f"  finished: {_request(r)}" for r in a.last_requests)
    if not a.last_requests:
        yield "  none finished, as far as the ring reaches back"
    yield ""
    yield f"The last {len(a.last_steps)} steps" if a.last_steps else "No steps"
    if a.last_steps:
        yield lines.heading()
        yield from map(lines.line, a.last_steps)
    yield ""
    yield "What is left of the run"
    yield summary_text(a.summary)


def sentences(changes: Sequence[Change]) -> list[str]:
    """The changes in words, a sentence each. What there is to say about step times is one sentence."""
    out: list[str] = []
    for i, change in enumerate(changes):
        text = _WORDS["limited by" if change.what.startswith(LIMITED_BY) else change.what](change)
        if change.what == "longest step" and i and changes[i - 1].what in ("slower", "faster"):
            out[-1] += f"; {text}"
        else:
            out.append(text)
    return out


def _times(c: Change) -> str:
    return f"a median of {seconds(c.last)} over the last {c.steps}, {seconds(c.before)} before"


def _usage(c: Change) -> str:
    verb = "rose" if c.last > c.before else "fell"
    return f"KV cache usage {verb} from a median of {percent(c.before)} to {percent(c.last)} in the last step"


def _queue(verb: str) -> Callable[[Change], str]:
    return lambda c: (
        f"the queue {verb}: {c.last:,.0f} requests waited in the last step, a median of {c.before:,.0f} before"
    )


_WORDS: dict[str, Callable[[Change], str]] = {
    "slower": lambda c: f"steps became slower: {_times(c)} ({c.last / c.before:.1f} times)",
    "faster": lambda c: f"steps became faster: {_times(c)}",
    "longest step": lambda c: (
        f"one of the last {c.steps} steps took {seconds(c.last)}, {c.last / c.before:.0f} times the median"
    ),
    "usage": _usage,
    "full": lambda c: (
        f"the KV cache was full: {percent(c.last)} in the last step, a median of {percent(c.before)} before"
    ),
    "queue grew": _queue("grew"),
    "queue shrank": _queue("shrank"),
    "preemptions": lambda c: (
        f"{c.last:,.0f} preemptions in the last {c.steps} steps, {c.before:,.0f} in the {c.steps_before:,} before"
    ),
    "computed again": lambda c: (
        f"{percent(c.last)} of the tokens that the engine core scheduled in the last {c.steps} steps had been computed "
        f"before, {percent(c.before)} until then"
    ),
    "evictions": lambda c: (
        f"{c.last:,.0f} cached blocks evicted in the last {c.steps} steps of the engine core, {c.before:,.0f} in the "
        f"{c.steps_before:,} before"
    ),
    "limited by": lambda c: (
        f"in {percent(c.last)} of the last {c.steps} steps of the engine core batches did not grow: "
        f"{LIMITS.get(c.what.removeprefix(LIMITED_BY), c.what)} ({percent(c.before)} before)"
    ),
    "no stats": lambda c: f"{c.last:.0f} of the last {c.steps} steps brought no stats",
}


def _request(row: dict[str, Any]) -> str:
    name = row.get("request_id")
    number = f"request {name}" if name is not None and name >= 0 else f"the {_ordinal(row.get('request'))} to finish"
    tokens = f"{_count(row.get('num_prompt_tokens'))} + {_count(row.get('num_generation_tokens'))} tokens"
    took = row.get("e2e_latency")
    return f"{number} in step {_count(row.get('step'))}, {row.get('finish_reason') or 'reason not known'}, {tokens}" + (
        f", after {seconds(took)}" if took is not None else ""
    )


def _ordinal(n: int | None) -> str:
    return "one" if n is None else f"{n + 1}."


def _count(n: int | None) -> str:
    return "?" if n is None else str(n)
