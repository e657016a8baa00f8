"""Several runs side by side: the same numbers of each, and which differences stand out of what a run varies anyway."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvhook.analysis.diagnosis.finding import Finding
from kvhook.analysis.resample import Spread, t_quantile
from kvhook.analysis.series import Measured
from kvhook.analysis.settings import Setting, different
from kvhook.analysis.summary import Summary

Value = float | str | None

#: Verdicts on a difference. It stands out and is good or bad; stands out; does not; there is none; was not judged.
BETTER, WORSE, DIFFERENT, UNCLEAR, SAME, NOT_JUDGED = "better", "worse", "different", "unclear", "same", "not judged"

#: Why a number is not judged.
_WORK = "it says what was done, not how"
_PEAK = "the largest value alone says nothing about how much it varies"


class Number(NamedTuple):
    """A number that is compared.

    Args:
        name: of the summary, as conditions have it (`kvhook.analysis.conditions`).
        label: what people call it.
        unit: "count", "s" (seconds), "share" (0 to 1), "rate" (per second), "name" (of a model) or "" (other text).
        read: takes it from a summary. A word may stand in the place of a number: "off".
        good: "higher" or "lower", "" where neither is better.
        why_not: why a difference is not judged; "" where it is.
    """

    name: str
    label: str
    unit: str
    read: Callable[[Summary], Value]
    good: str = ""
    why_not: str = _WORK


def _hit_rate(s: Summary) -> Value:
    return "off" if s.prefix_caching is False else s.prefix_cache_hit_rate


#: What is compared, in this order.
NUMBERS: tuple[Number, ...] = (
    Number("vllm", "vLLM", "", lambda s: s.vllm),
    Number("model", "model", "name", lambda s: s.model),
    Number("steps", "steps", "count", lambda s: s.steps),
    Number("steps_by_level", "level", "", lambda s: "/".join(s.steps_by_level)),
    Number("time_in_steps", "time in steps", "s", lambda s: s.time_in_steps),
    Number("step_time_p50", "step time p50", "s", lambda s: s.step_time.p50, "lower", ""),
    Number("step_time_p99", "step time p99", "s", lambda s: s.step_time.p99, "lower", ""),
    Number("num_kv_blocks", "KV blocks", "count", lambda s: s.num_kv_blocks),
    Number("kv_cache_usage_peak", "KV usage peak", "share", lambda s: s.kv_cache_usage_peak, "", _PEAK),
    Number("kv_cache_usage_mean", "KV usage mean", "share", lambda s: s.kv_cache_usage_mean, "", ""),
    Number("prefix_cache_hit_rate", "prefix cache hit rate", "share", _hit_rate, "higher", ""),
    Number("prefix_cache_hits", "prefix cache hit tokens", "count", lambda s: s.prefix_cache_hits),
    Number("num_prompt_tokens", "prompt tokens", "count", lambda s: s.num_prompt_tokens),
    Number("num_prompt_tokens_computed", "prompt tokens computed", "count", lambda s: s.num_prompt_tokens_computed),
    Number("num_generation_tokens", "generated tokens", "count", lambda s: s.num_generation_tokens),
    Number(
        "prompt_tokens_per_second", "prompt per s in steps", "rate", lambda s: s.prompt_tokens_per_second, "higher", ""
    ),
    Number(
        "generation_tokens_per_second",
        "generated per s in steps",
        "rate",
        lambda s: s.generation_tokens_per_second,
        "higher",
        "",
    ),
    Number("num_running_reqs_mean", "running mean", "rate", lambda s: s.num_running_reqs_mean, "", ""),
    Number("num_running_reqs_peak", "running peak", "count", lambda s: s.num_running_reqs_peak, "", _PEAK),
    Number("num_waiting_reqs_mean", "waiting mean", "rate", lambda s: s.num_waiting_reqs_mean, "lower", ""),
    Number("num_waiting_reqs_peak", "waiting peak", "count", lambda s: s.num_waiting_reqs_peak, "", _PEAK),
    Number("num_preempted_reqs", "preemptions", "count", lambda s: s.num_preempted_reqs, "lower", ""),
    Number("num_finished_reqs", "finished requests", "count", lambda s: s.num_finished_reqs),
    *(
        Number(
            f"{name}_p{share}",
            f"{label} p{share}",
            "s",
            lambda s, name=name, share=share: getattr(getattr(s, name), f"p{share}"),  # type: ignore[misc]
            "lower",
            "",
        )
        for name, label in (
            ("time_to_first_token", "time to first token"),
            ("inter_token_latency", "inter-token latency"),
            ("e2e_latency", "end to end"),
        )
        for share in (50, 99)
    ),
    Number("records_lost", "records lost", "count", lambda s: s.records_lost),
)


class Side(NamedTuple):
    """One of the runs that are compared, or several repeats of it.

    Args:
        letter: what conditions call it: "A", "B"...
        name: what people call it.
        runs: its repeats; at least one.
        settings: of its engines, see `kvhook.analysis.settings.settings_of`.
    """

    letter: str
    name: str
    runs: Sequence[Measured]
    settings: Mapping[str, tuple[Any, ...]]


class Contrast(NamedTuple):
    """A number of a side against that of the first side.

    Args:
        difference: this side less the first; None where there is none.
        low, high: the interval of the difference; None where it is not judged.
        ratio: this side by the first.
        verdict: "better", "worse", "different", "unclear", "same" or "not judged".
        why: why it is not judged.
    """

    difference: float | None
    low: float | None
    high: float | None
    ratio: float | None
    verdict: str
    why: str = ""


class Row(NamedTuple):
    """A number of every side: of several repeats their mean; and the contrast of each further side with the first."""

    name: str
    label: str
    unit: str
    good: str
    values: tuple[Value, ...]
    contrasts: tuple[Contrast, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    letters: tuple[str, ...]
    names: tuple[str, ...]
    #: repeats of each side
    repeats: tuple[int, ...]
    rows: tuple[Row, ...]
    #: settings that are not the same
    settings: tuple[Setting, ...]
    #: what to know before one believes a verdict
    notes: tuple[str, ...]
    #: all intervals hold together with this probability
    confidence: float
    #: what each side suffers from: a finding of any of its repeats
    findings: tuple[tuple[Finding, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries, lists, numbers and None: what ``json.dumps`` takes."""
        rows = [row._asdict() | {"contrasts": [c._asdict() for c in row.contrasts]} for row in self.rows]
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        more = {
            "rows": rows,
            "settings": [s._asdict() for s in self.settings],
            "findings": [[finding._asdict() for finding in side] for side in self.findings],
        }
        found: dict[str, Any] = without_nan(plain | more)
        return found


