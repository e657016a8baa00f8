"""What a user may choose: the arguments of `kvhook.install`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
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


#: Bytes that the longest name has more which kvhook makes of that of a trace: rank, process, engine core.
_ADDED = 48


def _here() -> str:
    """The current directory; "" if it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


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
        here: the directory that `trace` is relative to: the program may go elsewhere before its engine is made.
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
    here: str = field(default_factory=_here, repr=False, compare=False)

    def check(self) -> None:
        """Look at every option before anything is made.

        Raises:
            KvhookError: one is not usable; the message says which and why.
        """
        for name, known in (("level", LEVELS), ("core", CORE_LEVELS), ("request_ids", REQUEST_IDS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise KvhookError(f"{name}={value!r}: there are {', '.join(map(repr, known))}")
        labels: object = self.labels
        if labels is not None and not callable(labels) and not (isinstance(labels, str) and labels):
            raise KvhookError(
                f"labels={self.labels!r}: a separator in request ids, such as '/', or a function that is given one"
            )
        if not isinstance(self.anonymous, bool):
            raise KvhookError(f"anonymous is True or False, not {self.anonymous!r}")
        _check_share(self.max_overhead)
        _check_slots(self.ring_slots)
        if self.trace is not None:
            _check_trace(as_path("trace", self.trace), self.here)
        if self.ring_dir not in (None, ""):
            as_path("ring_dir", self.ring_dir)
        _check_history(self.history)

    @property
    def trace_path(self) -> Path | None:
        """The file that the run is streamed to, if there is to be one; absolute."""
        return Path(self.here, self.trace) if self.trace is not None else None

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


def _check_history(history: int | str) -> None:
    try:
        parse_size(history)
    except KvhookError as error:
        raise KvhookError(f"history: {error}") from None


def as_path(name: str, value: object) -> str:
    """The text of a path that was given as an argument.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        KvhookError: it is none.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise KvhookError(f"{name}={value!r}: a path is text or a pathlib.Path, not {type(value).__name__}")
    if not text:
        raise KvhookError(f"{name}={value!r}: the path is empty")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise KvhookError(f"{name}={text!r}: this cannot be the name of a file here") from None
    if "\0" in text:
        raise KvhookError(f"{name}={text!r}: no path can hold a NUL")
    return text


def as_absolute(name: str, text: str, here: str | None = None) -> Path:
    """A path that does not depend on the current directory any more.

    Args:
        name: of the argument, for the message.
        text: the path.
        here: the directory that it is relative to, instead of the current one; "" for one that has been removed.

    Raises:
        KvhookError: the current directory has been removed, so that the path names nothing.
    """
    path = Path(_here() if here is None else here, text)
    if not path.is_absolute():
        raise KvhookError(
            f"{name}={text!r}: the current directory has been removed, so that this names no place: go to a directory "
            "that is there (cd), or give the whole path"
        )
    return path


def _check_trace(text: str, here: str) -> None:
    if text.endswith(os.sep):
        raise KvhookError(f"trace={text!r}: this names a folder; a trace is a file that ends in {TRACE_SUFFIX}")
    path = as_absolute("trace", text, here)
    if path.name == TRACE_SUFFIX:
        raise KvhookError(f"trace={text!r}: there is no name before {TRACE_SUFFIX}; say run{TRACE_SUFFIX}, for example")
    if path.suffix != TRACE_SUFFIX:
        raise KvhookError(f"trace={text!r}: a trace ends in {TRACE_SUFFIX}; other formats: session.dump()")
    try:
        there = path.parent.is_dir()
        longest = os.pathconf(path.parent, "PC_NAME_MAX") if there else 255
    except OSError as error:
        raise KvhookError(f"trace={text!r}: {error.strerror or error}") from None
    if not there:
        raise KvhookError(f"trace={text!r}: there is no directory {Path(text).parent}; make it first")
    if (length := len(os.fsencode(path.name))) > longest - _ADDED:
        raise KvhookError(
            f"trace={text!r}: the name of the file has {length} bytes; {longest - _ADDED} are the most here, since "
            f"kvhook calls the files beside it run-rank0{TRACE_SUFFIX}, run.core0-4711{TRACE_SUFFIX} and so on"
        )
