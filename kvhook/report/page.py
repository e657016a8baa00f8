"""A report: one HTML file that holds its data, its script and its style, and asks no network for anything."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from kvhook.report import groups, other_caches, tables
from kvhook.report.blob import Blob, codes
from kvhook.report.charts import PARTS, Chart, why_empty
from kvhook.report.lines import Line, window_steps
from kvhook.report.requests import Shown
from kvhook.report.runs import Run

#: Columns of the requests that are drawn: times in seconds from the run's beginning, and numbers.
_TIMES = ("arrived", "scheduled", "first_token", "ended")
_NUMBERS = (
    "engine",
    "request",
    "request_id",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_generation_tokens",
    "num_preemptions",
    "first_step",
    "last_step",
)
#: So many engine events of a run are marked in the charts.
_MOST_MARKS = 1000
#: The page may load nothing: neither a script, nor a picture, nor data.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


class Section(NamedTuple):
    """A section of the page.

    Args:
        id: its anchor.
        title: its heading.
        html: what stands in it.
        charts: the charts below that.
    """

    id: str
    title: str
    html: str
    charts: Sequence[Chart] = ()


def sections(runs: Sequence[Run]) -> list[Section]:
    """The page's sections in order. A new one is added here."""
    html: dict[str, Callable[[], str]] = {
        "prefix": lambda: (
            "".join(tables.misses(run) for run in runs)
            + "<h3>Prefixes that requests share</h3>"
            + "".join(tables.prefixes(run) for run in runs)
        ),
    }
    charts = [Section(part.id, part.title, html.get(part.id, str)(), part.charts) for part in PARTS]
    return [
        Section("summary", "Summary", tables.numbers(runs) + tables.summaries(runs)),
        Section("diagnosis", "Diagnosis", tables.diagnosis(runs)),
        *charts,
        Section("other-caches", "Other caches", other_caches.section(runs)),
        Section("requests", "Requests", ""),
        Section("groups", "Hit rates by label, adapter and prompt", groups.section(runs)),
        Section("scopes", "Scopes and calls", tables.scopes(runs)),
        Section("events", "What was done to the engines", tables.engine_events(runs)),
        Section("settings", "Settings of the engines", tables.settings(runs)),
        Section("kvhook", "What kvhook cost", tables.cost(runs)),
    ]


def page(runs: Sequence[Run], version: str) -> str:
    """The report of one run, or of several laid over each other.

    Args:
        runs: at least one.
        version: kvhook's.
    """
    blob = Blob()
    parts = sections(runs)
    model = {
        "version": version,
        "runs": [_run(run, blob) for run in runs],
        "charts": [_chart(chart, runs) for part in parts for chart in part.charts],
    }
    body = "".join(_section(part) for part in parts)
    names = ", ".join(run.name for run in runs)
    replaced = {
        "POLICY": _POLICY,
        "TITLE": escape(f"kvhook: {names}"),
        "NAMES": escape(names),
        "SUBTITLE": escape(_subtitle(runs)),
        "LINKS": "".join(f'<a href="#{part.id}">{escape(part.title)}</a>' for part in parts),
        "BODY": body,
        "VERSION": escape(version),
        "STYLE": asset("uPlot.min.css") + asset("report.css"),
        "MODEL": _json(model),
        "DATA": blob.text(),
        "LIBRARY": asset("uPlot.iife.min.js"),
        "SCRIPT": "".join(asset(name) for name in SCRIPTS),
    }
    pieces = asset("page.html").split("@@")
    return "".join(replaced[piece] if i % 2 else piece for i, piece in enumerate(pieces))


#: The page's own scripts, in order.
SCRIPTS = (
    "data.js",
    "view.js",
    "look.js",
    "sampled.js",
    "timecharts.js",
    "othercharts.js",
    "requests.js",
    "report.js",
)


def asset(name: str) -> str:
    """A file of the package."""
    return (importlib.resources.files("kvhook.report") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _subtitle(runs: Sequence[Run]) -> str:
    models = dict.fromkeys(_model(run) for run in runs)
    steps = " and ".join(f"{run.summary.steps:,}" for run in runs)
    return f"{', '.join(models)} · {steps} steps"


def _model(run: Run) -> str:
    model = run.summary.model or "no model named"
    # of a path the last part says enough
    return f"vLLM {run.summary.vllm or '?'}, {model.rsplit('/', 1)[-1] if model[0] in '/.~' else model}"


def _section(part: Section) -> str:
    charts = "".join(f'<div class=chart id="chart-{chart.id}"></div>' for chart in part.charts)
    more = '<div id="timeline"></div>' if part.id == "requests" else ""
    return f'<section id="{part.id}"><h2>{escape(part.title)}</h2>{charts}{more}{part.html}</section>'


def _chart(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    plain = chart._asdict() | {"series": list(chart.series.items())}
    if chart.id == "hit-rate":
        windows = dict.fromkeys(window_steps(run.summary.steps) for run in runs)
        plain["explain"] = f"“Last steps” are the last {' or '.join(f'{n:,}' for n in windows)}."
    return plain | {"empty": [why_empty(run, chart) for run in runs]}


def _run(run: Run, blob: Blob) -> dict[str, Any]:
    begin = run.begin
    anchor = int(run.meta["realtime_ns"] or 0) - int(run.meta["monotonic_ns"] or 0)
    return {
        "name": run.name,
        # milliseconds since 1970 at second 0; null if not known
        "wall": (begin * 1e9 + anchor) / 1e6 if run.meta["realtime_ns"] else None,
        "engines": len([line for line in run.lines if line.source == "steps"]),
        "lines": [_line(line, begin, blob) for line in run.lines],
        "shares": {
            key: [blob.add(share.bounds, "f8"), blob.add(share.shares, "f4")] for key, share in run.shares.items()
        },
        "requests": _requests(run.requests, begin, blob),
        "marks": [[e.began_ns / 1e9 - begin, e.text] for e in run.engine_events[:_MOST_MARKS]],
    }


def _line(line: Line, begin: float, blob: Blob) -> dict[str, Any]:
    curves = {}
    for name, curve in line.curves.items():
        parts = (curve.mean, *(part for part in (curve.low, curve.high) if part is not None))
        curves[name] = [blob.add(part, "f4") for part in parts]
    return {
        "number": line.number,
        "source": line.source,
        "size": line.size,
        "steps": line.steps,
        "first": line.first_step,
        "begin": blob.add(line.begin - begin, "f8"),
        "end": blob.add(line.end - begin, "f8"),
        "curves": curves,
    }


def _requests(shown: Shown, begin: float, blob: Blob) -> dict[str, Any]:
    rows, spans = shown.timeline.requests, shown.timeline.preempted
    numbers, names = codes(rows["finish_reason"].tolist())
    return {
        "count": shown.number,
        "core": shown.timeline.from_core,
        "reasons": names,
        "reason": blob.add(numbers, "i4"),
        **{name: blob.add(rows[name] - begin, "f8") for name in _TIMES},
        **{name: blob.add(np.clip(rows[name], -1, 2**31 - 1), "i4") for name in _NUMBERS},
        "preempted_time": blob.add(rows["preempted_time"], "f8"),
        "spans": [
            blob.add(spans["row"], "i4"),
            blob.add(spans["begin"] - begin, "f8"),
            blob.add(spans["end"] - begin, "f8"),
        ],
    }
