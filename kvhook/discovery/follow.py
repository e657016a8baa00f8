"""Following a ring while its engine works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvhook.ring.reader import RingReader
    from kvhook.ring.slots import Slots

#: Seconds between two looks at a ring.
INTERVAL = 0.1
#: Seconds between two looks at whether the writer still runs.
CHECK_EVERY = 0.5
#: Records that are taken at a time.
MOST = 4096

CLOSED, DIED = "closed", "died"


class News(NamedTuple):
    """What came since the last look: raw slots, how many records were overwritten before they could be read, and, in
    the last one, how the ring came to its end: `CLOSED` or `DIED`."""

    slots: Slots
    lost: int
    end: str = ""


def follow(
    reader: RingReader,
    *,
    interval: float = INTERVAL,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[News]:
    """What a ring holds and all that comes, until its writer closes it or dies. Only reads.

    Args:
        reader: from where on: its next record.
        interval: seconds between two looks.
        sleep: waits so many seconds.
        clock: seconds.

    Raises:
        TraceFormatError: the ring is damaged.
    """
    checked = -1e9
    while True:
        # looked at before the records are: what was published before the end is then in one of the polls
        end = CLOSED if reader.closed else ""
        if not end and clock() - checked >= CHECK_EVERY:
            checked = clock()
            end = "" if reader.writer_alive else DIED
        more = True
        while more:
            batch = reader.poll(MOST, final=end == DIED)
            more = len(batch.slots) + batch.lost >= MOST
            if len(batch.slots) or batch.lost:
                yield News(batch.slots, batch.lost)
        if end:
            yield News(batch.slots[:0], 0, end)
            return
        sleep(interval)
