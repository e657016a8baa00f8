"""Rings as engines leave them, made by hand, and what `kvhook top` reads in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvhook.analysis.live import View
from kvhook.core.writer import core_layout
from kvhook.core_schema import CORE_KINDS
from kvhook.discovery.watch import Wanted, Watch, everybody
from kvhook.ring.place import pid_namespace
from kvhook.ring.writer import RingWriter
from kvhook.schema import blank
from tests.ring.synthetic import Recording

NOW = 10_000_000_000


class Core:
    """The ring of an engine core, made by hand."""

    def __init__(self, recording: Recording, **more: Any) -> None:
        path = recording.path.with_suffix(".core")
        facts = {"engine": 0, "stream": "core", "parent": recording.pid, "pid": recording.pid} | more
        self.ring = RingWriter(path, core_layout(), 256, facts | {"pid_namespace": pid_namespace()})
        self.n = 0

    def step(self, **values: Any) -> None:
        code, fields = CORE_KINDS["core_step"]
        blanks = {f.name: float(blank(f)) if f.type == "f8" else int(blank(f)) for f in fields}
        cells = [(blanks | values)[c.name] for c in core_layout().columns["core_step"]]
        self.n = self.ring.publish(self.n, core_layout().struct_of("core_step").pack(self.n, code, 0, *cells))


def watched(folder: Path, window: float = 10.0, now_ns: int | None = None, wanted: Wanted = everybody) -> list[View]:
    watch = Watch(lambda: [folder], wanted)
    watch.refresh()
    views = watch.views(window, now_ns)
    watch.close()
    return views


def busy(folder: Path, engine: int = 0, **facts: Any) -> Recording:
    """Twenty steps of 100 ms: two seconds."""
    recording = Recording(folder, engine=engine, **facts)
    recording.clock = NOW - 2_000_000_000
    for n in range(20):
        recording.step(
            n / 20,
            took_ms=100.0,
            num_running_reqs=n,
            num_waiting_reqs=20 - n,
            num_generation_tokens=10,
            num_prompt_tokens=40,
            num_prompt_tokens_computed=30,
            prefix_cache_queries=40,
            prefix_cache_hits=10 if n < 10 else 30,
            num_preempted_reqs=n == 19,
            num_finished_reqs=1,
            num_aborted_reqs=n == 3,
            ttft_count=1,
            ttft_min=n / 100,
            ttft_max=n / 100,
            kvhook_ns=4500,
        )
    return recording
