"""What scripts call beside the collector's documented methods: names of the collectors that they were written with."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvhook.analysis.history import from_samples
from kvhook.collector.reading import Reading

log = logging.getLogger("kvhook")

#: The source of made-up numbers. Every answer that holds some names it.
SIMULATED = "simulated_for_testing"


class ScriptNames:
    """The names that a script may expect of any ``VLLMMetricsCollector``. Each does what another method does."""

    if TYPE_CHECKING:  # of the collector itself
        llm: Any
        sampling_thread: property
        stop_monitoring: Callable[[], None]
        collect_prometheus_metrics: Callable[[], dict[str, Any]]
        get_metrics_history: Callable[[], list[dict[str, Any]]]
        get_comprehensive_stats: Callable[[], dict[str, Any]]
        _play: Callable[[Simulated], None]

    def _collect_prometheus_registry_only(self) -> dict[str, Any]:
        """The same as `collect_prometheus_metrics`."""
        return self.collect_prometheus_metrics()

    def initialize_logging(self) -> bool:
        """Whether there is an engine to collect from. There is nothing to initialize."""
        return self.llm is not None

    @property
    def modern_logging_available(self) -> bool:
        """The same as `initialize_logging`."""
        return self.initialize_logging()

    @property
    def monitor_thread(self) -> Any:
        """The same as `sampling_thread`."""
        return self.sampling_thread

    @property
    def stats_history(self) -> list[dict[str, Any]]:
        """The same as `get_metrics_history`."""
        return self.get_metrics_history()

    @property
    def last_stats(self) -> dict[str, Any]:
        """The last entry of the history; empty without one."""
        history = self.get_metrics_history()
        return history[-1] if history else {}

    def simulate_metrics_for_testing(self, duration_seconds: float = 30, interval: float = 1.0) -> dict[str, Any]:
        """Have this collector answer with made-up numbers from now on, to try out what a script does with them.

        Every answer then has the ``collection_method`` ``simulated_for_testing``. The same numbers come every time.
        """
        self.stop_monitoring()
        log.warning("kvhook: from now on this collector answers with made-up numbers, as %s", SIMULATED)
        self._play(Simulated(duration_seconds, interval))
        return self.get_comprehensive_stats()

    def enable_testing_mode(self) -> None:
        """The same as `simulate_metrics_for_testing`."""
        self.simulate_metrics_for_testing(15, 0.5)


class Simulated:
    """Numbers of no engine: a cache that fills, and a hit rate that rises.

    Args:
        seconds: how long the time is that they tell of. It ends now, and takes no time.
        interval: between two samples, in seconds.
    """

    name = SIMULATED
    polled = False

    def __init__(self, seconds: float, interval: float) -> None:
        count = max(1, math.ceil(seconds / interval))
        self._samples = list(_samples(time.monotonic() - seconds, count, interval))

    def read(self) -> Reading:
        """The last sample, with all of them as its past."""
        _, values = self._samples[-1]
        rows = from_samples(self._samples, math.nan)
        return Reading(self.name, dict(values), {}, {}, {}, True, "the first sample", lambda: rows)


def _samples(begin: float, count: int, interval: float) -> Iterator[tuple[float, dict[str, float]]]:
    chance = random.Random(0)
    queries = hits = generated = 0
    for i in range(count):
        progress = (i + 1) / count
        new = chance.randint(100, 500)
        queries += new
        hits += int(new * 0.8 * progress)
        generated += chance.randint(50, 200)
        values: dict[str, float] = {
            "kv_cache_usage": 0.1 + 0.7 * progress,
            "num_running_reqs": chance.randint(1, 8),
            "num_waiting_reqs": chance.randint(0, 5),
            "prefix_cache_queries": queries,
            "prefix_cache_hits": hits,
            "num_prompt_tokens": queries,
            "num_generation_tokens": generated,
            "num_preempted_reqs": 0,
            "num_finished_reqs": i,
        }
        yield begin + i * interval, values
