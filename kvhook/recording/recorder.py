"""One engine's recorder: its facts, its ring, and the functions of the step path."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvhook import __version__
from kvhook.adapters.publisher import Compiled, OnSample, compile_publisher, no_sample
from kvhook.adapters.step_functions import Counters, StepFunctions
from kvhook.adapters.table import Adapter, vllm_version
from kvhook.discovery.cleaning import prune
from kvhook.facts import without_names
from kvhook.hooks.quiet import do_nothing
from kvhook.recording.launched import facts_of_runs
from kvhook.recording.own_files import rank_of
from kvhook.ring.place import RING_SUFFIX, pid_namespace, process_start
from kvhook.ring.writer import RingWriter

#: Processors that may reorder stores: there each record carries a crc, since Python has no memory fence.
NEEDS_CRC = platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386")

#: Every ring of a process has a number of its own, also after another session.
_serials = itertools.count()


class Recorder:
    """Records one engine into one ring.

    Args:
        number: number of the engine in this process, from 0.
        adapter: the tables that fit this vLLM.
        facts: what is known of the engine: see `kvhook.adapters.config.engine_facts`.
        directory: where the ring goes.
        slots: its capacity, a power of two.
        clock: monotonic nanoseconds.
        on_sample: is called with what kvhook took in a step, see `kvhook.adapters.publisher.OnSample`.
        on_orphan: is called with False when stats were published for which no step had come, and with True when a
            step was published whose outputs nobody had counted.

    Raises:
        OSError: the ring cannot be made.
        LookupError: vLLM's classes are not where the adapter says.
    """

    def __init__(
        self,
        number: int,
        adapter: Adapter,
        facts: Mapping[str, Any],
        directory: Path,
        slots: int,
        clock: Callable[[], int],
        on_sample: OnSample = no_sample,
        on_orphan: Callable[[bool], None] = do_nothing,
    ) -> None:
        self.number = number
        self._facts, self._clock, self._on_sample = facts, clock, on_sample
        self.compiled: Compiled = compile_publisher(adapter, facts)
        self.meta: dict[str, Any] = without_names(
            {
                "engine": number,
                "adapter": adapter.name,
                **process_facts(),
                **facts,
                "absent": self.compiled.absent,
                "levels": [{"step": 0, "level": adapter.level}],
            }
        )
        with contextlib.suppress(Exception):  # a directory that cannot be tidied is no reason not to record
            prune(directory)
        pid = os.getpid()
        for serial in _serials:
            # the start time in the name: in containers every program may be process 1
            name = f"{pid}-{process_start(pid)}-{serial}{RING_SUFFIX}"
            with contextlib.suppress(FileExistsError):
                self.ring = RingWriter(directory / name, self.compiled.layout, slots, self.meta, crc=NEEDS_CRC)
                break
        self._on_orphan = on_orphan
        self.functions = self._bind(self.compiled, Counters())
        self._closing = threading.RLock()

    def go_on(self, adapter: Adapter, level: str, start: Counters) -> StepFunctions:
        """Make functions that record at another level from now on, into the same ring.

        Raises:
            LookupError: vLLM's classes are not where the adapter says.
        """
        facts = {**self._facts, **{name: ask() for name, ask in adapter.asks.items()}}
        compiled = compile_publisher(adapter, facts, level=level, layout=self.compiled.layout)
        self.functions = self._bind(compiled, start)
        return self.functions

    def _bind(self, compiled: Compiled, start: Counters) -> StepFunctions:
        publish = self.ring.publish
        return compiled.bind(publish, self.number, self._clock, self._on_sample, start, self._on_orphan)

    def close(self) -> None:
        """Mark the ring closed; what it holds can still be read. Closing twice is fine."""
        with self._closing:
            self.ring.close()
            # the session keeps its recorders; these functions would keep the ring mapped as long
            self.functions = StepFunctions.none()
            # some 10 KB that are not needed any more
            self.compiled = self.compiled._replace(source="", names={})


def process_facts() -> dict[str, Any]:
    """Facts about the process that records."""
    return {
        "kvhook": __version__,
        "vllm": vllm_version(),
        "python": platform.python_version(),
        "pid": os.getpid(),
        "parent_pid": os.getppid(),
        "rank": rank_of(os.environ),
        "pid_namespace": pid_namespace(),
        "program": os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "",
        **facts_of_runs(),
    }