def compare(sides: Sequence[Side], confidence: float = 0.95) -> Comparison:
    """Compare runs with the first of them.

    Args:
        sides: at least two.
        confidence: that all intervals hold together. Each is as much wider as it takes (Bonferroni), so that runs
            without a difference give a table with a verdict in at most 1 - confidence of the cases.
    """
    judged = [n for n in NUMBERS if not n.why_not and all(_spreads(side, n.name) for side in sides)]
    level = (1 - confidence) / max(len(judged) * (len(sides) - 1), 1)
    return Comparison(
        letters=tuple(side.letter for side in sides),
        names=tuple(side.name for side in sides),
        repeats=tuple(len(side.runs) for side in sides),
        rows=tuple(_row(number, sides, level) for number in NUMBERS),
        settings=tuple(different([side.settings for side in sides])),
        notes=tuple(_notes(sides)),
        confidence=confidence,
        findings=tuple(_findings(side) for side in sides),
    )


def side_by_side(summaries: Sequence[Summary]) -> list[Row]:
    """The same numbers of several runs, without verdicts."""
    return [Row(n.name, n.label, n.unit, n.good, tuple(n.read(s) for s in summaries)) for n in NUMBERS]


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN: what is not known is None."""
    if isinstance(value, Mapping):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- one number ----------------------------------------------------------------------------------------------------


def _row(number: Number, sides: Sequence[Side], level: float) -> Row:
    values = tuple(_value(number, side) for side in sides)
    contrasts = tuple(
        _contrast(number, (sides[0], side), (values[0], value), level)
        for side, value in zip(sides[1:], values[1:], strict=True)
    )
    return Row(number.name, number.label, number.unit, number.good, values, contrasts)


def _value(number: Number, side: Side) -> Value:
    """Of several repeats the mean of what is known; a word where all say it."""
    values = [number.read(run.summary) for run in side.runs]
    numbers = [v for v in values if isinstance(v, (int, float)) and v == v]
    if len(numbers) == len(values):
        return sum(numbers) / len(numbers) if len(numbers) > 1 else numbers[0]
    words = {str(v) for v in values if isinstance(v, str)}
    return "/".join(sorted(words)) if words else None


def _contrast(number: Number, sides: tuple[Side, Side], values: tuple[Value, Value], level: float) -> Contrast:
    first, other = values
    if number.unit in ("", "name") or isinstance(first, str) or isinstance(other, str):
        return Contrast(None, None, None, None, NOT_JUDGED, _WORK if number.why_not else "one side has no such number")
    if first is None or other is None:
        return Contrast(None, None, None, None, NOT_JUDGED, "one side has no such number")
    difference, ratio = other - first, other / first if first else None
    if number.why_not:
        return Contrast(difference, None, None, ratio, NOT_JUDGED, number.why_not)
    if difference == 0:
        return Contrast(0.0, None, None, ratio, SAME)
    spreads = [_spreads(side, number.name) for side in sides]
    if not all(spreads):
        return Contrast(difference, None, None, ratio, NOT_JUDGED, _why_unknown(sides, number.name))
    error, freedom = error_of_difference(spreads)
    reach = error * t_quantile(1 - level / 2, freedom) if error else 0.0
    low, high = difference - reach, difference + reach
    return Contrast(difference, low, high, ratio, _verdict(number.good, low, high))


def _verdict(good: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return UNCLEAR
    if not good:
        return DIFFERENT
    return BETTER if (low > 0) == (good == "higher") else WORSE


def _spreads(side: Side, name: str) -> list[Spread]:
    """How sure the number is in each repeat; empty if that is not known of all of them."""
    found = [run.spreads.get(name) for run in side.runs]
    known = [spread for spread in found if isinstance(spread, Spread)]
    return known if len(known) == len(found) else []


def _why_unknown(sides: Sequence[Side], name: str) -> str:
    found = (run.spreads.get(name) for side in sides for run in side.runs)
    return next((text for text in found if isinstance(text, str)), "it is not known how much it varies")


def error_of_difference(sides: Sequence[Sequence[Spread]]) -> tuple[float, float]:
    """The standard error of the difference of two means, and its degrees of freedom (Welch and Satterthwaite).

    A side's variance is that of its runs by themselves, or that between its repeats if this is larger: then runs differ
    by more than their steps show. How much repeats differ is estimated from both sides together.

    Args:
        sides: of each side, its number in each repeat.
    """
    between = sum(_squares([s.estimate for s in side]) for side in sides)
    between_freedom = sum(len(side) - 1 for side in sides)
    parts: list[tuple[float, float]] = []  # variance, degrees of freedom
    for side in sides:
        count = len(side)
        inside = [((s.error / count) ** 2, s.freedom) for s in side]
        by_repeats = between / between_freedom / count if between_freedom else 0.0
        parts += inside if by_repeats <= sum(v for v, _ in inside) else [(by_repeats, between_freedom)]
    variance = sum(v for v, _ in parts)
    if not variance:
        return 0.0, 1.0
    return math.sqrt(variance), variance**2 / sum(v**2 / freedom for v, freedom in parts)


def _squares(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values)


# ---- what to know of it --------------------------------------------------------------------------------------------


def _findings(side: Side) -> tuple[Finding, ...]:
    found: dict[str, Finding] = {}
    for run in side.runs:
        for finding in run.summary.findings:
            found.setdefault(finding.name, finding)
    return tuple(found.values())


def _notes(sides: Sequence[Side]) -> list[str]:
    notes = []
    for name, label in (("num_prompt_tokens", "prompt tokens"), ("num_generation_tokens", "generated tokens")):
        number = next(n for n in NUMBERS if n.name == name)
        values = [v for side in sides if isinstance(v := _value(number, side), (int, float))]
        if values and max(values) > 1.01 * min(values):
            notes.append(f"The runs did not do the same work: {label} from {min(values):,.0f} to {max(values):,.0f}.")
    if len({run.summary.vllm for side in sides for run in side.runs}) > 1:
        notes.append(
            "vLLM counts prefix-cache look-ups differently from release to release: where requests were preempted or "
            "had to wait for blocks, compare hit tokens and computed tokens, not hit rates."
        )
    if lost := sum(run.summary.records_lost for side in sides for run in side.runs):
        notes.append(f"{lost:,} records are missing: sums are too small.")
    if all(len(side.runs) == 1 for side in sides):
        notes.append(
            "Verdicts hold for these runs. How much a run differs when it is repeated, only repeats can show: A1,A2 "
            "in the place of A."
        )
    return notes
