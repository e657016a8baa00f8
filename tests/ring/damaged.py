"""An intact trace and an intact ring to be damaged or forged, and everything that can be done with such a file."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvhook.analysis.autopsy import examine
from kvhook.cli import main
from kvhook.discovery.cleaning import leftovers
from kvhook.discovery.follow import follow
from kvhook.discovery.rings import find_rings
from kvhook.errors import KvhookError
from kvhook.ring.layout import SCHEMA_AT, seal
from kvhook.ring.reader import RingReader
from kvhook.text.autopsy import as_text
from kvhook.text.steps import StepLines
from kvhook.trace import open_trace
from tests.ring.synthetic import Recording

STEPS = 30
RING_NAME = "4194999-77-0.ring"  # of a process that cannot be: its number is beyond Linux's largest


class Files:
    """An intact trace, an intact ring of a dead process, and a place for damaged ones."""

    def __init__(self, folder: Path) -> None:
        recording = Recording(folder / "made", slots=64, pid=4194999)
        for n in range(STEPS):
            if n % 5 == 4:
                recording.finish(n, num_prompt_tokens=20, num_generation_tokens=5, finish_reason=1)
            values = {
                "itl_count": 2,
                "itl_min": 0.01,
                "itl_max": 0.02,
                "prefix_cache_queries": 10,
                "prefix_cache_hits": 4,
            }
            recording.step(n / STEPS, **values)
        recording.record("values", step=3, series=1, count=4)
        recording.die()
        recording.spool_to(folder / "run.kvh", 1000)
        self.trace = (folder / "run.kvh").read_bytes()
        self.ring = recording.path.read_bytes()
        self.folder = folder / "bad"
        self.folder.mkdir()
        self.header = struct.unpack_from("<Q", self.trace, 104)[0]

    def put(self, data: bytes, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def use(path: Path) -> int | None:
    """Everything that can be done with a file, in this process, so that an exception is seen as what it is.

    Gives the number of steps, or None where the file was refused.
    """
    trace = None
    with contextlib.suppress(KvhookError):
        trace = open_trace(path)
    if path.suffix == ".ring":
        for ring in find_rings([path.parent]):
            assert ring.path == path
        leftovers([path.parent], path.parent / "none")
        follow_to_the_end(path)
    if trace is None:
        return None
    steps = trace.steps()
    trace.requests()
    for series in ("time_to_first_token", "inter_token_latency"):
        trace.latencies(series)
    summary = trace.summary()
    assert str(summary)
    json.dumps(summary.as_dict())
    autopsy = examine(trace, "killed")
    header = trace.header
    assert header is not None
    assert as_text(autopsy, StepLines(header.monotonic_ns, header.realtime_ns))
    json.dumps(autopsy.as_dict())
    for suffix in (".jsonl", ".csv", ".kvh"):
        with contextlib.suppress(KvhookError):
            trace.dump(path.with_name(f"out{suffix}"), overwrite=True)
    for out in path.parent.glob("out*"):
        out.unlink()
    return len(steps)


def follow_to_the_end(path: Path) -> None:
    from kvhook.cli.tail import lines

    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 100:
            raise TimeoutError

    try:
        with RingReader(path) as reader:
            news = follow(reader, sleep=sleep, clock=lambda: now[0])
            for as_json in (False, True):
                for line in lines(news, reader.header, as_json=as_json, say=lambda text: None):
                    assert "\n" not in line
    except (KvhookError, TimeoutError):
        pass


def commands(path: Path) -> list[tuple[int, str]]:
    """Exit code and what is said on stderr, of every verb that takes a file."""
    said = []
    for argv in (["summary", path], ["autopsy", path], ["export", path, path.with_name("out.jsonl"), "--force"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            said.append((main([str(a) for a in argv]), err.getvalue()))
    path.with_name("out.jsonl").unlink(missing_ok=True)
    return said


def forged(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Another schema, with every checksum right: what a forger would do, and what no checksum finds."""
    at, size = struct.unpack_from("<2Q", data, 56)
    header = struct.unpack_from("<Q", data, 104)[0]
    schema = json.loads(data[at : at + size])
    changed = change(schema)
    text = changed if isinstance(changed, bytes) else json.dumps(schema).encode()
    pages = -(-(SCHEMA_AT + len(text)) // 4096) * 4096
    head = bytearray(data[:SCHEMA_AT] + text.ljust(pages - SCHEMA_AT, b"\0"))
    struct.pack_into("<3Q", head, 56, SCHEMA_AT, len(text), zlib.crc32(text))
    struct.pack_into("<Q", head, 104, pages)
    return seal(head) + data[header:]


def set_to(**facts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda s: s.update(facts)
