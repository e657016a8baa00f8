"""Arrays in a page: one block of bytes, compressed, as base64 text."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Blob:
    """Takes arrays in and says where each of them lies."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._at = 0

    def add(self, array: npt.ArrayLike, dtype: str) -> list[object]:
        """Where an array is: offset in bytes, number of values, type (``"f4"``, ``"f8"``, ``"i4"``)."""
        data = np.ascontiguousarray(array, f"<{dtype}")
        place: list[object] = [self._at, data.size, dtype]
        raw = data.tobytes()
        raw += b"\0" * (-len(raw) % 8)
        self._pieces.append(raw)
        self._at += len(raw)
        return place

    def text(self) -> str:
        """All of them."""
        return base64.b64encode(zlib.compress(b"".join(self._pieces), 6)).decode("ascii")


def codes(texts: Sequence[str]) -> tuple[list[int], list[str]]:
    """Texts as numbers, and the text of each number."""
    names = sorted(set(texts))
    places = {name: i for i, name in enumerate(names)}
    return [places[text] for text in texts], names
