"""From a recorded run to what other caches would have done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.whatif.recorded import NotKnown, recorded_requests, rules_of, why_estimated
from kvhook.whatif.report import Run, WhatIf, check_again, prefill_speed, what_if
from kvhook.whatif.requests import BlockRequests, join


def run_of(cores: CoreRecords, name: str = "") -> tuple[BlockRequests, Run]:
    """The requests of a recorded run, and what else is known of it.

    Raises:
        NotKnown: the run does not tell; the message says why.
    """
    requests = recorded_requests(cores)
    facts, steps = cores.facts[0], cores.steps()
    return requests, Run(
        blocks=int(facts.get("num_kv_blocks") or 0),
        bytes_per_block=facts.get("bytes_per_block"),
        rules=rules_of(facts),
        prefill_tokens_per_second=prefill_speed(steps),
        num_preemptions=len(cores.preemptions()),
        num_recomputed_tokens=int(steps["num_recomputed_tokens"].sum()),
        why_estimated=tuple(why_estimated(cores, requests)),
        name=name,
    )


def with_names(requests: BlockRequests, cores: CoreRecords, labels_of: Callable[[Table], Table]) -> BlockRequests:
    """The requests with the name of the recording they are of, and the label that each was given.

    Args:
        requests: of these cores.
        cores: the engine cores of a run.
        labels_of: gives the labels of requests of an engine core.
    """
    names: dict[str, list[Any]] = {"session": [None] * len(requests), "label": [None] * len(requests)}
    for core, facts in enumerate(cores.facts):
        lives = cores.requests(core)
        label_of = dict(zip(lives["request"].tolist(), labels_of(lives)["label"].tolist(), strict=True))
        for place in (requests.core == core).nonzero()[0].tolist():
            names["session"][place] = facts.get("session")
            names["label"][place] = label_of.get(int(requests.arrival[place])) or None
    return replace(requests, names={name: values for name, values in names.items() if any(values)})


def with_block_size(requests: BlockRequests, run: Run, block_size: int) -> tuple[BlockRequests, Run]:
    """The same run with longer blocks, and so many fewer of them that they take the same memory.

    Raises:
        NotKnown: the run does not tell.
    """
    if block_size == requests.block_size:
        return requests, run
    checked = check_again(requests, run)
    try:
        longer = requests.with_block_size(block_size)
    except ValueError as error:
        raise NotKnown(str(error)) from None
    times = block_size // requests.block_size
    return replace(longer, found=longer.found * 0 - 1), replace(
        checked,
        blocks=run.blocks // times,
        bytes_per_block=run.bytes_per_block * times if run.bytes_per_block else None,
        num_preemptions=0,
        num_recomputed_tokens=0,
    )


def several(runs: Sequence[tuple[BlockRequests, Run, int]], name: str) -> tuple[BlockRequests, Run]:
    """Several runs as one, to spread their requests over engines.

    Args:
        runs: requests, run and what to add to its times to have all on one clock.
        name: of all together.

    Raises:
        NotKnown: their blocks are of different sizes.
    """
    if len(runs) == 1:
        return runs[0][:2]
    try:
        together = join([(requests, shift) for requests, _, shift in runs])
    except ValueError as error:
        raise NotKnown(str(error)) from None
    first = runs[0][1]
    reasons = dict.fromkeys(reason for _, run, _ in runs for reason in run.why_estimated)
    sizes = {run.blocks for _, run, _ in runs}
    if len(sizes) > 1:
        reasons["the runs had caches of different sizes"] = None
    return together, replace(
        first,
        blocks=max(sizes),
        num_preemptions=sum(run.num_preemptions for _, run, _ in runs),
        num_recomputed_tokens=sum(run.num_recomputed_tokens for _, run, _ in runs),
        why_estimated=tuple(reasons),
        name=name,
    )


def what_if_of(cores: CoreRecords, name: str = "", **options: Any) -> WhatIf:
    """`kvhook.whatif.report.what_if` of a recorded run.

    Args:
        cores: its engine cores, recorded with ``core="blocks"``.
        name: of the trace.
        options: of `kvhook.whatif.report.what_if`.

    Raises:
        NotKnown: the run does not tell; the message says why.
    """
    requests, run = run_of(cores, name)
    return what_if(requests, run, **options)
