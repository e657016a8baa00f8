"""Rings made by hand: what stands in them is known to the last number, and their process can be said to be dead."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

from kvhook.ring.layout import STATE_WORD, make_layout, seal
from kvhook.ring.place import pid_namespace, process_start
from kvhook.ring.trace_file import TraceWriter
from kvhook.ring.writer import RingWriter
from kvhook.schema import KINDS, blank

LAYOUT = make_layout({})
BLOCKS = 100
MS = 1_000_000


class Recording:
    """An engine that does what the test says: ``step(...)``, ``finish(...)``, ``values(...)``."""

    def __init__(
        self, directory: Path, *, slots: int = 256, engine: int = 0, pid: int | None = None, **facts: Any
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.pid = os.getpid() if pid is None else pid
        self.start = process_start(os.getpid())
        self.path = directory / f"{self.pid}-{self.start}-{engine}.ring"
        self.engine = engine
        self.meta: dict[str, Any] = {
            "engine": engine,
            "kvhook": "0.1.0",
            "vllm": "0.32.0",
            "python": "3.11.7",
            "adapter": "v1",
            "pid": self.pid,
            "pid_namespace": pid_namespace(),
            "program": "serve.py",
            "model": "tiny-llama",
            "num_kv_blocks": BLOCKS,
            "block_size": 16,
            "enable_prefix_caching": True,
            "hook_call_ns": 500,
            "absent": {"step": {"mm_cache_hits": "this vLLM has no stats of the multi-modal cache"}, "request": {}},
            **facts,
        }
        self.ring = RingWriter(self.path, LAYOUT, slots, self.meta)
        self.n = self.steps = self.requests = 0
        self.clock = time.monotonic_ns()
        if pid is not None:
            self.patch(pid=pid)

    def record(self, kind: str, **values: Any) -> None:
        """One record; what is not given is blank."""
        code, fields = KINDS[kind]
        blanks = {f.name: float(blank(f)) if f.type == "f8" else int(blank(f)) for f in fields}
        assert values.keys() <= blanks.keys(), values.keys() - blanks.keys()
        cells = [(blanks | values)[c.name] for c in LAYOUT.columns[kind]]
        self.n = self.ring.publish(self.n, LAYOUT.struct_of(kind).pack(self.n, code, self.engine, *cells))

    def step(self, usage: float = 0.25, *, took_ms: float = 10.0, **values: Any) -> None:
        """One step with stats."""
        start = self.clock
        self.clock += int(took_ms * MS)
        self.record(
            "step",
            **{
                "step": self.steps,
                "t_start_ns": start,
                "t_end_ns": self.clock,
                "has_scheduler_stats": 1,
                "has_iteration_stats": 1,
                "kv_cache_usage": usage,
                "num_kv_blocks": BLOCKS,
                "num_kv_blocks_used": int(usage * BLOCKS + 0.5) if usage == usage else -1,
                "num_running_reqs": 4,
                "num_waiting_reqs": 0,
                "num_generation_tokens": self.steps,
                **values,
            },
        )
        self.steps += 1

    def finish(self, request_id: int, **values: Any) -> None:
        """One finished request, before the step it belongs to."""
        given = {"request": self.requests, "request_id": request_id, "step": self.steps, "e2e_latency": 1.5, **values}
        self.record("request", **given)
        self.requests += 1

    def values_of(self, step: int, values: list[float], series: int = 1) -> None:
        """Single latencies of a step, before it: inter-token latencies unless `series` says otherwise."""
        code, _ = KINDS["values"]
        room = LAYOUT.values_per_slot
        pack = LAYOUT.struct_of("values", tail=f"{room}d").pack
        for at in range(0, len(values), room):
            some = values[at : at + room]
            head = {"step": step, "series": series, "count": len(some)}
            cells = [head[c.name] for c in LAYOUT.columns["values"]]
            self.n = self.ring.publish(
                self.n, pack(self.n, code, self.engine, *cells, *some, *[0.0] * (room - len(some)))
            )

    def run(self, steps: int) -> Recording:
        """So many plain steps."""
        for _ in range(steps):
            self.step()
        return self

    def patch(self, *, pid: int | None = None, start: int | None = None, realtime_ns: int | None = None) -> None:
        """Other words in the header, with the right seal."""
        head = bytes(self.ring.map[:256])
        words = list(struct.unpack_from("<14Q", head))
        for at, value in ((4, pid), (6, start), (11, realtime_ns)):
            words[at] = words[at] if value is None else value
        self.ring.map[:256] = seal(struct.pack("<14Q", *words) + head[112:])

    def die(self) -> Recording:
        """Its process is gone: the number belongs to another one now, that began at another time."""
        self.patch(start=self.start + 1)
        new = self.path.with_name(f"{self.pid}-{self.start + 1}-{self.engine}.ring")
        self.path = self.path.rename(new)
        return self

    def age(self, seconds: float) -> Recording:
        """It was so long ago."""
        self.patch(realtime_ns=time.time_ns() - int(seconds * 1e9))
        at = time.time() - seconds
        os.utime(self.path, (at, at))
        return self

    def close(self) -> Recording:
        self.ring.words[STATE_WORD] = 2
        return self

    def spool_to(self, path: Path, records: int) -> None:
        """A trace of the first so many records, as a spool leaves it when the process is killed."""
        from kvhook.ring.reader import RingReader

        writer = TraceWriter(path, LAYOUT, {"kvhook": "0.1.0", "vllm": "0.32.0", "pid_namespace": pid_namespace()})
        writer.append_meta(self.engine, self.meta)
        with RingReader(self.path, 0) as reader:
            writer.append(reader.poll(records).slots)
        with open(path, "r+b") as file:
            head = file.read(256)
            words = list(struct.unpack_from("<14Q", head))
            words[4], words[6] = self.pid, int(self.path.name.split("-")[1])
            file.seek(0)
            file.write(seal(struct.pack("<14Q", *words) + head[112:]))
        os.close(writer._fd)
        writer._fd = -1


class CoreRecording:
    """An engine core that does what the test says: ``record("core_step", ...)``. What is not given is blank."""

    def __init__(self, directory: Path, *, slots: int = 4096, **facts: Any) -> None:
        from kvhook.core_schema import CORE_KINDS

        directory.mkdir(parents=True, exist_ok=True)
        self.kinds, self.layout = CORE_KINDS, make_layout({}, CORE_KINDS)
        meta = {"engine": 0, "stream": "core", "vllm": "0.32.0", "block_size": 16, "num_kv_blocks": BLOCKS, **facts}
        self.ring = RingWriter(directory / "core.ring", self.layout, slots, meta)
        self.n = self.clock = 0

    def record(self, kind: str, **values: Any) -> None:
        """One record; an enum is given as text."""
        from kvhook.core_schema import CORE_ENUMS

        code, fields = self.kinds[kind]
        known = {f.name: 0 if f.role == "counter" else -1 for f in fields}
        assert values.keys() <= known.keys(), values.keys() - known.keys()
        cells = {n: CORE_ENUMS[n].index(v) if isinstance(v, str) else v for n, v in values.items()}
        packed = self.layout.struct_of(kind).pack(self.n, code, 0, *((known | cells)[f.name] for f in fields))
        self.n = self.ring.publish(self.n, packed)

    def step(self, took_ms: float = 1.0, *, used: int = 50, cached: int = 20, **values: Any) -> None:
        """One step that decodes for ten requests, or does what is given."""
        start = self.clock
        self.clock += int(took_ms * MS)
        times = {"t_schedule_ns": start, "t_scheduled_ns": start, "t_update_ns": self.clock, "t_end_ns": self.clock}
        blocks = {
            "num_kv_blocks": BLOCKS,
            "num_kv_blocks_peak": used,
            "num_kv_blocks_cached": cached,
            "num_kv_blocks_empty": BLOCKS - used - cached,
        }
        plain = {"num_decode_tokens": 10, "limited_by": "none_waiting"} | values
        kinds = ("num_prefill_tokens", "num_recomputed_tokens", "num_decode_tokens")
        self.record("core_step", **times, **blocks, num_scheduled_tokens=sum(plain.get(k, 0) for k in kinds), **plain)

    def cores(self) -> Any:
        """What was recorded, as `kvhook.records.core.CoreRecords`."""
        from kvhook.records.core import CoreRecords
        from kvhook.records.sources import ArraySlots
        from kvhook.ring.reader import RingReader

        with RingReader(self.ring.path) as reader:
            return CoreRecords([[ArraySlots(reader.now(), reader.header)]], "test")
