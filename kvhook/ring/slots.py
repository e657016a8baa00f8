"""Raw slots as numpy arrays: their heads, their columns, and which of them are whole. Nothing is copied.

numpy is imported when the first slot is looked at, so that writing a ring does not need it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvhook.ring.layout import BODY_AT, CRC_AT, MAX_RECORDS, STAMP_AT, Column

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    #: Raw slots, shape (records, slot bytes). Bytes and not a structured array: numpy does not promise to copy
    #: the padding of structured ones.
    Slots = npt.NDArray[np.uint8]
    Bools = npt.NDArray[np.bool_]

#: Bytes that are looked at a time, so that memory stays flat whatever a file claims.
CHUNK_BYTES = 6 << 20


def slot_head(slots: Slots) -> npt.NDArray[np.void]:
    """The head of each raw slot, without copying: a structured array of ``stamp, crc, n, kind, engine``."""
    import numpy as np

    head = {
        "names": ["stamp", "crc", "n", "kind", "engine"],
        "formats": ["<u8", "<u8", "<i8", "<i4", "<i4"],
        "offsets": [STAMP_AT, CRC_AT, BODY_AT, BODY_AT + 8, BODY_AT + 12],
        "itemsize": slots.shape[1],
    }
    return slots.view(np.dtype(head))[:, 0]  # type: ignore[call-overload]


def fields_of(slots: Slots, columns: Sequence[Column]) -> npt.NDArray[np.void]:
    """The columns of raw slots of one kind, without copying: a structured array."""
    import numpy as np

    shape: Any = {
        "names": [c.name for c in columns],
        "formats": [c.type for c in columns],
        "offsets": [c.offset for c in columns],
        "itemsize": slots.shape[1],
    }
    fields: npt.NDArray[np.void] = np.ascontiguousarray(slots).view(np.dtype(shape))[:, 0]
    return fields


def whole(slots: Slots) -> Bools:
    """Which slots hold a whole record: the stamp is that of the record's number, and the number is possible."""
    import numpy as np

    head = slot_head(slots)
    n = head["n"]
    good: Bools = (head["stamp"] == (2 * n + 2).astype(np.uint64)) & (n >= 0) & (n < MAX_RECORDS)
    return good


def refute_by_crc(slots: Slots, good: Bools) -> None:
    """Take those out of `good` whose body does not have the crc that stands in the slot."""
    crc = slot_head(slots)["crc"]
    for i in good.nonzero()[0]:
        good[i] = zlib.crc32(slots[i, BODY_AT:].tobytes()) == crc[i]
