"""The tables of a report as HTML. Every text that comes from a trace is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from kvhook.analysis.compare import side_by_side
from kvhook.analysis.diagnosis.finding import INFERRED
from kvhook.analysis.settings import settings_of
from kvhook.records.engine_events import KINDS, EngineEvent
from kvhook.records.events import Scope
from kvhook.report.runs import Run
from kvhook.text.compare import cell
from kvhook.text.numbers import percent, seconds


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first cell of a row is its head."""
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def wide(*tables: str) -> str:
    """Tables side by side, as far as there is room."""
    return f"<div class=wide>{''.join(tables)}</div>"


def facts(runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> str:
    """Names and values: of one run in columns like a newspaper's, of several as tables."""
    if len(runs) == 1:
        cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
        return f"<dl class=facts>{cells}</dl>"
    heads = ["", *(run.name for run in runs)]
    half = (len(rows) + 1) // 2
    return wide(table(heads, rows[:half]), table(heads, rows[half:]))


def numbers(runs: Sequence[Run]) -> str:
    """The numbers of the summary, a column for each run."""
    rows = [
        (row.label, *(cell(row, value) for value in row.values))
        for row in side_by_side([run.summary for run in runs])
        if any(value is not None and cell(row, value) != "-" for value in row.values)
    ]
    return facts(runs, rows)


def diagnosis(runs: Sequence[Run]) -> str:
    """What each run suffers from: the evidence, and what acts on it."""
    return "".join((f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "") + _findings(run) for run in runs)


def _findings(run: Run) -> str:
    if not run.summary.findings:
        return "<p>Nothing was found that holds this run back.</p>"
    found = ""
    for finding in run.summary.findings:
        inferred = " <em>Inferred: the engine core was not recorded.</em>" if finding.basis == INFERRED else ""
        evidence = table(["number", "value"], [(name, f"{value:,.6g}") for name, value in finding.evidence.items()])
        found += (
            f"<li><p>{escape(finding.text)}{inferred}</p><p>\N{RIGHTWARDS ARROW} {escape(finding.setting)}</p>"
            f"<details><summary>evidence for {escape(finding.name)}</summary>{evidence}</details></li>"
        )
    return f"<ol class=findings>{found}</ol>"


def summaries(runs: Sequence[Run]) -> str:
    """The summaries as they are printed, folded away."""
    from kvhook.text.summary import as_text

    return "".join(
        f"<details><summary>kvhook summary {escape(run.name)}</summary>"
        f"<pre>{escape(as_text(run.summary))}</pre></details>"
        for run in runs
    )


def settings(runs: Sequence[Run]) -> str:
    """The engines' settings; those that differ between runs are marked."""
    found = [settings_of([*run.meta["engines"], *run.core_facts]) for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    if not names:
        return "<p class=absent>The traces do not hold the engines' settings.</p>"
    rows = []
    for name in names:
        values = [_values(name, one.get(name, ())) for one in found]
        mark = " ≠" if len({value for value in values if value}) > 1 else ""
        rows.append((name + mark, *(value or "not known" for value in values)))
    return facts(runs, rows)


def _values(name: str, values: Iterable[Any]) -> str:
    # of a path the last part says enough, and the rest is nobody's business
    return ", ".join(
        str(v).rstrip("/").rsplit("/", 1)[-1] if name == "model" and str(v)[:1] in "/.~" else str(v) for v in values
    )


def prefixes(run: Run) -> str:
    """The prefixes that requests share, those first that save most."""
    if run.core is None:
        return absent(run, run.why_no_core)
    if run.why_no_ledger:
        return absent(run, run.why_no_ledger)
    if run.core.blocks is None:
        return absent(run, 'blocks were not recorded one by one: kvhook.install(core="blocks") does')
    if not run.core.blocks.shared_prefixes:
        return absent(run, "no two requests share a whole block")
    rows = [
        (f"{p.digest:016x}", f"{p.num_tokens:,}", f"{p.num_requests:,}", f"{p.num_tokens * (p.num_requests - 1):,}")
        for p in run.core.blocks.shared_prefixes
    ]
    heads = ["digest", "tokens", "requests", "tokens that need not be computed again"]
    return f"<h4>{escape(run.name)}</h4>{wide(table(heads, rows))}"


def misses(run: Run) -> str:
    """Why look-ups found no more."""
    from kvhook.text.core_report import miss_text

    if run.core is None or not run.core.misses:
        return ""
    rows = [(miss_text(why), f"{m.lookups:,}", f"{m.tokens:,}") for why, m in run.core.misses.items()]
    return f"<h4>{escape(run.name)}: why look-ups found no more</h4>{wide(table(['', 'look-ups', 'tokens'], rows))}"


#: Scopes, and engine events, that are listed of each run.
_SCOPES = _EVENTS = 100


def scopes(runs: Sequence[Run]) -> str:
    """The parts of the runs that have names: the user's scopes, and calls such as ``LLM.generate``."""
    found = []
    for run in runs:
        if not run.scopes:
            found.append(absent(run, "no scopes, and no calls of LLM's methods, were recorded"))
            continue
        heads = ["", "began", "took", "prompts", "warm-up", "sampling parameters"]
        more = f" (the first {_SCOPES} of {len(run.scopes):,})" if len(run.scopes) > _SCOPES else ""
        rows = [_scope(run, scope) for scope in run.scopes[:_SCOPES]]
        found.append(f"<h4>{escape(run.name)}{more}</h4>{wide(table(heads, rows))}")
    return "".join(found)


def _scope(run: Run, scope: Scope) -> Sequence[str]:
    took = seconds((scope.ended_ns - scope.began_ns) / 1e9) if scope.ended_ns >= 0 else "has not ended"
    prompts = f"{scope.num_prompts:,}" if scope.num_prompts >= 0 else ""
    began = f"{scope.began_ns / 1e9 - run.begin:.3f} s"
    return scope.path or scope.name, began, took, prompts, "yes" if scope.warmup else "", scope.params


def engine_events(runs: Sequence[Run]) -> str:
    """What was done to the engines between their steps."""
    heads = ["", "began", "took", "engines", "calls", "outcome"]
    found = []
    for run in runs:
        if not run.engine_events:
            continue
        events = run.engine_events[:_EVENTS]
        more = f" (the first {_EVENTS} of {len(run.engine_events):,})" if len(run.engine_events) > _EVENTS else ""
        rows = [_event(run, event) for event in events]
        found.append(f"<h4>{escape(run.name)}{more}</h4>{wide(table(heads, rows))}")
    return "".join(found) or "<p class=absent>Nothing: no sleep, no new weights, no cache that was reset.</p>"


def _event(run: Run, event: EngineEvent) -> Sequence[str]:
    what = f"{KINDS.get(event.kind, event.kind)}{f' ({event.detail})' if event.detail else ''}"
    took = seconds(event.took) if event.took is not None else "has not ended"
    engines = ", ".join(map(str, event.engines)) or "all"
    return what, f"{event.began_ns / 1e9 - run.begin:.3f} s", took, engines, f"{event.calls:,}", event.outcome


def cost(runs: Sequence[Run]) -> str:
    """What kvhook itself took, and what it lost."""
    heads = ["", "per step, p50", "per step, p99", "share of the time in steps", "records lost", "dropped"]
    rows = []
    for run in runs:
        s = run.summary
        p50, p99 = ("not measured" if ns is None else _own_time(ns) for ns in (s.kvhook_ns_p50, s.kvhook_ns_p99))
        share = percent(s.kvhook_share, 3)
        rows.append((run.name, p50, p99, share, f"{s.records_lost:,}", f"{s.records_dropped:,}"))
    faults = "".join(
        absent(run, f"{where} failed: {error}") for run in runs for where, error in run.summary.faults.items()
    )
    return wide(table(heads, rows)) + faults


def _own_time(ns: float) -> str:
    return f"{ns / 1e3:.1f} µs" if ns < 1e6 else f"{ns / 1e6:.2f} ms"


def absent(run: Run, why: str) -> str:
    """Why a run has nothing here."""
    return f"<p class=absent><b>{escape(run.name)}</b>: {escape(why)}</p>"
