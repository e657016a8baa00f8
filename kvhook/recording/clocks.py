"""The two clocks of a trace: the monotonic one, and the time since 1970."""

from __future__ import annotations

import time


def read_clocks() -> tuple[int, int]:
    """The monotonic clock and the time since 1970 of one moment, in nanoseconds: of three readings the closest."""
    readings = []
    for _ in range(3):
        before, real, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, before + (after - before) // 2, real))
    _, monotonic, real = min(readings)
    return monotonic, real
