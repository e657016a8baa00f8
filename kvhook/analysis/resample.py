"""How sure a number of a run is, although its steps are not independent of each other.

A batch that is slow in one step is slow in the next one as well, and a queue that is long stays long. A bootstrap that
draws single steps takes such steps for independent and believes far too much. What is drawn here are blocks of
consecutive steps, which keep the dependence inside them: the circular block bootstrap of Politis and Romano (1992). The
variance over all draws is a sum that can be written down. So nothing has to be drawn, and the answer is the same each
time. It is done twice, and the larger error counts:

- The tie between a step and the next one is estimated and taken out, and afterwards put back (post-blackening, Davison
  and Hinkley 1997, 8.2). How long the blocks of the rest must be is read from its autocorrelation, by the rule of
  Politis and White (2004) as corrected by Patton, Politis and White (2009). This is for steps that are tied closely.
- Without that, in the longest blocks of which a run holds enough. This is for phases that last long and differ little.

A run counts as many independent values as it holds blocks, or fewer where steps are tied. Student's t with that many
degrees of freedom accounts for it.

Everything is a ratio of two sums over steps: hits by look-ups, tokens by seconds, a state by the steps in which it is
known. A quantile is one as well, by Woodruff (1952): the share of the values up to it is such a ratio, and the
distribution itself says which values belong to a share that is a little smaller or larger.

- Davison, Hinkley: Bootstrap Methods and their Application. Cambridge 1997
- Politis, Romano: A circular block-resampling procedure for stationary data. Exploring the Limits of Bootstrap, 1992
- Politis, White: Automatic block-length selection for the dependent bootstrap. Econometric Reviews 23, 2004
- Patton, Politis, White: Correction to that article. Econometric Reviews 28, 2009
- Woodruff: Confidence intervals for medians and other position measures. J. Am. Stat. Assoc. 47, 1952
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: A longer series is added up into so many parts of consecutive steps first. A sum loses nothing by it.
MOST_PARTS = 4096
#: Fewer steps than these say nothing about how sure a number is.
FEWEST = 16
#: A run that counts as fewer independent values than these says nothing either.
FEWEST_VALUES = 3
#: Beyond a quantile there must be so many standard errors' worth of values, in so many different steps.
_ROOM, _STEPS_BEYOND = 2.0, 5
#: The longest blocks are so long that a run holds at least so many of them.
_FEW_BLOCKS = 8
#: A stronger tie between a step and the next is taken for this one: a run that drifts has no mean to be sure of.
MOST_TIE = 0.98


class Spread(NamedTuple):
    """A number of a run, and how sure it is.

    Args:
        estimate: the number.
        error: its standard error.
        blocks: how many blocks of the chosen length the run holds: as many independent values it is worth.
        block_length: in steps (or requests).
    """

    estimate: float
    error: float
    blocks: float
    block_length: float

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error."""
        return max(self.blocks - 1, 1.0)


def spread_of_ratio(above: Floats, below: Floats) -> Spread | None:
    """How sure ``above.sum() / below.sum()`` is; None where there are too few steps to say so.

    Args:
        above: one value for each step, in order.
        below: the same; not negative.
    """
    steps = len(above)
    if int(np.count_nonzero(below)) < FEWEST:
        return None
    above, below, size = _parts(above, below)
    estimate = float(above.sum() / below.sum())
    # what each step adds to the ratio, to first order: its autocorrelation is that of the ratio
    error, values, length = error_of_mean((above - estimate * below) / below.mean())
    if error <= 1e-12 * abs(estimate):
        error, values = 0.0, float(steps)  # rounding alone
    if values < FEWEST_VALUES:
        return None
    return Spread(estimate, error, min(values, steps), length * size)


def error_of_mean(series: Floats) -> tuple[float, float, int]:
    """The standard error of the mean of a series whose values depend on each other; as how many independent values the
    series counts; and the length of the blocks. The larger of two errors, see the module."""
    count = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred)
    tie = float(centred[1:] @ centred[:-1]) / variance if variance > 0 else 0.0
    # the estimate is too small by about this (Marriott and Pope 1954)
    tie = min(max(tie + (1 + 3 * tie) / count, 0.0), MOST_TIE)
    rest = centred[1:] - tie * centred[:-1]
    short = block_length(rest)
    long = max(short, math.ceil(min(3 * math.sqrt(count), count / _FEW_BLOCKS)))
    untied = count * (1 - tie) / (1 + tie)
    return max(
        (_error_by_blocks(rest, short) / (1 - tie), min(count / short, untied), short),
        (_error_by_blocks(centred, long), count / long, long),
    )


