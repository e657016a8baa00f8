"""The three places that numbers come from, in the order in which they are tried."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from kvhook.adapters.table import read_path
from kvhook.analysis import history
from kvhook.analysis.accounts import queue_of_all
from kvhook.analysis.part import Part
from kvhook.analysis.values import Values
from kvhook.collector import names, prometheus
from kvhook.collector.reading import Histogram, Reading, Unavailable, histogram_of
from kvhook.collector.states import v0_states, v1_states
from kvhook.errors import KvhookError
from kvhook.recording.installation import attach, current_session, install, uninstall
from kvhook.records.levels import NOT_COUNTED
from kvhook.records.rows import as_rows
from kvhook.schema import COUNTED

if TYPE_CHECKING:
    from kvhook.analysis.totals import Totals
    from kvhook.recording.running import SoFar
    from kvhook.recording.session import Session

#: Gives the engine; None if there is none (any more).
Engine = Callable[[], Any]

NO_ENGINE = "no engine to look into: none was given (llm=...), or it has been deleted"


class MetricsSource(Protocol):
    """A place that numbers come from."""

    name: str
    #: whether it only knows the present, so that it must be read again and again
    polled: bool

    def read(self) -> Reading:
        """What it says now.

        Raises:
            Unavailable: it cannot be read; the message says why.
        """


class HookSource:
    """kvhook's recording: every step, of the whole run."""

    name = names.HOOK
    polled = False

    def __init__(self, engine: Engine, given: bool) -> None:
        self._engine = engine
        self._given = given
        #: the session that is read; kept when it has been uninstalled
        self.session: Session | None = None
        #: number of the engine in it; None stands for all of them (several ranks are several engines)
        self.number: int | None = None
        #: the engines' facts in the last reading; they outlive the engines
        self.engines: list[dict[str, Any]] = []
        #: whether `begin` installed kvhook
        self.installed = False
        self._refused = ""

    def begin(self) -> None:
        """Have the engine recorded, where that can still be done, or those that will be made if none was given."""
        if self._find() and self.session is current_session():
            return
        before = current_session()
        engine = self._engine()
        try:
            if engine is not None:
                attach(engine)
            elif not self._given:
                install()
        except Exception as error:  # whatever was given as llm
            self._refused = str(error) if isinstance(error, KvhookError) else f"{type(error).__name__}: {error}"
        if before is None and current_session() is not None:
            if self._refused:
                uninstall()
            else:
                self.installed = True
        self._find()

    def end(self) -> None:
        """Uninstall kvhook, if `begin` installed it."""
        if self.installed and self.session is current_session():
            uninstall()
        self.installed = False

    def read(self) -> Reading:
        """The totals of the run, the states after its last step, every single latency."""
        if not self._find() or self.session is None:
            raise Unavailable(self._why())
        return self.session.ask(self._answer)

    def _answer(self, so_far: SoFar) -> Reading:
        run = so_far.run
        engines = [e for e in run.meta["engines"] if self.number in (None, e["engine"])]
        if not engines:
            raise Unavailable("no vLLM engine has been made since kvhook.install()")
        self.engines = engines
        columns = {kind: frozenset(c.name for c in run.columns(kind)) for kind in ("step", "request")}
        part = Part(so_far.totals, engines, columns)
        values: dict[str, float] = {}
        missing = run.meta["absent"]
        absent = {name: why for name, why in missing.items() if name in history.COLUMNS}
        absent |= {times.name: missing[times.column] for times in names.TIMES if times.column in missing}
        for name in (*history.STATES, *history.TOTALS):
            if name in COUNTED and part.has(name) and part.steps.uncounted:
                absent[name] = NOT_COUNTED
            elif name in history.STATES and part.has(name) and name in part.steps.latest:
                values[name] = history.count_or_share(name, part.steps.latest[name][1])
                if name == "num_running_reqs":
                    values[name] = max(0, values[name] - _ended_since(so_far.totals, part))
            elif name in history.TOTALS and part.has(name) and part.steps.steps:
                values[name] = part.steps.sums[name]
            elif name not in absent:
                absent[name] = "no engine step has been recorded yet"
        caching = {e.get("enable_prefix_caching") for e in engines}
        raw: dict[str, Any] = {"engines": len(engines), "steps": part.steps.steps}
        raw |= {name: run.meta[name] for name in ("records", "records_lost", "records_dropped")}
        raw["last_step"] = {}
        if part.steps.last is not None:
            last = part.steps.last[1]
            (raw["last_step"],) = as_rows(run.table(last.slots, last.layout, "step"), "step")
        return Reading(
            self.name,
            values,
            absent,
            _histograms(part, missing),
            raw,
            caching.pop() if len(caching) == 1 else None,
            "kvhook began to record",
            functools.partial(self._past, self.session, self.number),
        )

    @staticmethod
    def _past(session: Session | None, number: int | None) -> history.History:
        """The whole run, one row per step."""
        assert session is not None
        trace = session.trace()
        there = {c.name for c in trace.columns("step")}
        steps = trace.steps(number, columns=[name for name in history.NEEDED if name in there])
        return history.from_steps(steps, math.nan)

    def _find(self) -> bool:
        """Look for the session that records our engine. What was found stays."""
        current, engine = current_session(), self._engine()
        if current is not None and current is not self.session:
            if engine is not None:
                ranks = current.engine_numbers(engine)
                if ranks:
                    self.session, self.number = current, ranks[0] if len(ranks) == 1 else None
            elif not self._given:
                self.session, self.number = current, None
        elif current is not None and engine is not None and len(current.engine_numbers(engine)) > 1:
            self.number = None  # data-parallel ranks come one by one, each with its first stats
        return self.session is not None

    def _why(self) -> str:
        if self._refused:
            return self._refused
        if self._engine() is not None:
            return "this engine is not recorded: call kvhook.install() before LLM(...), or start_monitoring()"
        if self._given:
            return NO_ENGINE
        return "kvhook is not installed: call kvhook.install() before LLM(...), or start_monitoring()"


