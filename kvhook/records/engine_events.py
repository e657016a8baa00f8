"""What was done to an engine between its steps: put to sleep, given new weights, its prefix cache emptied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvhook.facts import printable

#: Kind of event -> what happened, in words. A kind's code in a ring's header is its place here, counted from 1, so that
#: new kinds are added at the end.
KINDS: dict[str, str] = {
    "sleep": "put to sleep",
    "wake_up": "woken up",
    "pause": "generation paused",
    "resume": "generation resumed",
    "weights_updated": "weights updated",
    "model_function": "function applied to the model",
    "prefix_cache_reset": "prefix cache reset",
    "mm_cache_reset": "multi-modal cache reset",
    "encoder_cache_reset": "encoder cache reset",
    "lora_added": "LoRA adapter loaded",
    "lora_removed": "LoRA adapter removed",
    "lora_pinned": "LoRA adapter pinned",
    "lora_first_used": "LoRA adapter used for the first time",
}
#: Kinds that are brought by many calls: trainers hand over new weights one tensor after the other.
IN_PIECES = frozenset({"weights_updated"})
CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}
#: What begins a rest of the engine -> what it is called; and what ends one.
RESTS = {"sleep": "asleep", "pause": "paused"}
ENDS_REST = frozenset({"wake_up", "resume"})

#: Outcomes: vLLM has done it; it has returned False, which is how it says that it has not.
DONE, REFUSED = "done", "refused"
_MOST = 1 << 62


def kind_of(code: int) -> str:
    """The kind of event that has this code in a ring's header; "" if this kvhook knows none."""
    return list(KINDS)[code - 1] if 0 < code <= len(KINDS) else ""


class EngineEvent(NamedTuple):
    """Something that was done to an engine by a call, such as ``LLM.sleep`` or ``reset_prefix_cache``.

    Attributes:
        number: of the event in its run, from 0, in the order in which they began.
        kind: ``"sleep"``, ``"wake_up"``, ``"pause"``, ``"resume"``, ``"weights_updated"``, ``"model_function"``
            (``apply_model``), ``"prefix_cache_reset"``, ``"mm_cache_reset"``, ``"encoder_cache_reset"``,
            ``"lora_added"``, ``"lora_removed"``, ``"lora_pinned"``, ``"lora_first_used"`` (by a request).
        engines: the numbers of the engines it was done to; empty for all of the process.
        began_ns: when the call began, monotonic clock.
        ended_ns: when it ended; -1 if it has not, or if the process was killed in it.
        detail: more about it, such as ``"level 1"``, ``"tags weights"`` or the name of the LoRA adapter.
        outcome: ``"done"``; ``"refused"`` if vLLM returned False, as ``reset_prefix_cache`` does while requests hold
            blocks; or the name of the exception that it raised. Empty while it goes on.
        calls: of how many calls in a row it is made, where no step came between them.
        began_unix_ns, ended_unix_ns: the same moments since 1970, in nanoseconds; -1 where it has not ended.
    """

    number: int
    kind: str
    engines: tuple[int, ...] = ()
    began_ns: int = 0
    ended_ns: int = -1
    detail: str = ""
    outcome: str = ""
    calls: int = 1
    began_unix_ns: int = -1
    ended_unix_ns: int = -1

    @property
    def text(self) -> str:
        """What happened, in words."""
        more = f" in {self.calls:,} calls" if self.calls > 1 else ""
        what = f"{KINDS.get(self.kind, self.kind)}{f' ({self.detail})' if self.detail else ''}{more}"
        if self.outcome in (DONE, ""):
            return what
        return f"{what}: {'vLLM refused' if self.outcome == REFUSED else self.outcome}"

    @property
    def took(self) -> float | None:
        """Seconds; None if it has not ended."""
        return (self.ended_ns - self.began_ns) / 1e9 if self.ended_ns >= 0 else None

    def __str__(self) -> str:
        return f"{self.text}, {'has not ended' if self.took is None else f'{self.took:.3f} s'}"


def as_cells(event: EngineEvent) -> list[Any]:
    """An event as a file holds it."""
    e = event
    return [
        "engine_event",
        *(e.number, e.kind, list(e.engines), e.began_ns, e.ended_ns, e.detail, e.outcome, e.calls),
    ]


def from_cells(cells: Sequence[Any]) -> EngineEvent | None:
    """The event that a file holds; None if it is none."""
    number, kind, engines, began, ended, detail, outcome, calls = cells
    numbers = (number, began, ended, calls, *engines)
    if not all(type(n) is int and abs(n) < _MOST for n in numbers) or number < 0:
        return None
    if not all(isinstance(text, str) for text in (kind, detail, outcome)):
        return None
    kind, detail, outcome = map(printable, (kind, detail, outcome))
    return EngineEvent(number, kind, tuple(engines), began, ended, detail, outcome, calls)


def from_meta(raw: Any) -> list[EngineEvent]:
    """The events of ``meta["engine_events"]``, as an export holds them; what is none is left out."""
    out = []
    for cells in raw if isinstance(raw, list) else ():
        try:
            event = from_cells([cells[name] for name in EngineEvent._fields[:8]])
        except (TypeError, KeyError, ValueError):
            continue
        if event is not None:
            out.append(event)
    return out
