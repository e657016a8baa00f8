"""Which charts a report has: the one table of them. The page's script draws whatever stands here."""

from __future__ import annotations

from typing import NamedTuple

from kvhook.core_schema import LIMITS
from kvhook.report.runs import MADE_OF, Run
from kvhook.text.core_report import LIMITS as LIMIT_TEXTS

#: Kinds: lines over time of all runs together; a stack over time, a chart for each run; a distribution; a point for
#: each request.
LINES, STACK, SHARES, POINTS = "lines", "stack", "shares", "points"


class Chart(NamedTuple):
    """One chart.

    Args:
        id: its name in the page.
        title: what it shows.
        kind: see above.
        unit: "share", "count" or "s".
        source: "steps" or "core": whose steps.
        series: curve -> its name in the legend; the first is the lowest of a stack.
        explain: what to know to read it.
        log: whether the vertical axis is logarithmic.
        dots: whether single values are marked, since not every step has one.
    """

    id: str
    title: str
    kind: str
    unit: str
    source: str
    series: dict[str, str]
    explain: str = ""
    log: bool = False
    dots: bool = False


class Part(NamedTuple):
    """A part of the page that holds charts."""

    id: str
    title: str
    charts: tuple[Chart, ...]


PARTS: tuple[Part, ...] = (
    Part(
        "cache",
        "KV cache",
        (
            Chart(
                "usage",
                "KV cache in use",
                LINES,
                "share",
                "steps",
                {"kv_cache_usage": "at the end of a step", "kv_cache_usage_peak": "when the step had been scheduled"},
            ),
            Chart(
                "blocks",
                "What the KV blocks hold",
                STACK,
                "share",
                "core",
                {"used": "used by requests", "cached": "cached, used by nobody", "empty": "empty"},
                "When a step had been scheduled. Cached blocks can be found again until they are needed.",
            ),
            Chart(
                "evictions",
                "Cached blocks given up",
                LINES,
                "count",
                "core",
                {"num_kv_blocks_evicted": "blocks evicted in a step"},
            ),
        ),
    ),
    Part(
        "batch",
        "Requests and tokens in each step",
        (
            Chart(
                "queue",
                "Requests in the engine",
                LINES,
                "count",
                "steps",
                {
                    "num_running_reqs": "running",
                    "num_waiting_reqs": "waiting",
                    "num_preempted_reqs": "preempted in the step",
                },
            ),
            Chart(
                "tokens",
                "Tokens computed in a step",
                STACK,
                "count",
                "core",
                {
                    "num_decode_tokens": "decode",
                    "num_prefill_tokens": "prefill, for the first time",
                    "num_recomputed_tokens": "computed again after a preemption",
                    "num_spec_tokens": "speculative",
                },
            ),
            Chart(
                "prompt-tokens",
                "Prompt and generated tokens of a step",
                LINES,
                "count",
                "steps",
                {
                    "num_prompt_tokens_computed": "prompt tokens computed",
                    "num_prompt_tokens_cached": "prompt tokens from the prefix cache",
                    "num_generation_tokens": "tokens generated",
                },
                "Prompt tokens count in the step in which their prefill was completed.",
            ),
            Chart(
                "limits",
                "What kept a step from scheduling more",
                STACK,
                "share",
                "core",
                {f"limit_{name}": LIMIT_TEXTS[name] for name in LIMITS},
                "Share of the steps.",
            ),
        ),
    ),
    Part(
        "prefix",
        "Prefix cache",
        (
            Chart(
                "hit-rate",
                "Hit rate",
                LINES,
                "share",
                "steps",
                {
                    "hit_rate_window": "last steps",
                    "hit_rate_so_far": "since the start",
                    "preempted_hit_rate_so_far": "re-admitted requests, since the start",
                    "connector_hit_rate_window": "KV connector, last steps",
                    "connector_hit_rate_so_far": "KV connector, since the start",
                },
            ),
        ),
    ),
    Part(
        "time",
        "Times",
        (
            Chart("step-time", "Time of a step", LINES, "s", "steps", {"step_time": "step time"}, "", log=True),
            Chart(
                "ttft",
                "Time to first token",
                LINES,
                "s",
                "steps",
                {"ttft": "time to first token"},
                "",
                log=True,
                dots=True,
            ),
            Chart("itl", "Inter-token latency", LINES, "s", "steps", {"itl": "inter-token latency"}, "", log=True),
            Chart("e2e", "End-to-end latency of each request", POINTS, "s", "", {"e2e": "end to end"}, "", log=True),
            Chart(
                "distributions",
                "Distributions of latencies",
                SHARES,
                "share",
                "",
                {"ttft": "time to first token", "itl": "inter-token latency", "e2e": "end to end"},
                "The share of the values that are not larger. Every single value counts.",
            ),
        ),
    ),
)


def why_empty(run: Run, chart: Chart) -> str:
    """Why a run has nothing in a chart; "" if it has something."""
    if chart.kind == SHARES:
        return "" if run.shares.keys() & chart.series.keys() else _no_single(run)
    if chart.kind == POINTS:
        return "" if len(run.requests.timeline.requests) else _no_single(run)
    mine = [line for line in run.lines if line.source == chart.source]
    if any(line.curves.keys() & chart.series.keys() for line in mine):
        return ""
    if chart.source == "core":
        return run.why_no_core or "the engine core recorded nothing of it"
    if not run.summary.steps:
        return run.summary.why_no_steps or "there are no steps"
    for key in chart.series:
        if why := run.meta["absent"].get(MADE_OF.get(key, key)):
            return str(why)
    if chart.id in ("ttft", "itl"):
        return _no_single(run)
    if chart.id == "step-time":
        return run.summary.why_steps_have_no_times or "the steps have no start and end"
    if chart.id == "hit-rate":
        return "prefix caching is off" if run.summary.prefix_caching is False else "nothing was looked up"
    return "nothing was recorded of it"


def _no_single(run: Run) -> str:
    if not run.summary.steps_by_level.get("full"):
        return "recorded at level light, without single requests and their clocks"
    return "no request has had its first token or ended"
