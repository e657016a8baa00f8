"""An `Autopsy` as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvhook.analysis.autopsy import Autopsy
from kvhook.text.steps import StepLines
from kvhook.text.summary import as_text as summary_text
from kvhook.text.summary import seconds

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
        yield from (f"  {sentence}" for sentence in a.changes)
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
