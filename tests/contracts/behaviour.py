"""Puts behaviour into the stand-ins of a release: engines that play a script and hand their stats on as vLLM does.

Written after a reading of vLLM's code; what is asserted about it in the facts is in test_facts.py.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

from tests.contracts.release_facts import MethodFacts, ReleaseFacts, make_function

ENGINE = "vllm.v1.engine.llm_engine"
ASYNC = "vllm.v1.engine.async_llm"
LOGGERS = "vllm.v1.metrics.loggers"
CLIENT = "vllm.v1.engine.core_client"
PROCESSOR = "vllm.v1.engine.output_processor"
V0_ENGINE = "vllm.engine.llm_engine"


class VllmLogger:
    """What vLLM's own loggers, or the user's, have seen."""

    made: ClassVar[list[VllmLogger]] = []

    def __init__(self) -> None:
        self.seen: list[Any] = []
        VllmLogger.made.append(self)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        self.seen.append(scheduler_stats)

    def log(self, stats: Any) -> None:
        self.seen.append(stats)


def config_of(*, num_gpu_blocks: int = 11, data_parallel_size: int = 1, kv_cache_metrics: bool = False) -> Any:
    """What kvhook reads of a VllmConfig."""
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(model="stand-in"),
        cache_config=types.SimpleNamespace(block_size=16, num_gpu_blocks=num_gpu_blocks, enable_prefix_caching=True),
        parallel_config=types.SimpleNamespace(data_parallel_size=data_parallel_size),
        device_config=types.SimpleNamespace(device_type="cuda"),
        observability_config=types.SimpleNamespace(kv_cache_metrics=kv_cache_metrics),
    )


def make_engine(path: str, *, log_stats: bool, stat_loggers: Any = None, **config: Any) -> Any:
    """A new engine of a class (``module:Class``), given what its ``__init__`` asks for."""
    module, _, name = path.partition(":")
    cls = getattr(sys.modules[module], name)
    made = config_of(**config)
    parameters = inspect.signature(cls.__init__).parameters
    given = {"vllm_config": made, "log_stats": log_stats} | {
        n: getattr(made, n, None) for n in parameters if n != "self"
    }
    given |= {"vllm_config": made, "log_stats": log_stats, "stat_loggers": stat_loggers}
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    wanted = {n: v for n, v in given.items() if n in parameters and (n in required or n == "stat_loggers")}
    wanted.pop("self", None)
    return cls(**{n: v for n, v in wanted.items() if v is not None or n in required})


def animate(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> None:
    """Give the stand-ins of a release their behaviour. Signatures stay those of the release."""
    if facts.find(V0_ENGINE, "LLMEngine") and V0_ENGINE in {c.module for c in facts.lineage(V0_ENGINE, "LLMEngine")}:
        _v0(facts, facts.modules[V0_ENGINE].classes["LLMEngine"], modules)
    if "LLMEngine" in _classes(facts, ENGINE) and "IterationStats" in _classes(facts, "vllm.v1.metrics.stats"):
        for name in ("PrometheusStatLogger", "LoggingStatLogger"):
            if name in _classes(facts, LOGGERS):
                _logger(facts, name, modules)
        if "StatLoggerManager" in _classes(facts, LOGGERS):
            _manager(facts, modules)
        _sync(facts, modules)
        _on_event_loop(facts, modules)


def _classes(facts: ReleaseFacts, module: str) -> Any:
    return facts.modules[module].classes if module in facts.modules else {}


def _put(facts: ReleaseFacts, cls: Any, name: str, act: Callable[[dict[str, Any]], Any]) -> None:
    """Let a method call `act` with its arguments by name."""
    owner = facts.modules[cls.__module__].classes[cls.__name__]
    method = owner.methods.get(name) or MethodFacts(name, "(self)")
    function = make_function(method, f"{cls.__name__}.{name}", "return act(dict(locals()))", act=act)
    setattr(cls, name, staticmethod(function) if method.is_staticmethod else function)


def _v0(facts: ReleaseFacts, _: Any, modules: dict[str, types.ModuleType]) -> None:
    namespace = vars(modules[V0_ENGINE])
    cls = next(
        (c for c in (namespace["LLMEngine"], namespace.get("_V0LLMEngine")) if c and c.__module__ == V0_ENGINE), None
    )
    if cls is None:  # the name is V1's
        return

    def start(given: dict[str, Any]) -> None:
        engine = given.pop("self")
        # up to 0.6.3 the parts of the configuration are given one by one, up to 0.6.5 kept so
        config = given.get("vllm_config") or types.SimpleNamespace(**given)
        for part in ("model_config", "cache_config", "parallel_config", "device_config", "observability_config"):
            setattr(engine, part, getattr(config, part, None))
        engine.log_stats, engine.plan, engine.made = given["log_stats"], [], []
        if engine.log_stats:
            loggers = given["stat_loggers"]
            engine.stat_loggers = {"prometheus": VllmLogger()} if loggers is None else loggers

    def step(given: dict[str, Any]) -> list[str]:
        engine = given["self"]
        engine.made = engine.plan.pop(0)
        while engine.made:
            engine.do_log_stats(object(), None)
        return ["output"]

    def do_log_stats(given: dict[str, Any]) -> None:
        engine = given["self"]
        if engine.log_stats:
            stats = engine._get_stats(given["scheduler_outputs"], given["model_output"])
            for logger in engine.stat_loggers.values():
                logger.log(stats)

    _put(facts, cls, "__init__", start)
    _put(facts, cls, "step", step)
    _put(facts, cls, "do_log_stats", do_log_stats)
    _put(facts, cls, "_get_stats", lambda given: given["self"].made.pop(0))


def _logger(facts: ReleaseFacts, name: str, modules: dict[str, types.ModuleType]) -> None:
    """vLLM's own logger: each that is made is a `VllmLogger`."""
    cls = getattr(modules[LOGGERS], name)

    def start(given: dict[str, Any]) -> None:
        given["self"].vllms = VllmLogger()

    def record(given: dict[str, Any]) -> None:
        given["self"].vllms.record(given["scheduler_stats"], given["iteration_stats"])

    _put(facts, cls, "__init__", start)
    _put(facts, cls, "record", record)


