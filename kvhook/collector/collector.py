"""`VLLMMetricsCollector`: start, generate, ask, stop."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook import hooks
from kvhook.adapters.table import read_path
from kvhook.collector import about, answer, names, saving
from kvhook.collector.chain import SourceChain
from kvhook.collector.monitored import MonitoredTimes
from kvhook.collector.optional import need
from kvhook.collector.prometheus import as_json
from kvhook.collector.reading import Unavailable
from kvhook.collector.sampler import Sampler
from kvhook.collector.scripts import ScriptNames, Simulated
from kvhook.collector.sources import EngineSource, HookSource, MetricsSource, RegistrySource
from kvhook.errors import KvhookError

if TYPE_CHECKING:
    import os

    import pandas

    from kvhook.analysis.history import History

log = logging.getLogger("kvhook")


class VLLMMetricsCollector(ScriptNames):
    """Collects the metrics of a vLLM engine around calls of ``generate``.

    Three sources are tried in this order, and each answer names the one it came from: ``hook`` (kvhook's own
    recording, every step), ``internal_engine_stats`` (the engine's objects), ``prometheus_registry``
    (``LLM.get_metrics()``). Only the last two are sampled by a thread; what they did between two samples is not seen.
    No method raises for what happens in the engine: what cannot be had is absent, with its reason.

    Args:
        llm: a ``vllm.LLM`` (or engine), which is not kept alive. Without it, `start_monitoring` installs kvhook, and
            the engines that are made afterwards are recorded.
        collection_interval: seconds between two samples of a source that must be polled.
        enable_monitoring: False: `start_monitoring` does nothing; collecting by hand still works.
        llm_instance: the same as `llm`.
        source: read this source and no other, to compare them.

    Raises:
        KvhookError: the interval is not a positive number, or there is no such source.
    """

    def __init__(
        self,
        llm: Any = None,
        collection_interval: float = 1.0,
        enable_monitoring: bool = True,
        *,
        llm_instance: Any = None,
        source: str | None = None,
    ) -> None:
        self.collection_interval = _positive(collection_interval)
        self.enable_monitoring = enable_monitoring
        if source not in (None, *names.SOURCES):
            raise KvhookError(f"there is no source {source!r}; there are {', '.join(names.SOURCES)}")
        self._source = source
        self._lock = threading.RLock()
        self._chain = SourceChain(self._lock)
        self._look_at(llm if llm is not None else llm_instance)
        self._times = MonitoredTimes()
        self._sampler: Sampler | None = None
        #: whether there is no thread for it yet, which is tried again
        self._unsampled = False

    @property
    def llm(self) -> Any:
        """What was given as `llm`, as long as somebody else keeps it. May be set later, also while monitoring is on."""
        return self._llm()

    @llm.setter
    def llm(self, llm: Any) -> None:
        monitoring = self.monitoring
        self.stop_monitoring()
        with self._lock:
            installed = self._hook.installed
            self._look_at(llm)
            self._hook.installed = installed
        if monitoring:
            self.start_monitoring()

    # ---- monitoring ------------------------------------------------------------------------------------------------

    @property
    def monitoring(self) -> bool:
        """Whether monitoring is on."""
        return self._times.going_on

    @property
    def sampling_thread(self) -> threading.Thread | None:
        """The thread that samples a source that must be polled; None if there is none."""
        return None if self._sampler is None else self._sampler.thread

    @property
    def recording(self) -> HookSource:
        """kvhook's own recording, as the collector sees it: its session, and the number of its engine in it."""
        return self._hook

    def start_monitoring(self) -> None:
        """Begin a monitored time. Starting twice is starting once.

        Has the engine recorded by kvhook where that is still possible. Where it is not, a daemon thread samples.
        """
        with self._lock:
            if self.monitoring or not self.enable_monitoring:
                return
            if names.HOOK in self._chain.sources:
                with self._chain.contained("starting to record"):
                    self._hook.begin()
            reading, _ = self._chain.read()
            self._times.begin(time.monotonic() if reading is None else reading.t)
            if reading is not None and not self._chain.sources[reading.source].polled:
                return
            self._times.keep(reading)
            self._sample_from_now()

    def _sample_from_now(self) -> None:
        self._unsampled = True
        with self._chain.contained("starting the thread that samples"):
            self._sampler = Sampler(self._sample, self.collection_interval)
            self._unsampled = False

    def stop_monitoring(self) -> None:
        """End the monitored time. Without one, nothing happens."""
        with self._lock:
            if not self.monitoring:
                return
            sampler, self._sampler = self._sampler, None
            if sampler is not None:
                self._times.keep(self._chain.read()[0])
            self._times.end(time.monotonic())
        if sampler is not None:
            sampler.end()

    def close(self) -> None:
        """Stop, and uninstall kvhook if it was this collector that installed it. What was collected can be asked."""
        self.stop_monitoring()
        self._hook.end()

    def __enter__(self) -> VLLMMetricsCollector:
        self.start_monitoring()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- collecting ------------------------------------------------------------------------------------------------

    def collect_current_stats(self) -> dict[str, Any]:
        """Collect from the first source that can be read.

        Returns:
            A dictionary with ``collection_method`` (the source), ``stats_available``, ``metrics_found`` (name ->
            number), ``absent`` (name -> why it has none), ``histogram_data`` (seconds), ``total_metrics_found``,
            ``total_histograms_found``, ``debug_info``, ``timestamp`` and ``collection_time`` (Unix time, in seconds),
            and where nothing can be read ``error`` (why).
        """
        with self._lock:
            if self._unsampled and self.monitoring:
                self._sample_from_now()
            collected, reading = self._chain.collect()
            self._times.asked(time.monotonic())
            self._times.keep(reading)
            return collected

    def collect_hook_stats(self) -> dict[str, Any]:
        """Collect from kvhook's recording alone."""
        return self._chain.collect({names.HOOK: self._hook})[0]

    def collect_internal_stats(self) -> dict[str, Any]:
        """Collect from the engine's own objects alone."""
        return self._chain.collect({names.INTERNAL: EngineSource(self._engine)})[0]

    def collect_prometheus_metrics(self) -> dict[str, Any]:
        """Collect from ``LLM.get_metrics()`` or the Prometheus registry alone."""
        return self._chain.collect({names.REGISTRY: RegistrySource(self._engine, self._given)})[0]

    def get_prometheus_metrics(self) -> dict[str, Any]:
        """All of vLLM's Prometheus metrics as they are: name -> number, histogram, or a list of labels and values.
        Empty if there are none; `debug_info` says why."""
        with self._chain.contained("reading the Prometheus registry"), contextlib.suppress(Unavailable):
            return as_json(RegistrySource(self._engine, self._given).families())
        return {}

    def get_comprehensive_stats(self) -> dict[str, Any]:
        """Everything about the run so far, as ``json.dumps`` takes it.

        Returns:
            ``latest_stats`` (as `collect_current_stats`), ``monitoring_active``, ``total_collections`` (rows of the
            history), ``collection_interval``, ``collection_method``, ``modern_metrics_enabled`` (whether there are
            numbers), ``last_successful_collection`` (Unix time, or None), ``key_metrics`` (totals since the engine or
            kvhook's recording began, states of now), ``absent`` (name -> why it has no value),
            ``histogram_analysis``, ``raw_metrics`` (the source's own words), ``summary`` (of the monitored time),
            ``trend`` (how usage and hit rate went over it, and between your collections), ``environment`` and
            ``errors``. ``key_metrics`` and ``histogram_analysis`` hold what is known; asked by ``[name]`` for what
            is not known they give None.
        """
        with self._lock:
            latest, reading = self._chain.collect()
            self._times.keep(reading)
            method, rows = self._times.rows(reading)
            how = "every engine step" if method == names.HOOK else f"samples {self.collection_interval:g} s apart"
            summary = self._times.summary(rows, how)
            peak, absent = summary["kv_cache_usage_peak"], dict(latest["absent"])
            if peak is None:
                why = absent.get("kv_cache_usage", "nothing has been collected in the monitored time")
                absent |= dict.fromkeys(answer.PEAKS, why)
            return {
                "latest_stats": latest,
                "monitoring_active": self.monitoring,
                "total_collections": int(self._times.mask(rows).sum()),
                "collection_interval": self.collection_interval,
                "collection_method": latest["collection_method"],
                "modern_metrics_enabled": latest["stats_available"],
                "last_successful_collection": answer.last_time(latest, rows),
                "key_metrics": answer.key_metrics(reading, peak),
                "absent": absent,
                "histogram_analysis": answer.histogram_analysis(reading),
                "raw_metrics": reading.raw if reading is not None else {},
                "summary": summary,
                "trend": self._times.trend(rows),
                "environment": self.environment(),
                "errors": self._chain.errors(),
            }

    # ---- history ---------------------------------------------------------------------------------------------------

    def history(self) -> History:
        """The monitored times as a structured array, with the columns of `kvhook.analysis.history`: one row per engine
        step where the source is the hook, one per sample elsewhere. If monitoring was never started, everything."""
        return self._history()[1]

    def history_frame(self) -> pandas.DataFrame:
        """The same as a pandas DataFrame, indexed by time.

        Raises:
            KvhookError: pandas is not installed.
        """
        pandas = need("pandas", "pandas")
        frame = pandas.DataFrame.from_records(self.history())
        frame.index = pandas.to_datetime(frame.pop("timestamp"), unit="s", utc=True)
        return frame

    def get_metrics_history(self) -> list[dict[str, Any]]:
        """The history as a list of collections; each has the values of its row, and no histograms."""
        method, rows = self._history()
        return [answer.of_row(method, row) for row in rows]

    def save_metrics(self, path: str | os.PathLike[str]) -> Path:
        """Write the history to a ``.csv`` file, or everything to a ``.json`` file. A file that is there is replaced.

        Raises:
            KvhookError: another suffix.
            OSError: it cannot be written; what was there is untouched.
        """
        place = Path(path)
        saving.check_suffix(place)
        if place.suffix == ".json":
            saving.save_json(place, self.get_comprehensive_stats() | {"history": self.get_metrics_history()})
        else:
            saving.save_table(place, *self._history())
        return place

    def plot_kv_cache_metrics(self, output_dir: str | os.PathLike[str] = ".") -> list[Path]:
        """Draw usage, requests and hit rate over the monitored time into ``kv_cache_metrics.png``.

        Raises:
            KvhookError: matplotlib is not installed, or there is nothing to draw yet.
        """
        from kvhook.collector.plot import draw

        with self._lock:
            reading, _ = self._chain.read()
            method, rows = self._times.rows(reading)
            parts = self._times.parts(rows)
        count = sum(len(part.rows) for part in parts)
        if not count:
            raise KvhookError("there is nothing to draw yet: no step and no sample has been collected")
        if method == names.HOOK:
            how = f"{method}: every engine step ({count:,})"
        else:
            apart = f"{count:,} samples {self.collection_interval:g} s apart; what happened in between is not seen"
            how = f"{method}: {apart if count > 1 else 'a single sample'}"
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        why = answer.absent_of(reading).get("prefix_cache_hit_rate", "nothing was looked up in this time")
        return [draw(parts, how, why, folder / "kv_cache_metrics.png")]

    # ---- about itself ----------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, Any]:
        """Versions, adapter, device, model, and where the engine's core runs; None for what is not known.

        Of an engine that is gone, or that was not given, what kvhook has recorded of it.
        """
        return about.environment(self._engine(), self._hook.engines, hooks.patched())

    def debug_info(self) -> dict[str, Any]:
        """What a bug report should hold: environment, each source and why it cannot be read, faults, patches."""
        sources = {}
        for name, source in self._chain.sources.items():
            collected, reading = self._chain.collect({name: source})
            sources[name] = {
                "available": reading is not None,
                "why_not": collected["debug_info"]["not_available"].get(name),
                "values": len(reading.values) if reading else 0,
                "seconds": collected["debug_info"]["collection_seconds"],
            }
        session = self._hook.session
        return {
            "environment": self.environment(),
            "sources": sources,
            "monitoring": self.monitoring,
            "sampling_thread": self._sampler is not None and self._sampler.thread.is_alive(),
            "samples": self._times.samples,
            "patched": {name: sorted(targets) for name, targets in hooks.patched().items()},
            "session": repr(session) if session is not None else None,
            "faults": dict(session.faults) if session is not None else {},
            "errors": self._chain.errors(),
        }

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _look_at(self, llm: Any) -> None:
        # LLM has its engine in `llm_engine`, V0's AsyncLLMEngine in `engine`; V1's AsyncLLM is one
        engine = read_path(llm, "llm_engine") or read_path(llm, "engine") or llm
        self._llm = _weakly(llm)
        self._engine = _weakly(engine)
        self._given = engine is not None
        self._hook = HookSource(self._engine, self._given)
        sources: list[MetricsSource] = [
            self._hook,
            EngineSource(self._engine),
            RegistrySource(self._engine, self._given),
        ]
        self._chain.sources = {s.name: s for s in sources if self._source in (None, s.name)}

    def _play(self, source: Simulated) -> None:
        """Answer from this source and no other."""
        with self._lock:
            self._chain.sources, self._times = {source.name: source}, MonitoredTimes()

    def _sample(self) -> bool:
        """One tick of the thread; False if no more are needed."""
        with self._lock:
            if self._sampler is None or not self._sampler.is_this_thread or (self._given and self._engine() is None):
                return False
            reading, _ = self._chain.read()
            self._times.keep(reading)
            return reading is None or self._chain.sources[reading.source].polled

    def _history(self) -> tuple[str, History]:
        with self._lock:
            method, rows = self._times.rows(self._chain.read()[0])
            return method, rows[self._times.mask(rows)]


def _positive(interval: Any) -> float:
    if isinstance(interval, (int, float)) and 0 < interval < threading.TIMEOUT_MAX:
        return float(interval)
    raise KvhookError(f"collection_interval is a number of seconds above 0, not {interval!r}")


def _weakly(engine: Any) -> Callable[[], Any]:
    """A function that gives the engine as long as it is alive; it does not keep it alive."""
    if engine is None:
        return lambda: None
    try:
        return weakref.ref(engine)
    except TypeError:
        return lambda: engine
