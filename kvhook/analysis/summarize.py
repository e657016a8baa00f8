"""Makes the summary of a run."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from kvhook.analysis.core_report import CoreReport, report
from kvhook.analysis.diagnosis.rules import diagnose
from kvhook.analysis.diagnosis.signs import signs_of
from kvhook.analysis.engine_events import event_totals
from kvhook.analysis.part import Part
from kvhook.analysis.summary import GroupRate, Summary
from kvhook.analysis.summed import numbers_of, ratio
from kvhook.analysis.totals import Totals
from kvhook.records.core import CoreRecords
from kvhook.records.replicas import counted
from kvhook.records.run import Run
from kvhook.records.tables import Records
from kvhook.schema import NAMES


def summarize(records: Records, engine: int | None = None, cores: CoreRecords | None = None) -> Summary:
    """Reduce a run to its summary: one pass over its records.

    Args:
        records: the run.
        engine: only this engine of it; all of them together otherwise.
        cores: what its engine cores recorded, see `summary_of`.
    """
    totals = add_up(records)
    assert totals is not None
    return summary_of(totals, records, engine, account_of(cores, records if engine is None else None))


def add_up(records: Records, *, warmup: bool = True) -> Totals | None:
    """The totals of a run, by one pass over its records; None if there is a warm-up in it, and it is not wanted."""
    totals = Totals()
    with np.errstate(all="ignore"):  # numbers out of a damaged file may be anything
        return totals if records.go_over(totals.take, warmup=warmup) else None


def account_of(cores: CoreRecords | None, run: Run | None = None) -> CoreReport | None:
    """The account of a run's engine cores; None without any.

    Args:
        cores: of the run.
        run: where only the cores of its engines count, and of replicas those of one.
    """
    if cores is not None and run is not None:
        cores = cores.of_engines(counted(run.engines.facts()))
    return report(cores, ledger=False) if cores is not None and len(cores) else None


def summary_of(totals: Totals, run: Run, engine: int | None = None, core: CoreReport | None = None) -> Summary:
    """The summary of a run that has been added up.

    Args:
        totals: of its records.
        run: what is known of it.
        engine: only this engine of it; all of them together otherwise.
        core: the account of the engine cores of what is meant: of this engine, or of all together.
    """
    columns = {kind: frozenset(c.name for c in run.columns(kind)) for kind in ("step", "request")}
    known = run.meta["engines"]
    wanted = counted(known) if engine is None else [engine]
    engines = [e for e in known if e["engine"] in wanted]
    part = Part(totals, engines, columns)
    with np.errstate(all="ignore"):
        summary = Summary(**numbers_of(totals, part, run.meta))
        by_label, by_lora_name = (group_rates(part, run, column) for column in NAMES)
        prompts = part.requests.prompt_groups.outline()
        events = event_totals(run.engine_events, engine, part.steps.span if summary.part else None)
        summary = dataclasses.replace(
            summary,
            replicas=len(known) - len(engines) if engine is None else 0,
            by_label=by_label,
            by_lora_name=by_lora_name,
            by_prompt=prompts,
            engine_events=events,
        )
        if core is not None and core.num_steps:
            peak = summary.kv_cache_usage_peak_in_step
            if peak is None and core.num_cores == 1:
                peak = core.usage_peak(engines)
            summary = dataclasses.replace(summary, core=core, kv_cache_usage_peak_in_step=peak)
        return dataclasses.replace(summary, findings=diagnose(signs_of(summary, part)))


def group_rates(part: Part, run: Run, column: str) -> list[GroupRate]:
    """The requests by their label or their adapter, those with the most prompt tokens first; none if none has one."""
    names, groups = run.names(column), dict[str, Counter[str]]()
    for code, counts in part.requests.groups[column].items():
        # traces side by side have codes of their own for the same name
        name = "" if code < 0 else names.get(code, str(code))
        groups.setdefault(name, Counter()).update(counts)
    if groups.keys() <= {""}:
        return []
    out = [
        GroupRate(
            name=name,
            requests=group["requests"],
            num_prompt_tokens=group["prompt"],
            num_cached_tokens=group["cached"] if group["tell"] else None,
            num_generation_tokens=group["generated"],
            hit_rate=ratio(group["cached"] if group["tell"] else None, group["asked"]),
        )
        for name, group in groups.items()
    ]
    return sorted(out, key=lambda rate: (-rate.num_prompt_tokens, rate.name))