def _histograms(part: Part, missing: Mapping[str, str]) -> dict[str, Histogram]:
    steps, requests = part.steps, part.requests
    of = {
        "ttft_count": steps.latencies["ttft"],
        "itl_count": steps.latencies["itl"],
        "mean_time_per_output_token": requests.all_per_token,
        "e2e_latency": requests.e2e,
    }
    return {
        times.name: histogram_of(of[times.column] if times.column in live else Values(), times.bounds)
        for times in names.TIMES
        for live in [part.columns["step" if times.series else "request"]]
        if times.column not in missing and (times.series or times.column in live)
    }


class EngineSource:
    """The engine's own objects.

    V0 makes its ``Stats`` on request. V1 holds less: where its core lives in this process, the scheduler's queues and
    the block pool, as they are at this moment; and, where vLLM's stats are on, the loggers of this very engine, with
    totals and the last step's states. With the core in another process and stats off there is nothing to read.
    """

    name = names.INTERNAL
    polled = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read(self) -> Reading:
        """What the engine holds now; changes nothing in it."""
        engine = self._engine()
        if engine is None:
            raise Unavailable(NO_ENGINE)
        families = prometheus.from_collectors(_held_metrics(engine))
        values = prometheus.numbers(families)
        last = next((s for s in map(_last_stats, _loggers(engine)) if s is not None), None)
        if last is not None:
            values |= {k: v for k, v in v1_states(last).items() if k not in values}
        now = _v0_states(engine) or _scheduler_states(engine)
        values |= now
        if not values:
            raise Unavailable(
                "the engine object holds no stats: its core is in another process and vLLM's stats are off "
                "(LLM(..., disable_log_stats=False) turns them on)"
            )
        why = (
            "vLLM's loggers have no such metric in this release"
            if families
            else "it is counted by vLLM's loggers alone, and vLLM's stats are off in this engine "
            "(LLM(..., disable_log_stats=False) turns them on)"
        )
        found = prometheus.histograms(families)
        absent = {value.name: why for value in names.VALUES if value.name not in values and value.kind == names.TOTAL}
        absent |= {times.name: why for times in names.TIMES if times.name not in found}
        raw = prometheus.as_json(families)
        raw |= {"states": {"of": "this moment" if now else "the last step", **(now or _only_states(values))}}
        caching = read_path(engine, names.FACTS["enable_prefix_caching"])
        return Reading(
            self.name,
            values,
            absent,
            found,
            raw,
            caching if isinstance(caching, bool) else prometheus.prefix_caching(families),
            "the engine was made",
        )


