"""How long the spool waits between two drains of the rings."""

from __future__ import annotations

#: Seconds between two drains: while nothing happens, and the least and the most while an engine works. Longer pauses
#: take less from the engine's thread, because what a drain costs is mostly waking up with cold caches.
INTERVAL, SHORTEST, LONGEST = 0.2, 0.005, 1.0


def next_pause(taken: int, seconds: float, capacity: int, last: float) -> float:
    """Seconds until the next drain: until an eighth of the smallest ring is full at the present rate.

    Args:
        taken: records that came in the last `seconds`.
        seconds: time since the drain before.
        capacity: slots of the smallest ring.
        last: the last pause; the next one is at most twice as long.
    """
    if not taken:
        return INTERVAL  # no engine works, so that being ready for a burst costs nothing
    return max(SHORTEST, min(capacity / 8 * seconds / taken, 2 * last, LONGEST))
