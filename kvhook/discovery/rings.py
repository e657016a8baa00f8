"""The rings of this user on this machine: find them, and choose one.

Rings of processes that have ended stay, so that `kvhook autopsy` can read them: until `kvhook clean`, or until there
are too many: see `kvhook.discovery.cleaning`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kvhook.core_schema import CORE_STEP
from kvhook.errors import KvhookError
from kvhook.ring.directory import FRONT_ENDS, info_of, ring_files
from kvhook.ring.layout import CLOSED, Header
from kvhook.ring.place import RING_NAME, RING_SUFFIXES, is_alive
from kvhook.ring.reader import RingReader, writer_alive
from kvhook.ring.slots import fields_of, slot_head
from kvhook.ring.trace_file import header_of
from kvhook.schema import STEP

#: What becomes of a ring: its process runs, has ended without closing it, has closed it, or its header is damaged.
ALIVE, DEAD, CLOSED_RING, DAMAGED = "alive", "dead", "closed", "damaged"

#: `clean` takes what is older than this, in seconds.
OLD = 24 * 3600.0

#: What is recorded -> the records by which a ring's progress is told: their kind, their columns, their last time.
_PROGRESS = {"": (STEP, "step", "t_end_ns"), "core": (CORE_STEP, "core_step", "t_end_ns")}
#: Slots at the end of a ring that are looked at for its last step.
_TAIL = 64


class Ring(NamedTuple):
    """A ring file as it was found. Times in seconds since 1970, 0 where they are not known."""

    path: Path
    state: str
    pid: int
    engine: int
    bytes: int
    #: when it was made, and when its last step ended
    started: float
    last: float
    #: steps of the engine so far; None where the ring does not tell
    steps: int | None = None
    records: int = 0
    program: str = ""
    model: str = ""
    vllm: str = ""
    kvhook: str = ""
    #: why it cannot be read
    problem: str = ""
    #: its process is in another container, so that it cannot be seen from here whether it runs: it counts as alive
    elsewhere: bool = False
    #: what is recorded, a key of `kvhook.ring.place.RING_SUFFIXES`
    stream: str = ""

    @property
    def ended(self) -> bool:
        """Whether its process no longer writes to it, and it can be read."""
        return self.state in (DEAD, CLOSED_RING)


def find_rings(places: Iterable[Path], streams: Iterable[str] = FRONT_ENDS) -> list[Ring]:
    """Every ring in these directories, the newest first. Nothing raises: what cannot be read is `DAMAGED`.

    Args:
        streams: what is recorded in them, keys of `kvhook.ring.place.RING_SUFFIXES`.
    """
    return sorted(map(look_at, ring_files(places, streams)), key=lambda r: (r.started, r.pid, r.engine), reverse=True)


def look_at(path: Path) -> Ring:
    """A ring file: whose it is, how it is, and how far it has come."""
    ring, header = glance(path)
    if header is None:
        return ring
    try:
        with RingReader(path) as reader:
            return ring._replace(**_progress(reader, ring.stream))
    except (KvhookError, OSError) as error:
        return ring._replace(state=ring.state if ring.state == ALIVE else DAMAGED, problem=str(error))


def choose(
    rings: list[Ring], pid: int | None = None, engine: int | None = None, prefer: tuple[str, ...] = (ALIVE,)
) -> Ring:
    """One ring of several: the newest of the first state in `prefer` that there is one of, else the newest.

    Args:
        rings: newest first, as `find_rings` gives them.
        pid: only rings of this process.
        engine: only the ring of this engine of a process.
        prefer: states, best first.

    Raises:
        KvhookError: there is none; the message says what there is.
    """
    fit = [r for r in rings if pid in (None, r.pid) and engine in (None, r.engine) and r.state != DAMAGED]
    for state in prefer:
        for ring in fit:
            if ring.state == state:
                return ring
    if fit:
        return fit[0]
    what = f"{f' of process {pid}' if pid is not None else ''}{f' for engine {engine}' if engine is not None else ''}"
    others = sorted({r.pid for r in rings if r.state != DAMAGED})
    hint = (
        f"there are rings of {', '.join(map(str, others))}: kvhook ls"
        if others
        else "a program makes one with kvhook.install() when its LLM(...) starts; rings of others are not looked at"
    )
    raise KvhookError(f"there is no ring{what}; {hint}")


def wait_for(
    places: Callable[[], Iterable[Path]],
    pid: int | None = None,
    engine: int | None = None,
    *,
    interval: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> Ring:
    """The newest ring that is being written; waits for one if there is none."""
    while True:
        for ring in find_rings(places()):
            if ring.state == ALIVE and not ring.problem and pid in (None, ring.pid) and engine in (None, ring.engine):
                return ring
        sleep(interval)


def parse_pid(text: str) -> int | Path:
    """The number of a process, or the path of a file.

    Raises:
        KvhookError: it is neither.
    """
    if text.isascii() and text.isdecimal() and len(text) < 11:
        return int(text)
    if not os.path.exists(text):
        raise KvhookError(f"{text!r} is neither the number of a process nor a file; kvhook ls shows what there is")
    return Path(text)


# ---- looking at files ----------------------------------------------------------------------------------------------


def glance(path: Path) -> tuple[Ring, Header | None]:
    """What a ring's header tells, without looking at its records; the header is None if it is damaged."""
    info = info_of(path)
    size, changed = (info.st_size, info.st_mtime) if info else (0, 0.0)
    try:
        header = header_of(path, follow_links=False)
    except (KvhookError, OSError) as error:
        return _unreadable(path, size, changed, str(error)), None
    if not header.capacity:
        return _unreadable(path, size, changed, f"{path} is a trace, not a ring"), None
    facts: dict[str, Any] = header.meta
    state = CLOSED_RING if header.state == CLOSED else ALIVE if writer_alive(header) else DEAD
    texts: dict[str, Any] = {name: facts.get(name) or "" for name in ("program", "model", "vllm", "kvhook")}
    return (
        Ring(
            path,
            state,
            header.pid,
            facts.get("engine") or 0,
            size,
            _made(header) or changed,
            0.0,
            elsewhere=is_elsewhere(header),
            stream=_stream_of(path),
            **texts,
        ),
        header,
    )


