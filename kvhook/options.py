"""What a user may choose: the arguments of `kvhook.install`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvhook.errors import KvhookError
from kvhook.ring.layout import MAX_CAPACITY
from kvhook.ring.trace_file import TRACE_SUFFIX

#: Slots of a ring: some 3.7 MB. In containers /dev/shm is often 64 MiB in all.
RING_SLOTS = 8192
#: Bytes of history on disk: 2.4 million steps.
HISTORY = "1GiB"
#: How much is recorded inside the engine core.
CORE_LEVELS = ("off", "steps", "blocks")
#: How request ids are recorded: short numbers as they are, or a keyed digest of every id.
REQUEST_IDS = ("numbers", "hashed")
#: The levels that can be asked for.
LEVELS = ("full", "light")

#: What labels requests: a separator in their ids, or a function that is given the id; None: only `kvhook.label`.
LabelOf = str | Callable[[str], str | None] | None


@dataclass(frozen=True)
class Options:
    """The arguments of `kvhook.install`, as they were given. `check` says what is wrong with them.

    Attributes:
        trace: stream the run to this ``.kvh`` file.
        history: how much of the run is kept on disk without `trace`, in bytes or as text such as ``"500MB"``.
        ring_dir: directory of the rings, instead of shared memory.
        ring_slots: records a ring holds, before rounding up.
        level: ``"full"`` or ``"light"``.
        max_overhead: the most that kvhook may take, as a share of the time inside steps.
        core: how much is recorded inside the engine core, a value of `CORE_LEVELS`.
        labels: what labels requests by their ids.
        request_ids: how request ids are recorded, a value of `REQUEST_IDS`.
        anonymous: whether the facts that could name somebody are left out.
    """

    trace: str | os.PathLike[str] | None = None
    history: int | str = HISTORY
    ring_dir: str | os.PathLike[str] | None = None
    ring_slots: int = RING_SLOTS
    level: str = "full"
    max_overhead: float | None = None
    core: str = "steps"
    labels: LabelOf = None
    request_ids: str = "numbers"
    anonymous: bool = False

    def check(self) -> None:
        """Look at every option before anything is made.

        Raises:
            KvhookError: one is not usable; the message says which and why.
        """
        if self.level not in LEVELS:
            raise KvhookError(f"level={self.level!r}: there are {', '.join(map(repr, LEVELS))}")
        if self.core not in CORE_LEVELS:
            raise KvhookError(f"core={self.core!r}: there are {', '.join(map(repr, CORE_LEVELS))}")
        labels: object = self.labels
        if labels is not None and not callable(labels) and not (isinstance(labels, str) and labels):
            raise KvhookError(
                f"labels={self.labels!r}: a separator in request ids, such as '/', or a function that is given one"
            )
        if self.request_ids not in REQUEST_IDS:
            raise KvhookError(f"request_ids={self.request_ids!r}: there are {', '.join(map(repr, REQUEST_IDS))}")
        if not isinstance(self.anonymous, bool):
            raise KvhookError(f"anonymous is True or False, not {self.anonymous!r}")
        _check_share(self.max_overhead)
        _check_slots(self.ring_slots)
        if self.trace_path is not None:
            _check_trace_path(self.trace_path)
        _ = self.history_bytes

    @property
    def trace_path(self) -> Path | None:
        """The file that the run is streamed to, if there is to be one."""
        return Path(self.trace) if self.trace is not None else None

    @property
    def hashes_ids(self) -> bool:
        """Whether request ids that are numbers are recorded as digests too."""
        return self.anonymous or self.request_ids == "hashed"

    @property
    def history_bytes(self) -> int | None:
        """The most bytes of history on disk; None with a trace file, which is not limited."""
        return parse_size(self.history) if self.trace is None else None

    @property
    def ring_capacity(self) -> int:
        """Slots of a ring: `ring_slots` rounded up to a power of two."""
        return max(64, 1 << (self.ring_slots - 1).bit_length())


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text like ``"500MB"``, ``"1GiB"`` or ``"2g"``.

    Raises:
        KvhookError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b|)\s*", str(size), re.IGNORECASE)
    if not match or isinstance(size, (float, bool)):
        raise KvhookError(f"{size!r} is not a size; say bytes, or text like '500MB' or '1GiB'")
    number, unit, rest = match.groups()
    factor = 1000 if rest.lower() == "b" else 1024
    size_in_bytes = float(number) * factor ** " kmgt".index(unit.lower() or " ")
    if size_in_bytes >= 1 << 62:
        raise KvhookError(f"{str(size)[:40]!r} is more than any disk has")
    return int(size_in_bytes)


def _check_share(share: object) -> None:
    if share is None:
        return
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise KvhookError(f"max_overhead is a share of the step time, above 0 and up to 1 (0.01), not {share!r}")


def _check_slots(slots: object) -> None:
    if not isinstance(slots, int) or isinstance(slots, bool) or not 1 <= slots <= MAX_CAPACITY:
        raise KvhookError(f"ring_slots is a number from 1 to {MAX_CAPACITY}, not {slots!r}")


def _check_trace_path(path: Path) -> None:
    if path.suffix != TRACE_SUFFIX:
        raise KvhookError(f"trace={str(path)!r}: a trace ends in {TRACE_SUFFIX}; other formats: session.dump()")
    if not path.parent.is_dir():
        raise KvhookError(f"trace={str(path)!r}: there is no directory {path.parent}; make it first")
