"""What is to be done with an engine core, told to whatever process it comes to life in.

`kvhook.install` makes the plan. In its own process, and in one that is forked off, the plan is simply there; a process
that is spawned finds it in the environment, where `kvhook.plugin` looks, which vLLM loads in all its processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvhook.ring.place import open_regular

#: The variable that holds the plan as JSON. Without it the plug-in does nothing.
VARIABLE = "KVHOOK_CORE_PLAN"


#: path of a mark -> a descriptor of it, which stays even if somebody removes the file
_marks: dict[str, int] = {}


def _forget(mark: str) -> None:
    descriptor = _marks.pop(mark, None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(descriptor)


@dataclass(frozen=True)
class CorePlan:
    """Where and how engine cores are recorded.

    Attributes:
        level: a value of `kvhook.options.CORE_LEVELS`, not ``"off"``.
        ring_dir: directory of the rings.
        ring_slots: records a ring holds, a power of two.
        stem: path of the trace files, up to what tells them apart.
        limit: bytes of trace files a process may keep; None for no limit.
        session: a name for this recording, which its files carry.
        key: of the digests of this recording, in hexadecimal.
        pid: process that made the plan. It is carried out there and in its children, nowhere else.
        mark: a file that is empty for as long as the plan is to be carried out: an engine core in another process
            cannot be told otherwise that its session has been closed. "" for none.
        hash_ids: whether request ids that are numbers are recorded as digests too.
        anonymous: whether the facts that could name somebody are left out.
        temporary: whether the trace files go into a folder of this recording's own, which is removed with it.
    """

    level: str
    ring_dir: str
    ring_slots: int
    stem: str
    limit: int | None
    session: str
    key: str
    pid: int
    mark: str = ""
    hash_ids: bool = False
    anonymous: bool = False
    temporary: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the session has been closed. That somebody has cleaned up and taken the mark away means nothing to
        whoever has asked before."""
        if not self.mark:
            return False
        try:
            if self.mark not in _marks:
                _marks[self.mark] = open_regular(self.mark, follow_links=False)
            over = os.fstat(_marks[self.mark]).st_size > 0
        except OSError:
            return True
        if over:
            _forget(self.mark)
        return over

    def names(self, process: int, core: int, stream: str = "core") -> Callable[[int], Iterator[Path]]:
        """What the trace files of an engine core, or of its ledger of blocks, may be called.

        Returns:
            Called with the number of a file, from 0, it gives names without end, of which the first that is free is
            to be taken: in another container a process of the same number may have taken some. They are behind those
            of the files before, since files are read in the order of their names.
        """
        last, whose = -1, -1

        def of(part: int) -> Iterator[Path]:
            nonlocal last, whose
            last, whose = max(part, last if part == whose else last + 1), part
            while True:
                more = f"-{last + 1}" if last else ""
                yield Path(f"{self.stem}.{stream}{core}-{process}{more}.kvh")
                last += 1

        return of

    def publish(self) -> CorePlan:
        """Put the plan into the environment, for processes that are spawned from now on.

        Returns:
            The plan; without a mark if none can be made.
        """
        if self.mark:
            try:
                _marks[self.mark] = os.open(self.mark, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError:
                return replace(self, mark="").publish()
        os.environ[VARIABLE] = json.dumps(asdict(self))
        return self

    def withdraw(self) -> None:
        """Take the plan out of the environment, if it is this one, and tell the engine cores that it is over."""
        if self.mark:
            with contextlib.suppress(OSError, KeyError):
                os.write(_marks[self.mark], b"over")
            _forget(self.mark)
            with contextlib.suppress(OSError):
                os.unlink(self.mark)
        if read_plan() == self:
            os.environ.pop(VARIABLE, None)

    def is_meant_for_this_process(self) -> bool:
        """Whether this process made the plan, or is a worker of `multiprocessing` that the maker of the plan started:
        vLLM's engine cores are. A program that the user starts from theirs inherits the environment, and is neither."""
        if self.pid == os.getpid():
            return True
        parent = multiprocessing.parent_process()
        return parent is not None and parent.pid == self.pid


def read_plan() -> CorePlan | None:
    """The plan in the environment; None if there is none that can be read."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        plan = CorePlan(**json.loads(text))
        bytes.fromhex(plan.key)
    except (ValueError, TypeError, RecursionError):
        return None
    return plan if all(isinstance(getattr(plan, name), kind) for name, kind in _TYPES.items()) else None


#: What a plan in the environment has to consist of: somebody else may have set the variable.
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("level", "ring_dir", "stem", "session", "key", "mark"), str),
    **dict.fromkeys(("ring_slots", "pid"), int),
    **dict.fromkeys(("hash_ids", "anonymous", "temporary"), bool),
    "limit": (int, type(None)),
}
