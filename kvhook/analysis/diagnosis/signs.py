"""What the rules of a diagnosis look at: numbers of a run that say why it is as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvhook.analysis.core_report import CoreReport
from kvhook.analysis.core_signs import CoreSigns

if TYPE_CHECKING:
    from kvhook.analysis.part import Part
    from kvhook.analysis.summary import Summary


@dataclasses.dataclass(frozen=True)
class Signs:
    """A run as the rules see it. None for what is not known."""

    summary: Summary
    max_num_seqs: int | None
    chunked_prefill: bool | None
    #: steps that brought the scheduler's stats
    known_steps: int
    full_and_waiting: int
    waiting_with_room: Mapping[int, int]
    #: inter-token latencies in steps with first tokens, and in the others: how many, and their sum
    itl_beside_prefill: tuple[int, float]
    itl_alone: tuple[int, float]
    #: second and later samples of prompts, and their prompt tokens
    samples: int
    sample_tokens: int
    #: the engine cores' own account, and what of it shows diseases; None where nothing was recorded
    report: CoreReport | None
    core: CoreSigns | None

    @property
    def account(self) -> CoreReport:
        """The engine cores' account, where there is one."""
        assert self.report is not None
        return self.report


def signs_of(summary: Summary, part: Part) -> Signs:
    """Gather the signs of a run.

    Args:
        summary: of the run.
        part: its totals.
    """
    steps, requests = part.steps, part.requests
    return Signs(
        summary=summary,
        max_num_seqs=_fact(part, "max_num_seqs"),
        chunked_prefill=_fact(part, "enable_chunked_prefill"),
        known_steps=steps.known,
        full_and_waiting=steps.full_and_waiting,
        waiting_with_room=steps.waiting_with_room,
        itl_beside_prefill=(int(steps.itl_beside_prefill[0]), steps.itl_beside_prefill[1]),
        itl_alone=(int(steps.itl_alone[0]), steps.itl_alone[1]),
        samples=requests.samples if part.has_request("sample_index") else 0,
        sample_tokens=requests.sample_tokens if part.has_request("sample_index") else 0,
        report=summary.core,
        core=summary.core.signs if summary.core is not None else None,
    )


def _fact(part: Part, name: str) -> Any:
    values = {engine.get(name) for engine in part.engines}
    return values.pop() if len(values) == 1 else None