def _unreadable(path: Path, size: int, changed: float, problem: str) -> Ring:
    """A ring that cannot be read. Its name still tells whose it is: it may be one that is just being made."""
    match = RING_NAME.fullmatch(path.name)
    pid, start, engine = (int(g) for g in match.groups()[:3]) if match else (0, 0, 0)
    state = ALIVE if is_alive(pid, start) else DAMAGED
    return Ring(path, state, pid, engine, size, changed, changed, problem=problem, stream=_stream_of(path))


def _stream_of(path: Path) -> str:
    return next((stream for stream, suffix in RING_SUFFIXES.items() if suffix == path.suffix), "")


def is_elsewhere(header: Header) -> bool:
    """Whether a file counts as alive only because its process, in another container, cannot be seen."""
    return writer_alive(header) and not is_alive(header.pid, header.process_start)


def _made(header: Header) -> float:
    """When a ring was made; 0 if what its header says cannot be."""
    seconds = header.realtime_ns / 1e9
    return seconds if seconds < time.time() + OLD else 0.0


def _progress(reader: RingReader, stream: str) -> dict[str, Any]:
    """How many records and steps there have been, and when the last step ended."""
    if stream not in _PROGRESS:
        return {"records": reader.head}
    code, kind, time_column = _PROGRESS[stream]
    header = reader.header
    dead = not reader.writer_alive
    records = reader.head
    found: dict[str, Any] = {"records": records}
    for begin in (records - _TAIL, None):
        if dead:
            slots = reader.remains()
        else:
            oldest = max(0, records - header.capacity + 1)
            reader.cursor = max(oldest, begin) if begin is not None else oldest
            slots = reader.poll().slots
        steps = slots[slot_head(slots)["kind"] == code]
        columns = header.layout.columns[kind]
        if dead and len(slots):
            found["records"] = int(slot_head(slots)["n"][-1]) + 1
        if len(steps) and {"step", time_column} <= {c.name for c in columns}:
            last = fields_of(steps[-1:], columns)[0]
            seconds = (header.realtime_ns + int(last[time_column]) - header.monotonic_ns) / 1e9
            made = _made(header)
            return found | {
                "steps": int(last["step"]) + 1,
                "last": seconds if made <= seconds < time.time() + 1 else made,
            }
        if dead:
            break
    return found | ({"steps": 0} if not found["records"] else {})
