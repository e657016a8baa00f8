"""Sums of floats that do not depend on how the values came: in one piece, in chunks, or in parts that are added up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: The parts of a float in its 64 bits, and what is to be taken off its exponent to have a whole number times a power
#: of two.
_FRACTION, _EXPONENT, _BIAS = 52, 0x7FF, 1075
#: The bits of a half of that whole number. Sums of such halves stay exact in a float for 2^26 values.
_HALF = 27
_SMALLEST = 1 << _BIAS  # 1 in units of the smallest float there is, twice as fine


class ExactSum:
    """The sum of floats, rounded once, at the end.

    Means of a file that is read in chunks, of a run that is still going on, and of several files are then the same to
    the last digit. What is not finite is added apart.
    """

    __slots__ = ("_beyond", "_units")

    def __init__(self) -> None:
        self._units = 0  # the sum, in units of 2**-_BIAS
        self._beyond = 0.0

    def take(self, values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64] | None = None) -> None:
        """Add values, each as often as `counts` says: all in all 2^26 of them in one call, or it takes longer."""
        if not len(values):
            return
        bits = np.ascontiguousarray(values).view(np.int64)
        exponent = bits >> _FRACTION & _EXPONENT
        if exponent.max() == _EXPONENT:
            finite = exponent < _EXPONENT
            times = 1 if counts is None else counts[~finite]
            self._beyond += float((values[~finite] * times).sum())
            self.take(values[finite], None if counts is None else counts[finite])
            return
        whole = bits & ((1 << _FRACTION) - 1)
        whole += (exponent > 0).astype(np.int64) << _FRACTION
        exponent = np.maximum(exponent, 1)
        if (bits < 0).any():
            whole = np.where(bits < 0, -whole, whole)
        high = whole >> _HALF
        low = whole - (high << _HALF)
        if counts is not None:
            if int(counts.sum()) >= 1 << 26:
                self._take_many(whole, exponent, counts)
                return
            high, low = high * counts, low * counts
        base = int(exponent.min())
        exponent -= base
        highs, lows = (np.bincount(exponent, half).tolist() for half in (high, low))
        for shift, (a, b) in enumerate(zip(highs, lows, strict=True)):
            if a or b:
                self._units += ((int(a) << _HALF) + int(b)) << (base + shift)

    def _take_many(
        self, whole: npt.NDArray[np.int64], exponent: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> None:
        for w, e, c in zip(whole.tolist(), exponent.tolist(), counts.tolist(), strict=True):
            self._units += (w * c) << e

    def add(self, other: ExactSum) -> None:
        """Add another sum."""
        self._units += other._units
        self._beyond += other._beyond

    @property
    def value(self) -> float:
        """The sum as the nearest float."""
        try:
            return self._units / _SMALLEST + self._beyond
        except OverflowError:
            return float("inf") if self._units > 0 else float("-inf")
