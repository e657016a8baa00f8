"""The collector's sources in their order: the first that can be read answers; why the others could not is kept."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from kvhook.collector import answer, names
from kvhook.collector.reading import Reading, Unavailable
from kvhook.collector.sources import MetricsSource
from kvhook.faults import Faults

log = logging.getLogger("kvhook")


class SourceChain:
    """The sources of one collector, in the order in which they are tried. No method raises for what a source does.

    Args:
        lock: the collector's own, held while something is collected.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.sources: dict[str, MetricsSource] = {}
        self._lock = lock
        self._faults = Faults()
        #: the sources that a warning has named
        self._warned: set[str] = set()

    def read(self, sources: Mapping[str, MetricsSource] | None = None) -> tuple[Reading | None, dict[str, str]]:
        """The first source that can be read, and why those before it could not. With `sources`, only these are tried,
        and nothing is warned of."""
        reading, reasons = None, {}
        for name, source in (self.sources if sources is None else sources).items():
            try:
                reading = source.read()
                break
            except Unavailable as error:
                reasons[name] = str(error)
            except Exception as error:
                reasons[name] = f"{type(error).__name__}: {error}"
                self._faults.fault(f"reading {name}", error, "the collector's next source is tried")
        if reading is not None and reasons and sources is None:
            self._warn_once(reading.source, reasons)
        return reading, reasons

    def collect(self, sources: Mapping[str, MetricsSource] | None = None) -> tuple[dict[str, Any], Reading | None]:
        """What `VLLMMetricsCollector.collect_current_stats` returns, and the reading that it was made of."""
        with self._lock:
            began = time.perf_counter()
            reading, reasons = self.read(sources)
            if reading is None and sources is None:
                self._warn_once(names.UNAVAILABLE, reasons)
            return answer.collection(reading, reasons, time.time(), time.perf_counter() - began), reading

    def errors(self) -> list[dict[str, Any]]:
        """What failed so far: where, the first error, how often."""
        return [
            {"where": where, "error": self._faults.first_errors[where], "times": times}
            for where, times in self._faults.counts.items()
        ]

    @contextlib.contextmanager
    def contained(self, what: str) -> Iterator[None]:
        """Count an error that is raised inside, and go on."""
        try:
            yield
        except Unavailable:
            raise
        except Exception as error:
            self._faults.fault(what, error, "the collector goes on without it")

    def _warn_once(self, source: str, reasons: Mapping[str, str]) -> None:
        if source not in self._warned:
            self._warned.add(source)
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            log.warning("kvhook: the collector's source is %s. What comes before it cannot be read: %s", source, why)
