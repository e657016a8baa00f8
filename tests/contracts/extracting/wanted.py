"""What is looked at in vLLM: modules, and which parts of them become facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """Which parts of a module become facts. Patterns match whole names; None takes nothing."""

    classes: str | None = None
    methods: str = r"__init__|[^_].*"
    attributes: str = r".*"
    functions: str | None = None
    calls: str | None = None
    """Classes whose use of stat loggers is written down, too."""


_STAT_NAMES = r"(.*_)?(log|stats?|loggers?|logging)(_.*)?"
_ENGINE_METHODS = (
    r"__init__|step|step_async|from_engine_args|from_vllm_config|_get_stats|_record_stats|do_log_stats"
    r"|do_log_stats_with_interval|get_metrics|add_logger|remove_logger|add_request|shutdown"
)
_ENGINES = r"LLMEngine|AsyncLLM|_?AsyncLLMEngine"
_ENGINE = Wanted(classes=_ENGINES, methods=_ENGINE_METHODS, attributes=_STAT_NAMES, calls=_ENGINES)
_LOGGERS = Wanted(
    classes=r".*StatLogger.*",
    methods=r"__init__|record|log|info|log_engine_initialized|record_sleep_state",
    attributes=_STAT_NAMES,
    functions=_STAT_NAMES,
    calls=r"StatLoggerManager|PerEngineStatLoggerAdapter",
)
_SCHEDULER = Wanted(classes="Scheduler", methods="__init__|make_stats", attributes=_STAT_NAMES)

MODULES: Mapping[str, Wanted] = {
    "vllm": Wanted(),
    "vllm.compilation.cuda_graph": Wanted(classes="CUDAGraphStat"),
    "vllm.engine.async_llm_engine": _ENGINE,
    "vllm.engine.llm_engine": _ENGINE,
    "vllm.engine.metrics": _LOGGERS,
    "vllm.engine.metrics_types": Wanted(classes=r".*Stat.*"),
    "vllm.entrypoints.llm": Wanted(classes="LLM", methods="__init__|get_metrics", attributes=_STAT_NAMES, calls="LLM"),
    "vllm.v1.core.sched.scheduler": _SCHEDULER,
    "vllm.v1.core.scheduler": _SCHEDULER,
    "vllm.v1.engine": Wanted(classes=r"EngineCoreOutputs?|EngineCoreEvent(Type)?|FinishReason|RequestFinishedReason"),
    "vllm.v1.engine.async_llm": _ENGINE,
    "vllm.v1.engine.core": Wanted(classes="EngineCore", methods="__init__|step", attributes=_STAT_NAMES),
    "vllm.v1.engine.core_client": Wanted(
        classes=r"EngineCoreClient|InprocClient|(Sync|Async)?MPClient",
        methods=r"__init__|make_client|make_async_mp_client|get_output|get_output_async",
        attributes=_STAT_NAMES,
    ),
    "vllm.v1.engine.llm_engine": _ENGINE,
    "vllm.v1.engine.output_processor": Wanted(
        classes="OutputProcessor|RequestState",
        methods="process_outputs|add_request|abort_requests|_update_stats_from_output|_update_stats_from_finished",
        attributes="request_states|is_prefilling|prompt_len|log_stats|stats|parent_req|request_index|external_req_id",
    ),
    "vllm.v1.metrics.loggers": _LOGGERS,
    "vllm.v1.metrics.perf": Wanted(classes="PerfStats"),
    "vllm.v1.metrics.stats": Wanted(classes=r".*"),
    "vllm.v1.spec_decode.metrics": Wanted(classes="SpecDecodingStats"),
}
ENVS = "vllm.envs"
ENV_VARIABLES = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOG_STATS_INTERVAL", "VLLM_USE_V1")
IMPORTED_NAMES = r".*(Stats?|Stat|StatLogger|LLMEngine|AsyncLLM|EngineCore|FinishReason).*|LLM|.*metrics.*"


def places(module: str) -> tuple[str, str]:
    """Where the source of a module may be inside an archive."""
    stem = module.replace(".", "/")
    return f"{stem}/__init__.py", f"{stem}.py"


WANTED_PATHS = frozenset(place for module in [*MODULES, ENVS] for place in places(module))
