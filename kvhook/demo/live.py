"""Live lines: a thread that reads the ring while the engine works, as another process could."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.text.bar import bar, shows_blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: A line for so many steps.
EVERY = 25


class LiveLines:
    """Prints a line per `EVERY` steps while it is entered.

    Args:
        ring: the ring to read.
        write: takes each line.
    """

    def __init__(self, ring: Path, write: Callable[[str], None]) -> None:
        self._ring = ring
        self._write = write
        self._stop = threading.Event()
        self._flush = threading.Event()
        self._flushed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvhook-demo-live", daemon=True)
        self._queries = self._hits = 0
        self._ascii_only = not shows_blocks()

    def __enter__(self) -> LiveLines:
        try:
            self._thread.start()
        except RuntimeError as error:
            self._write(f"(there are no live lines: {error})")
        return self

    def flush(self) -> None:
        """Print what has been recorded so far, also if it is less than a line's worth."""
        if self._thread.ident is not None:
            self._flushed.clear()
            self._flush.set()
            self._flushed.wait(5)

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        import numpy as np

        from kvhook.ring.reader import RingReader
        from kvhook.ring.slots import fields_of, slot_head
        from kvhook.schema import STEP

        with RingReader(self._ring) as reader:
            held: list[npt.NDArray[np.void]] = []
            while True:
                self._flush.wait(0.1)
                last = self._flush.is_set()
                self._flush.clear()
                slots = reader.poll().slots
                steps = slots[slot_head(slots)["kind"] == STEP]
                held.append(fields_of(steps, reader.header.layout.columns["step"]))
                rows = np.concatenate(held)
                while len(rows) >= EVERY or (last and len(rows)):
                    self._write(self.line(rows[:EVERY]))
                    rows = rows[EVERY:]
                held = [rows]
                if last:
                    self._flushed.set()
                if self._stop.is_set():
                    return

    def line(self, steps: npt.NDArray[np.void]) -> str:
        """Some steps as a line: the peak of usage and waiting, the hit rate of the run so far."""
        self._queries += int(steps["prefix_cache_queries"].sum())
        self._hits += int(steps["prefix_cache_hits"].sum())
        known = steps[steps["has_scheduler_stats"] == 1]
        usage = float(known["kv_cache_usage"].max()) if len(known) else 0.0
        rate = f"{100 * self._hits / self._queries:3.0f} %" if self._queries else "  - "
        preempted = int(steps["num_preempted_reqs"].sum())
        return (
            f"step {int(steps['step'][-1]):5}  KV {bar(usage, ascii_only=self._ascii_only)} {100 * usage:3.0f} %"
            f"  running {int(max(known['num_running_reqs'], default=0)):2}"
            f"  waiting {int(max(known['num_waiting_reqs'], default=0)):2}"
            f"  hit rate {rate}"
            f"  {int(steps['num_generation_tokens'].sum()):4} tokens"
            + (f"  {preempted} preempted" if preempted else "")
        )
