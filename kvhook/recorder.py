"""One engine's recorder: its facts, its ring, and the two functions of the step path."""

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

from kvhook.adapters.compiler import Compiled, compile_publisher
from kvhook.adapters.table import Adapter, vllm_version
from kvhook.ring.place import RING_SUFFIX, pid_namespace, process_start
from kvhook.ring.writer import RingWriter
from kvhook.rings import prune

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
    ) -> None:
        self.number = number
        self.compiled: Compiled = compile_publisher(adapter, facts)
        self.meta: dict[str, Any] = {
            "engine": number,
            "adapter": adapter.name,
            **process_facts(),
            **facts,
            "absent": self.compiled.absent,
        }
        with contextlib.suppress(Exception):  # a tidy directory is worth no engine
            prune(directory)
        pid = os.getpid()
        for serial in _serials:
            # the start time in the name: in containers every program may be process 1
            name = f"{pid}-{process_start(pid)}-{serial}{RING_SUFFIX}"
            with contextlib.suppress(FileExistsError):
                self.ring = RingWriter(directory / name, self.compiled.layout, slots, self.meta, crc=NEEDS_CRC)
                break
        self.record, self.publish = self.compiled.bind(self.ring.publish, number, clock)
        self._closing = threading.Lock()

    def close(self) -> None:
        """Mark the ring closed; what it holds can still be read. Closing twice is fine."""
        with self._closing:
            self.ring.close()


def process_facts() -> dict[str, Any]:
    """What there is to know about the process that records."""
    import kvhook

    return {
        "kvhook": kvhook.__version__,
        "vllm": vllm_version(),
        "python": platform.python_version(),
        "pid": os.getpid(),
        "pid_namespace": pid_namespace(),
        "program": os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "",
    }
