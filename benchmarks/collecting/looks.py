"""What a way of collecting has shown, held against the truth. Pure: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from collecting.truth import NAMES, Row

Array = npt.NDArray[np.float64]

#: Phases at which a poller of some interval could have begun.
PHASES = 400


class Look(NamedTuple):
    """What could be read at a moment: monotonic nanoseconds when reading was over; usage; totals of the run so far (NaN
    where a way does not tell them); the hit rate so far, where a way gives it ready-made."""

    t: float
    usage: float
    tokens: float
    queries: float = np.nan
    hits: float = np.nan
    rate: float = np.nan


class Run(NamedTuple):
    """The truth of a run, an array per name of `truth.NAMES`, from its first step to its last."""

    t: Array
    usage: Array
    usage_inside: Array
    tokens: Array
    queries: Array
    hits: Array

    @property
    def seconds(self) -> float:
        """From the end of the first step to the end of the last."""
        return float(self.t[-1] - self.t[0]) / 1e9

    @property
    def rate(self) -> float:
        """Hit rate of the whole run."""
        return float(self.hits[-1] / self.queries[-1])

    def about(self) -> dict[str, Any]:
        """The run in numbers, for the table's head."""
        return {
            "steps": len(self.t),
            "seconds": self.seconds,
            "step_interval_ms_p50": float(np.median(np.diff(self.t))) / 1e6,
            "tokens": int(self.tokens[-1]),
            "usage_peak": float(self.usage.max()),
            "usage_peak_inside_of_a_step": float(self.usage_inside.max()),
            "share_of_steps_within_5_points_of_the_peak": float(np.mean(self.usage >= self.usage.max() - 0.05)),
            "hit_rate": self.rate,
        }


def the_run(rows: Sequence[Row], before: Row | None = None) -> Run:
    """Rows as arrays; totals from those of the row before the run on."""
    columns = np.array(rows, np.float64).T
    if before is not None:
        columns[3:] -= np.array(before[3:], np.float64)[:, None]
    return Run(**dict(zip(NAMES, columns, strict=True)))


def against(run: Run, looks: Sequence[Look], *, records: bool = False, interval: float | None = None) -> dict[str, Any]:
    """What a way saw of a run.

    A step counts as seen if a look showed the state that this step left. It is recognised by the total of tokens
    generated, in order; where a way tells no total, each look is of one step. The delay of a step is the time from
    its end in the engine core to the end of the first look that showed it or a later one. Looks of a poller that came
    when the run was over count for the delay alone.

    Args:
        records: a look is a record of one step, and not what somebody found who looked at some time.
        interval: seconds between two looks, of a way that polls: then also what the peak would have been, on average
            and at least, had it begun a little earlier or later.
    """
    t = np.array([look.t for look in looks], np.float64)
    tokens = np.array([look.tokens for look in looks], np.float64)
    known = [look for look in looks if records or run.t[0] <= look.t <= run.t[-1]]
    seen = _steps_of(run, known, records)
    out: dict[str, Any] = {
        "looks": len(known),
        "steps_seen": len(seen),
        "share_of_steps": len(seen) / len(run.t),
        # a look at counters and gauges that are just being written can show a mixture of two steps
        "usage_of_another_step": sum(known[i].usage != float(run.usage[k]) for i, k in seen if k is not None),
        "peak_found": max((look.usage for look in known if look.usage == look.usage), default=None),
        "hit_rate_found": _last_rate(known),
        "delay_ms": _delays(run, t, tokens),
    }
    if interval is not None:
        out["peak_at_any_phase"] = peak_at_any_phase(run, interval)
    return out


def _steps_of(run: Run, looks: Sequence[Look], records: bool) -> list[tuple[int, int | None]]:
    """Pairs of a look's index and the index of the step that it shows; None for a step that cannot be named."""
    pairs: list[tuple[int, int | None]] = []
    at, previous = 0, -1.0
    for i, look in enumerate(looks):
        if look.tokens != look.tokens:
            pairs.append((i, None))
        elif records or look.tokens != previous:
            k = at + int(np.searchsorted(run.tokens[at:], look.tokens))
            if k < len(run.tokens) and run.tokens[k] == look.tokens:
                pairs.append((i, k))
                at = k + 1
        previous = look.tokens
    return pairs


def _last_rate(looks: Sequence[Look]) -> float | None:
    for look in reversed(looks):
        if look.rate == look.rate:
            return look.rate
        if look.queries > 0:
            return look.hits / look.queries
    return None


def _delays(run: Run, t: Array, tokens: Array) -> dict[str, float | None]:
    """Quantiles in ms over the steps that gave tokens; None where such a step was never shown."""
    order = np.argsort(t, kind="stable")
    t, tokens = t[order], tokens[order]
    gave = np.diff(run.tokens, prepend=0) > 0
    ends, totals = run.t[gave], run.tokens[gave]
    if np.isnan(tokens).all():  # what is shown then is everything up to then
        first = np.searchsorted(t, ends, side="left")
    else:
        first = np.searchsorted(np.maximum.accumulate(tokens), totals, side="left")
    shown = np.append(t, np.inf)[first]
    delays = (shown - ends) / 1e6
    quantiles = np.quantile(delays, (0.5, 0.99, 1), method="higher")
    p50, p99, most = (float(q) if np.isfinite(q) else None for q in quantiles)
    return {"p50": p50, "p99": p99, "max": most, "never_shown": float(np.mean(np.isinf(delays)))}


def peak_at_any_phase(run: Run, interval: float) -> dict[str, float]:
    """The highest usage that looks `interval` seconds apart find in this run, over all phases: mean and least."""
    step = interval * 1e9
    peaks = []
    for phase in np.linspace(0, step, PHASES, endpoint=False):
        at = np.arange(run.t[0] + phase, run.t[-1], step)
        of = np.searchsorted(run.t, at, side="right") - 1
        peaks.append(float(run.usage[of].max(initial=0.0)))
    return {"mean": float(np.mean(peaks)), "least": min(peaks)}


def interval_of(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 95 % interval, by bootstrap over the rounds."""
    logs = np.log(ratios)
    means = np.random.default_rng(0).choice(logs, (4000, len(logs))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))
