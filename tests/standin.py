"""A vLLM that plays a script: classes, fields and signatures of the release, behaviour just enough to be hooked.

    with fake_vllm() as vllm:
        engine = vllm.engine(log_stats=False)
        engine.plan.append(step_stats(kv_cache_usage=0.5))
        engine.step()

What it gives to the hooks is chosen by the test, so what kvhook makes of it can be computed by hand.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from tests.contracts.loader import build_stub_modules, load, stubs
from tests.contracts.release_facts import make_function

ENGINE = "vllm.v1.engine.llm_engine"
LOGGERS = "vllm.v1.metrics.loggers"
STATS = "vllm.v1.metrics.stats"
RELEASE = "0.32.0"


class VllmLogger:
    """In the place of vLLM's Prometheus logger: remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0):
        self.seen.append((scheduler_stats, iteration_stats))

    def log_engine_initialized(self) -> None: ...


def build(release: str = RELEASE) -> dict[str, types.ModuleType]:
    """Stand-in modules with behaviour put in; not yet importable, see `fake_vllm`."""
    facts = load(release)
    modules = build_stub_modules(facts)
    module: Any = modules[ENGINE]
    engine_class, manager_class = module.LLMEngine, module.StatLoggerManager

    def start_engine(engine: Any, vllm_config: Any, log_stats: bool) -> None:
        engine.vllm_config, engine.log_stats, engine.plan = vllm_config, log_stats, []
        engine.logger_manager = None
        if log_stats:
            engine.logger_manager = module.StatLoggerManager(vllm_config=vllm_config, enable_default_loggers=log_stats)
            engine.logger_manager.log_engine_initialized()

    def step(engine: Any) -> Any:
        planned = engine.plan.pop(0)
        if isinstance(planned, BaseException):
            raise planned
        sched, iteration, mm = planned
        if engine.logger_manager is not None and sched is not None:
            engine.logger_manager.record(scheduler_stats=sched, iteration_stats=iteration, mm_cache_stats=mm)
        return ["output of the step"]

    def start_manager(manager: Any) -> None:
        manager.engine_indexes, manager.stat_loggers = [0], [VllmLogger()]

    def record(manager: Any, sched: Any, iteration: Any, mm: Any, engine_idx: int | None) -> None:
        for logger in manager.stat_loggers:
            logger.record(sched, iteration, mm_cache_stats=mm, engine_idx=engine_idx or 0)

    def log_engine_initialized(manager: Any) -> None:
        for logger in manager.stat_loggers:
            logger.log_engine_initialized()

    def get_metrics(engine: Any) -> Any:
        assert engine.log_stats, "Stat logging disabled"
        return engine.logger_manager.stat_loggers[0].seen

    def put(cls: Any, name: str, act: Callable[..., Any], *arguments: str) -> None:
        """Give a method behaviour: `act`, called with these of its arguments. Its signature stays the release's."""
        method = facts.modules[cls.__module__].classes[cls.__name__].methods[name]
        body = f"return act({', '.join(arguments)})"
        setattr(cls, name, make_function(method, f"{cls.__name__}.{name}", body, act=act))

    put(engine_class, "__init__", start_engine, "self", "vllm_config", "log_stats")
    put(engine_class, "step", step, "self")
    put(engine_class, "get_metrics", get_metrics, "self")
    put(manager_class, "__init__", start_manager, "self")
    put(manager_class, "record", record, "self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx")
    manager_class.log_engine_initialized = log_engine_initialized
    return modules


class FakeVllm:
    """What a test does with the stand-in."""

    @staticmethod
    def engine(*, log_stats: bool = False, num_gpu_blocks: int | None = 61, **cache: Any) -> Any:
        """A new engine, as vLLM's LLM makes one. ``engine.plan`` is the list of what its steps will bring."""
        module: Any = sys.modules[ENGINE]
        settings = {"block_size": 32, "num_gpu_blocks": num_gpu_blocks, "enable_prefix_caching": True} | cache
        config = types.SimpleNamespace(
            model_config=types.SimpleNamespace(model="stand-in"),
            cache_config=types.SimpleNamespace(**settings),
            observability_config=types.SimpleNamespace(kv_cache_metrics=False),
        )
        return module.LLMEngine(config, object, log_stats=log_stats)

    @staticmethod
    def originals() -> dict[str, Any]:
        """The objects behind the names that kvhook patches."""
        engine, loggers, stats = (vars(sys.modules[name]) for name in (ENGINE, LOGGERS, STATS))
        return {
            **{f"LLMEngine.{n}": vars(engine["LLMEngine"])[n] for n in ("__init__", "step", "get_metrics")},
            "StatLoggerManager": engine["StatLoggerManager"],
            "StatLoggerManager.record": vars(loggers["StatLoggerManager"])["record"],
            "IterationStats.update_from_finished_request": vars(stats["IterationStats"])[
                "update_from_finished_request"
            ],
        }


@contextlib.contextmanager
def fake_vllm(
    release: str = RELEASE, change: Callable[[dict[str, Any]], object] = lambda modules: None
) -> Iterator[FakeVllm]:
    """Let ``import vllm`` be the stand-in, already imported. `change` may break the modules first."""
    modules = build(release)
    change(modules)
    with stubs(modules):
        yield FakeVllm()


def play(engine: Any, *steps: Any) -> None:
    """Have an engine of the stand-in take these steps."""
    engine.plan += steps
    for _ in steps:
        assert engine.step() == ["output of the step"]


def step_stats(
    *,
    prefix: dict[str, Any] | None = None,
    prompt: dict[str, Any] | None = None,
    generated: int = 0,
    preempted: int = 0,
    ttft: list[float] | None = None,
    itl: list[float] | None = None,
    finished: list[dict[str, Any]] | None = None,
    iteration: bool = True,
    **sched: Any,
) -> tuple[Any, Any, Any]:
    """The stats of one step, in vLLM's own classes: `sched` are SchedulerStats's fields."""
    stats: Any = sys.modules[STATS]
    scheduler = stats.SchedulerStats(**sched)
    for name, value in (prefix or {}).items():
        setattr(scheduler.prefix_cache_stats, name, value)
    if not iteration:
        return scheduler, None, None
    it = stats.IterationStats()
    for name, value in (prompt or {}).items():
        setattr(it.prompt_token_stats, name, value)
    it.num_generation_tokens, it.num_preempted_reqs = generated, preempted
    it.time_to_first_tokens_iter, it.inter_token_latencies_iter = list(ttft or []), list(itl or [])
    for request in finished or []:
        one = stats.FinishedRequestStats(**{k: v for k, v in request.items() if k != "ttft"})
        if "ttft" in request:
            one.kvhook_ttft = request["ttft"]
        it.finished_requests.append(one)
    return scheduler, it, None


def looked_up(queries: int, hits: int, finished: int = 0) -> Any:
    """A step with one look-up, and so many requests that finish."""
    requests = [{"finish_reason": 1, "num_prompt_tokens": queries, "num_cached_tokens": hits}] * finished
    return step_stats(prefix={"queries": queries, "hits": hits}, generated=1, finished=requests)


NO_STATS = (None, None, None)
