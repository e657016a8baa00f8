"""Request ids as the numbers that columns hold: numbers as they are, or a keyed digest of each id.

vLLM's ``LLM`` counts its prompts "0", "1", "2", so that a short number says nothing about anybody. An id of more than
`MOST_DIGITS` digits is none of these: it may be somebody's telephone or account number, and is not recorded as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: An id with more digits is not one that ``LLM`` has counted.
MOST_DIGITS = 9
_END = 10**MOST_DIGITS

#: A digest in a column has so many bits less than one of `kvhook.core.lives.request_key`: what reads the column with
#: floats (JavaScript, pandas where values are missing) then reads it exactly.
SHORTER = 11

_digest: Callable[[str], int] | None = None


def hash_ids(digest: Callable[[str], int] | None) -> None:
    """From now on request ids are recorded as this digest says; None: numbers as they are."""
    global _digest
    _digest = digest


def id_number(value: Any) -> int:
    """What a column holds for a request id: the number that it is, or its digest; -1 where there is neither."""
    if _digest is not None:
        return -1 if value is None else _digest(str(value))
    if type(value) is int:
        return value if -1 <= value < _END else -1
    return plain_number(value) if isinstance(value, str) else -1


def plain_number(text: str) -> int:
    """The number that an id is, if it is one that ``LLM`` may have counted; else -1."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else -1
