"""Sums of floats that do not depend on how the values came: in one piece, in chunks, or in parts that are added up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: A float is a whole number of so many bits times a power of two.
_BITS = 53
#: Each of its halves has so many bits: the sums of both then stay exact in a float for 2^26 values.
_HALF = 27
#: The smallest power of two that occurs, of the halves' unit.
_LOWEST = -1100


class ExactSum:
    """The sum of floats, rounded once, at the end.

    Means of a file that is read in chunks, of a run that is still going on, and of several files are then the same to
    the last digit. What is not finite is added apart.
    """

    __slots__ = ("_beyond", "_units")

    def __init__(self) -> None:
        self._units = 0  # the sum, in units of 2**_LOWEST
        self._beyond = 0.0

    def take(self, values: npt.NDArray[np.float64]) -> None:
        """Add values: at most 2^26 of them in one call."""
        if not len(values):
            return
        if not np.isfinite(values).all():
            finite = np.isfinite(values)
            self._beyond += float(values[~finite].sum())
            values = values[finite]
            if not len(values):
                return
        fraction, exponent = np.frexp(values)
        whole = np.ldexp(fraction, _BITS).astype(np.int64)
        high = whole >> _HALF
        low = whole - (high << _HALF)
        base = int(exponent.min())
        exponent -= base
        highs, lows = (np.bincount(exponent, half) for half in (high, low))
        for shift, (a, b) in enumerate(zip(highs.tolist(), lows.tolist(), strict=True)):
            if a or b:
                self._units += ((int(a) << _HALF) + int(b)) << (base + shift - _BITS - _LOWEST)

    def add(self, other: ExactSum) -> None:
        """Add another sum."""
        self._units += other._units
        self._beyond += other._beyond

    @property
    def value(self) -> float:
        """The sum as the nearest float."""
        try:
            return self._units / (1 << -_LOWEST) + self._beyond
        except OverflowError:
            return float("inf") if self._units > 0 else float("-inf")