def _manager(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> None:
    cls = modules[LOGGERS].__dict__["StatLoggerManager"]
    by_position = "mm_cache_stats" not in facts.modules[LOGGERS].classes["StatLoggerManager"].methods["record"].text

    def start(given: dict[str, Any]) -> None:
        manager, config = given["self"], given["vllm_config"]
        ranks = given.get("engine_idxs") or [0]
        own = [VllmLogger()] if given.get("enable_default_loggers", True) else []
        custom = given.get("custom_stat_loggers") or []
        manager.loggers = {rank: [*own, *(make(config, rank) for make in custom)] for rank in ranks}

    def record(given: dict[str, Any]) -> None:
        rank = given["engine_idx"] or 0
        stats = given["scheduler_stats"], given["iteration_stats"]
        for logger in given["self"].loggers[rank]:
            if by_position:
                logger.record(*stats, rank)
            else:
                logger.record(*stats, mm_cache_stats=given["mm_cache_stats"], engine_idx=rank)

    _put(facts, cls, "__init__", start)
    _put(facts, cls, "record", record)
    cls.log_engine_initialized = lambda self: None


def _sync(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> Callable[[dict[str, Any]], None]:
    module = vars(modules[ENGINE])
    cls = module["LLMEngine"]
    holder = facts.modules[ENGINE].classes["LLMEngine"].calls.stat_logger_attribute
    if holder is None:
        return _silent(facts, modules)

    def start(given: dict[str, Any]) -> None:
        engine, config = given["self"], given["vllm_config"]
        engine.vllm_config, engine.log_stats, engine.plan = config, given["log_stats"], []
        logger = None
        if engine.log_stats and holder == "logger_manager":
            logger = module["StatLoggerManager"](vllm_config=config, custom_stat_loggers=given["stat_loggers"])
            logger.log_engine_initialized()
        elif engine.log_stats:
            logger = module["PrometheusStatLogger"](config)
        setattr(engine, holder, logger)

    def step(given: dict[str, Any]) -> list[str]:
        engine = given["self"]
        sched, iteration = engine.plan.pop(0)
        logger = getattr(engine, holder)
        if logger is not None and sched is not None:
            logger.record(scheduler_stats=sched, iteration_stats=iteration)
        return ["output"]

    _put(facts, cls, "__init__", start)
    _put(facts, cls, "step", step)
    return start


def _silent(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> Callable[[dict[str, Any]], None]:
    """0.8: the engine makes no stats; its core and its output processor would."""

    class Client:
        def __init__(self, log_stats: bool) -> None:
            self.log_stats = log_stats
            self.plan: list[Any] = []

        def get_output(self) -> Any:
            sched, iteration = self.plan.pop(0)
            outputs = [iteration] if iteration is not None else []
            stats = sched if self.log_stats else None
            return types.SimpleNamespace(outputs=outputs, timestamp=1.0, scheduler_stats=stats)

    def process_outputs(given: dict[str, Any]) -> list[str]:
        stats = given["iteration_stats"]
        if stats is not None:
            assert given["self"].log_stats
            assert given["engine_core_timestamp"] == 1.0
            (filled,) = given["engine_core_outputs"]
            vars(stats).update(vars(filled))
        return ["output"]

    cls = vars(modules[ENGINE])["LLMEngine"]
    client_class: Any = vars(modules[CLIENT])["EngineCoreClient"]
    processor_class: Any = vars(modules[PROCESSOR])["OutputProcessor"]
    _put(facts, processor_class, "process_outputs", process_outputs)

    def start(given: dict[str, Any]) -> None:
        engine = given["self"]
        engine.vllm_config = given["vllm_config"]
        engine.output_processor = processor_class()
        engine.output_processor.log_stats = False
        engine.engine_core = client_class.make_client(
            multiprocess_mode=False, asyncio_mode=False, vllm_config=None, executor_class=None, log_stats=False
        )
        engine.plan = engine.engine_core.plan

    def step(given: dict[str, Any]) -> Any:
        engine = given["self"]
        return engine.output_processor.process_outputs(engine.engine_core.get_output().outputs)

    if "make_client" in vars(client_class):
        _put(facts, client_class, "make_client", lambda given: Client(given["log_stats"]))
    _put(facts, cls, "__init__", start)
    _put(facts, cls, "step", step)
    return start


def _on_event_loop(facts: ReleaseFacts, modules: dict[str, types.ModuleType]) -> Callable[[dict[str, Any]], None]:
    module = vars(modules[ASYNC])
    cls = module["AsyncLLM"]
    calls = facts.modules[ASYNC].classes["AsyncLLM"].calls
    with_mm = any("mm_cache_stats=" in arguments for _, _, arguments in calls.stat_calls)

    def start(given: dict[str, Any]) -> None:
        engine, config, custom = given["self"], given["vllm_config"], given.get("stat_loggers")
        engine.vllm_config, engine.log_stats = config, given["log_stats"]
        ranks = list(range(config.parallel_config.data_parallel_size))
        if calls.stat_logger_attribute == "logger_manager":
            manager = facts.modules[LOGGERS].classes["StatLoggerManager"]
            alone = "enable_default_loggers" in manager.methods["__init__"].text
            own = {"enable_default_loggers": engine.log_stats} if alone else {}
            engine.logger_manager = None
            if engine.log_stats or (custom and alone):
                engine.logger_manager = module["StatLoggerManager"](
                    vllm_config=config, engine_idxs=ranks, custom_stat_loggers=custom, **own
                )
                engine.logger_manager.log_engine_initialized()
            return
        engine.stat_loggers = []
        if not engine.log_stats:
            return
        if custom is not None:
            engine.stat_loggers = [[make(config, rank) for make in custom] for rank in ranks]
        elif "setup_default_loggers" in calls.made_by:
            engine.stat_loggers = [[VllmLogger()] for _ in ranks]
        else:
            made = [module["PrometheusStatLogger"](config) for _ in ranks]
            flat = not any("engine_index=" in arguments for _, _, arguments in calls.stat_calls)
            engine.stat_loggers = made if flat else [[one] for one in made]

    def arrive(engine: Any, rank: int, sched: Any, iteration: Any) -> None:
        """What the output handler does with the stats of a step."""
        if not engine.log_stats and not getattr(engine, "logger_manager", None):
            return
        if calls.stat_logger_attribute == "logger_manager":
            more = {"mm_cache_stats": None} if with_mm else {}
            engine.logger_manager.record(engine_idx=rank, scheduler_stats=sched, iteration_stats=iteration, **more)
            return
        loggers = engine.stat_loggers
        for logger in loggers[rank] if isinstance(loggers[0], list) else loggers:
            logger.record(scheduler_stats=sched, iteration_stats=iteration)

    _put(facts, cls, "__init__", start)
    cls.arrive = arrive
    return start