def _error_by_blocks(series: Floats, length: int) -> float:
    """The standard deviation of the mean of blocks that are drawn until they are as long as the series, for a small
    sample."""
    blocks = len(series) / length
    up_to = np.concatenate(([0.0], np.cumsum(np.concatenate((series, series[: length - 1])))))
    means = (up_to[length:] - up_to[:-length]) / length  # of each block that can be drawn
    return float(np.std(means)) / math.sqrt(max(blocks - 1, 1.0))


def spread_of_quantile(
    share: float, up_to: Floats, counts: Floats, quantile: Callable[[float], float]
) -> Spread | None:
    """How sure a quantile is; None where there are too few values, or too few beyond it, to say so.

    Args:
        share: which quantile, from 0 to 1.
        up_to: for each step, how many of its values are not above the quantile.
        counts: for each step, how many values it has.
        quantile: gives any quantile of all values.
    """
    if np.count_nonzero(counts - up_to > 0) < _STEPS_BEYOND:
        return None
    spread = spread_of_ratio(up_to, counts)
    if spread is None or min(share, 1 - share) < _ROOM * spread.error:
        return None
    low, high = (quantile(min(max(share + side * spread.error, 0.0), 1.0)) for side in (-1, 1))
    return spread._replace(estimate=quantile(share), error=(high - low) / 2)


def block_length(series: Floats) -> int:
    """The length of blocks that suits a series, from its autocorrelation; see the module. At least 1, and never so long
    that the series holds fewer than three blocks."""
    count = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred) / count
    most = max(1, math.ceil(min(3 * math.sqrt(count), count / 3)))
    if variance <= 0 or not math.isfinite(variance):
        return 1
    quiet_for = max(5, math.ceil(math.log10(count)))
    lags = min(math.ceil(math.sqrt(count)) + quiet_for, count - 1)
    covariance = np.array([float(centred[: count - lag] @ centred[lag:]) / count for lag in range(lags + 1)])
    loud = np.abs(covariance[1:] / variance) >= 2 * math.sqrt(math.log10(count) / count)
    last = _last_before_quiet(loud, quiet_for)
    wide = min(2 * max(last, 1), lags)
    lag = np.arange(-wide, wide + 1)
    weight = np.clip(2 * (1 - np.abs(lag) / wide), 0.0, 1.0)
    by_lag = weight * covariance[np.abs(lag)]
    slope, level = float((np.abs(lag) * by_lag).sum()), float(by_lag.sum())
    if level <= 0:
        return 1
    best = (2 * slope**2 / (4 / 3 * level**2)) ** (1 / 3) * count ** (1 / 3)
    return int(min(max(round(best), 1), most))


def t_quantile(share: float, freedom: float) -> float:
    """A quantile of Student's t distribution. With x = sqrt(freedom) tan(a) its density is a power of cos(a)."""
    freedom = min(freedom, 1e4)
    angle = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    up_to = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(float(np.interp(share, up_to / up_to[-1], angle)))


def _parts(above: Floats, below: Floats) -> tuple[Floats, Floats, int]:
    """The series, or sums of so many consecutive steps of it that it is short enough."""
    size = -(-len(above) // MOST_PARTS)
    if size == 1:
        return above.astype(np.float64), below.astype(np.float64), 1
    at = np.arange(0, len(above), size)
    return np.add.reduceat(above.astype(np.float64), at), np.add.reduceat(below.astype(np.float64), at), size


def _last_before_quiet(loud: npt.NDArray[np.bool_], quiet_for: int) -> int:
    """The last lag before so many lags in a row without a correlation worth the name; else the last that has one."""
    quiet = 0
    for lag, is_loud in enumerate(loud.tolist(), 1):
        quiet = 0 if is_loud else quiet + 1
        if quiet == quiet_for:
            return lag - quiet_for
    return int(loud.nonzero()[0][-1]) + 1 if loud.any() else 0