class RegistrySource:
    """``LLM.get_metrics()``, or the process's Prometheus registry: one for all engines of a process, of which the
    last one that was made with its stats on has wiped the numbers of those before."""

    name = names.REGISTRY
    polled = True

    def __init__(self, engine: Engine, given: bool) -> None:
        self._engine = engine
        self._given = given

    def read(self) -> Reading:
        """A snapshot."""
        families = self.families()
        values = prometheus.numbers(families)
        if _on_cpu(self._engine()):
            values |= _greater(values, prometheus.v0_on_cpu(families))
        caching = prometheus.prefix_caching(families)
        if caching is None:
            configured = read_path(self._engine(), names.FACTS["enable_prefix_caching"])
            caching = configured if isinstance(configured, bool) else None
        return Reading(
            self.name,
            values,
            {},
            prometheus.histograms(families),
            prometheus.as_json(families),
            caching,
            "the engine was made",
        )

    def families(self) -> dict[str, prometheus.Family]:
        """vLLM's metrics, all of them.

        Raises:
            Unavailable: there are none.
        """
        engine = self._engine()
        if engine is None and self._given:
            # what the registry still holds may be another engine's, which cannot be seen from it
            raise Unavailable(NO_ENGINE)
        get_metrics = getattr(engine, "get_metrics", None)
        if callable(get_metrics):
            try:
                families = prometheus.from_snapshot(get_metrics())
            except AssertionError as error:
                raise Unavailable(f"LLM.get_metrics() refuses: {error}") from None
        else:
            client = sys.modules.get("prometheus_client")
            if client is None:
                raise Unavailable("prometheus_client is not loaded: no vLLM in this process makes metrics")
            families = prometheus.from_collectors(client.REGISTRY.collect())
        if not families:
            raise Unavailable(
                "this process's Prometheus registry has no vllm: metrics: no engine has been made, or only with "
                "vLLM's stats off (LLM(..., disable_log_stats=False) turns them on)"
            )
        return families


def _ended_since(totals: Totals, part: Part) -> int:
    """How many of the requests that ran after the last step the front end has ended since, see `Queue.left`."""
    latest = part.steps.latest["num_running_reqs"]
    for engine in part.engines:
        one = Part(totals, [engine], part.columns)
        if one.steps.latest.get("num_running_reqs") == latest:
            queue = queue_of_all(totals, one)
            return 0 if queue is None else queue.ended_since
    return 0


def _loggers(engine: Any) -> Iterator[Any]:
    """The stat loggers that an engine holds, those inside others included."""
    pending = [read_path(engine, path) for path in names.LOGGERS]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (list, tuple)):
            pending += one
        elif one is not None and id(one) not in seen and hasattr(one, "__dict__"):
            seen.add(id(one))
            pending.append(vars(one).get("per_engine_stat_loggers"))
            yield one


def _held_metrics(engine: Any) -> Iterator[Any]:
    """The Prometheus metrics of an engine's own loggers: this engine's alone, whatever the registry has."""
    seen: set[int] = set()
    for logger in _loggers(engine):
        # V0's logger keeps its metrics in an object of their own
        inner = vars(logger).get("metrics")
        pending = [*vars(logger).values(), *getattr(inner, "__dict__", {}).values()]
        while pending:
            one = pending.pop()
            if isinstance(one, dict):
                pending += one.values()
            elif isinstance(one, (list, tuple)):
                pending += one
            elif type(one).__module__ == "prometheus_client.metrics" and id(one) not in seen:
                seen.add(id(one))
                yield from one.collect()


def _last_stats(logger: Any) -> Any:
    return vars(logger).get(names.LAST_STATS)


def _v0_states(engine: Any) -> dict[str, float]:
    """What V0's ``_get_stats`` says; {} where there is no such thing."""
    get_stats = getattr(engine, "_get_stats", None)
    if not callable(get_stats):
        return {}
    return v0_states(get_stats(None), on_cpu=_on_cpu(engine))


def _on_cpu(engine: Any) -> bool:
    return str(read_path(engine, names.FACTS["device"])) == "cpu"


def _greater(values: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """V0's CPU values: the one that is not used is 0 there, or -1."""
    return {name: max(values.get(name, other), other) for name, other in others.items()}


def _scheduler_states(engine: Any) -> dict[str, float]:
    """Usage and queues of a V1 scheduler in this process; {} where it is in another."""
    scheduler = read_path(engine, names.SCHEDULER)
    if scheduler is None:
        return {}
    try:
        running, waiting = scheduler.get_request_counts()
    except AttributeError:
        running, waiting = len(scheduler.running), len(scheduler.waiting)
    usage = read_path(scheduler, "kv_cache_manager.usage")
    states = {"kv_cache_usage": usage, "num_running_reqs": running, "num_waiting_reqs": waiting}
    return {name: value for name, value in states.items() if value is not None}


def _only_states(values: dict[str, float]) -> dict[str, float]:
    return {v.name: values[v.name] for v in names.VALUES if v.kind == names.STATE and v.name in values}
