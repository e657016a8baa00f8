"""vLLM's V1 engines from 0.8: `SchedulerStats` from the engine core, `IterationStats` from the front end, once a step.

What they hold drifts, and one set of tables reads all of it. Where they pass changed as a whole:

=============  =========================================  ==============================================
vLLM           `LLMEngine`, behind `LLM`                  `AsyncLLM`, also behind the server
=============  =========================================  ==============================================
0.8            nowhere: its stats are hard-coded off      a list of loggers, from 0.8.3 one for each rank
0.9            one logger, Prometheus                     the same
0.10           the same                                   a `StatLoggerManager`
from 0.11      a `StatLoggerManager`                      the same
=============  =========================================  ==============================================
"""

from __future__ import annotations

from kvhook.adapters.columns import SEES_REQUESTS
from kvhook.adapters.config import FACTS
from kvhook.adapters.table import Adapter, Read, Source, Target

ENGINE = "vllm.v1.engine.llm_engine"
ASYNC = "vllm.v1.engine.async_llm"
CLIENT = "vllm.v1.engine.core_client:EngineCoreClient"
LOGGERS = "vllm.v1.metrics.loggers"
STATS = "vllm.v1.metrics.stats"

_READMITTED = "this vLLM counts re-admitted requests as new ones"
_PROMPT_SPLIT = "this vLLM does not split prompt tokens by where they came from"
_NO_CONNECTOR = "this vLLM does not count the KV connector's cache"
_NO_MM = "this vLLM has no stats of the multi-modal cache"
_NOT_PER_REQUEST = "this vLLM does not count it per request"
_NOT_SEEN_ADDED = "this vLLM's front end has no place where a request can be seen when it is added"
_NO_TTFT = "this vLLM does not keep it per request; every value of the run is in session.latencies()"

_STATS_ARGUMENTS = ("scheduler_stats", "iteration_stats")
#: The one setting that `IterationStats` looks up, again for each output: os.environ is asked every time.
SETTINGS = ("VLLM_COMPUTE_NANS_IN_LOGITS",)
_SETTINGS = Target("settings", f"{STATS}:envs", required=False)
#: Every front end makes one: an engine that is none of vLLM's own is noticed by it.
PROCESSOR = Target("processor", "vllm.v1.engine.output_processor:OutputProcessor.__init__", required=False)
_FINISHED = Target(
    "finished",
    f"{STATS}:IterationStats.update_from_finished_request",
    required=False,
    loss="time_to_first_token of single requests",
    field=(f"{STATS}:RequestStateStats", "first_token_latency"),
)

V1 = Adapter(
    name="v1",
    family="v1",
    engine=f"{ENGINE}:LLMEngine",
    targets=(
        Target("engine_init", f"{ENGINE}:LLMEngine.__init__", takes=("log_stats",)),
        Target("engine_step", f"{ENGINE}:LLMEngine.step"),
        Target("manager", f"{ENGINE}:StatLoggerManager"),
        Target("record", f"{LOGGERS}:StatLoggerManager.record", takes=_STATS_ARGUMENTS),
        _FINISHED,
        PROCESSOR,
        _SETTINGS,
        Target("get_metrics", f"{ENGINE}:LLMEngine.get_metrics", required=False),
    ),
    tap="manager",
    holder="logger_manager",
    record=f"{LOGGERS}:StatLoggerManager.record",
    sources=(
        Source("sched", f"{STATS}:SchedulerStats", argument="scheduler_stats", flags=("has_scheduler_stats",)),
        Source("iteration", f"{STATS}:IterationStats", argument="iteration_stats", flags=("has_iteration_stats",)),
        Source("mm", f"{STATS}:MultiModalCacheStats", argument="mm_cache_stats", optional=True),
        Source("prefix", f"{STATS}:PrefixCacheStats", "sched.prefix_cache_stats"),
        Source("connector", f"{STATS}:PrefixCacheStats", "sched.connector_prefix_cache_stats", optional=True),
        Source("spec", "vllm.v1.spec_decode.metrics:SpecDecodingStats", "sched.spec_decoding_stats", optional=True),
        Source("prompt", f"{STATS}:PromptTokenStats", "iteration.prompt_token_stats"),
        Source("request", f"{STATS}:FinishedRequestStats"),
    ),
    steps=(
        Read("num_running_reqs", ("sched.num_running_reqs",)),
        # 0.20 split the waiting requests in two; here num_waiting_reqs is all that wait, as before
        Read("num_waiting_reqs", ("sched.num_waiting_reqs + sched.num_skipped_waiting_reqs", "sched.num_waiting_reqs")),
        Read("num_skipped_waiting_reqs", ("sched.num_skipped_waiting_reqs",), "this vLLM does not tell them apart"),
        Read("kv_cache_usage", ("sched.kv_cache_usage", "sched.gpu_cache_usage")),
        Read("prefix_cache_requests", ("prefix.requests",)),
        Read("prefix_cache_queries", ("prefix.queries",)),
        Read("prefix_cache_hits", ("prefix.hits",)),
        Read("prefix_cache_preempted_requests", ("prefix.preempted_requests",), _READMITTED),
        Read("prefix_cache_preempted_queries", ("prefix.preempted_queries",), _READMITTED),
        Read("prefix_cache_preempted_hits", ("prefix.preempted_hits",), _READMITTED),
        Read("prefix_cache_reset", ("prefix.reset",)),
        Read("connector_prefix_cache_queries", ("connector.queries",), _NO_CONNECTOR),
        Read("connector_prefix_cache_hits", ("connector.hits",), _NO_CONNECTOR),
        Read("num_prompt_tokens", ("prompt.total", "iteration.num_prompt_tokens")),
        Read("num_prompt_tokens_computed", ("prompt.computed",), _PROMPT_SPLIT),
        Read("num_prompt_tokens_cached", ("prompt.cached_tokens",), _PROMPT_SPLIT),
        Read("num_prompt_tokens_external", ("prompt.external_kv_transfer",), _PROMPT_SPLIT),
        Read("num_generation_tokens", ("iteration.num_generation_tokens",)),
        Read("num_preempted_reqs", ("iteration.num_preempted_reqs",)),
        # 0.9.2 to 0.11.0 have one of SchedulerStats: how many of the *running* requests, a state and no count
        Read("num_corrupted_reqs", ("iteration.num_corrupted_reqs",), "this vLLM does not count them as they finish"),
        Read("num_drafts", ("spec.num_drafts",), "this vLLM does not count drafts"),
        Read("num_draft_tokens", ("spec.num_draft_tokens",)),
        Read("num_accepted_tokens", ("spec.num_accepted_tokens",)),
        Read("mm_cache_queries", ("mm.queries",), _NO_MM),
        Read("mm_cache_hits", ("mm.hits",), _NO_MM),
        Read(
            "num_evicted_blocks_sampled",
            ("len(sched.kv_cache_eviction_events)",),
            "this vLLM does not sample evictions",
            needs="kv_cache_metrics",
        ),
    ),
    values=(
        Read("time_to_first_token", ("iteration.time_to_first_tokens_iter",)),
        Read("inter_token_latency", ("iteration.inter_token_latencies_iter", "iteration.time_per_output_tokens_iter")),
    ),
    finished=Read("request", ("iteration.finished_requests",)),
    requests=(
        # before 0.20 vLLM does not say which request finished: it is noted when the request finishes, as is the sample
        Read(
            "request_id",
            ("id_number(request.request_id)", "getattr(request, 'kvhook_request_id', -1)"),
            fallback_needs=SEES_REQUESTS,
            unmet="this vLLM does not say which request finished",
        ),
        Read(
            "sample_index",
            ("getattr(request, 'kvhook_sample_index', -1)",),
            needs=SEES_REQUESTS,
            unmet="vLLM's stats do not say which sample of a prompt finished",
        ),
        *(
            Read(column, (f"getattr(request, 'kvhook_{column}', -1)",), needs=SEES_REQUESTS, unmet=_NOT_SEEN_ADDED)
            for column in ("prompt_number", "label", "lora_name")
        ),
        Read("finish_reason", ("request.finish_reason",)),
        Read("num_prompt_tokens", ("request.num_prompt_tokens",)),
        Read("num_generation_tokens", ("request.num_generation_tokens",)),
        Read("num_cached_tokens", ("request.num_cached_tokens",), _NOT_PER_REQUEST),
        Read("num_preemptions", ("request.num_preemptions",), _NOT_PER_REQUEST),
        Read("max_tokens", ("number(request.max_tokens_param)",)),
        Read("queued_time", ("request.queued_time",)),
        Read("prefill_time", ("request.prefill_time",)),
        Read("decode_time", ("request.decode_time",)),
        Read("inference_time", ("request.inference_time",)),
        Read("e2e_latency", ("request.e2e_latency",)),
        # not a field of vLLM's: the "finished" hook takes it from the request's state and leaves it there
        Read(
            "time_to_first_token",
            ("getattr(request, 'kvhook_ttft', nan)",),
            _NO_TTFT,
            needs="finished_hook",
            unmet=_NO_TTFT,
        ),
        Read(
            "mean_time_per_output_token",
            ("request.mean_time_per_output_token",),
            "this vLLM does not compute it; it is decode_time / (num_generation_tokens - 1)",
        ),
    ),
    facts=FACTS,
    core_output="get_output",
    asserts_stats_until="0.11.1",
    schedulers="engine_core.engine_core.scheduler",
    free_blocks=(
        "kv_cache_manager.block_pool.get_num_free_blocks",
        "kv_cache_manager.free_block_queue.num_free_blocks",
    ),
    makes_stats_in=("_update_stats_from_output", "_update_stats_from_finished"),
)

#: 0.9 and 0.10: the engine has one logger, and no manager.
V1_ONE_LOGGER = V1._replace(
    name="v1-0.9",
    targets=(
        Target("engine_init", f"{ENGINE}:LLMEngine.__init__", takes=("log_stats",)),
        Target("engine_step", f"{ENGINE}:LLMEngine.step"),
        Target("manager", f"{ENGINE}:PrometheusStatLogger"),
        Target("record", f"{LOGGERS}:PrometheusStatLogger.record", takes=_STATS_ARGUMENTS),
        _FINISHED,
        PROCESSOR,
        _SETTINGS,
        Target("get_metrics", f"{ENGINE}:LLMEngine.get_metrics", required=False),
    ),
    holder="stat_logger",
    record=f"{LOGGERS}:PrometheusStatLogger.record",
    until="0.11.0",
)

#: 0.8 counts its prefix cache in whole blocks.
_IN_BLOCKS = {"prefix_cache_queries": "prefix.queries * block_size", "prefix_cache_hits": "prefix.hits * block_size"}
_STEPS_0_8 = tuple(Read(r.column, (_IN_BLOCKS[r.column],), r.absent) if r.column in _IN_BLOCKS else r for r in V1.steps)
_NOTES_0_8 = {
    "prefix_cache_queries": "vLLM 0.8 looks up, and counts, whole blocks only: a prompt's last tokens that fill no "
    "block are not in it, and the hit rate is the higher for it",
}

#: 0.8: the engine tells its core and its output processor, both, to make no stats. Both can: AsyncLLM has them do it.
V1_NO_LOGGER = V1._replace(
    name="v1-0.8",
    targets=(
        Target("engine_init", f"{ENGINE}:LLMEngine.__init__", takes=("log_stats",)),
        Target("engine_step", f"{ENGINE}:LLMEngine.step"),
        Target("core", f"{CLIENT}.make_client", takes=("log_stats",)),
        Target("", f"{CLIENT}.get_output"),
        Target(
            "",
            "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
            takes=("engine_core_outputs", "engine_core_timestamp", "iteration_stats"),
        ),
        Target("", f"{STATS}:IterationStats", field=(f"{STATS}:IterationStats", "num_preempted_reqs")),
        _FINISHED,
        PROCESSOR,
        _SETTINGS,
    ),
    tap="outputs",
    must_be_built=True,
    holder="",
    record=_STATS_ARGUMENTS,
    steps=_STEPS_0_8,
    until="0.9.0",
    notes=_NOTES_0_8,
)

#: AsyncLLM from 0.10: `record` is called on the event loop, once per step of a rank; there is no step to be timed.
ASYNC_LLM = V1._replace(
    name="v1-async",
    engine=f"{ASYNC}:AsyncLLM",
    targets=(
        Target("engine_init", f"{ASYNC}:AsyncLLM.__init__", takes=("log_stats",)),
        Target("manager", f"{ASYNC}:StatLoggerManager"),
        Target("record", f"{LOGGERS}:StatLoggerManager.record", takes=(*_STATS_ARGUMENTS, "engine_idx")),
        _FINISHED,
        PROCESSOR,
        _SETTINGS,
    ),
    timed=False,
    core_output="get_output_async",
)

#: AsyncLLM of 0.9: a list of loggers for each rank.
ASYNC_LISTS = ASYNC_LLM._replace(
    name="v1-async-0.9",
    targets=(
        Target("engine_init", f"{ASYNC}:AsyncLLM.__init__", takes=("log_stats", "stat_loggers")),
        Target("", f"{LOGGERS}:StatLoggerBase.record", takes=_STATS_ARGUMENTS),
        Target("", f"{LOGGERS}:StatLoggerBase.log_engine_initialized"),
        _FINISHED,
        PROCESSOR,
        _SETTINGS,
    ),
    tap="lists",
    holder="stat_loggers",
    record=f"{LOGGERS}:StatLoggerBase.record",
    quiet={"stat_loggers": list},
    until="0.10.0",
)

#: AsyncLLM of 0.8; up to 0.8.4 it makes its loggers itself, up to 0.8.2 in one list.
ASYNC_LISTS_0_8 = ASYNC_LISTS._replace(
    name="v1-async-0.8",
    targets=(
        Target("engine_init", f"{ASYNC}:AsyncLLM.__init__", takes=("log_stats",)),
        Target("", f"{LOGGERS}:StatLoggerBase.record", takes=_STATS_ARGUMENTS),
        Target("", f"{STATS}:IterationStats", field=(f"{STATS}:IterationStats", "num_preempted_reqs")),
        PROCESSOR,
        Target("manager", f"{ASYNC}:PrometheusStatLogger", required=False),
        Target("manager", f"{ASYNC}:LoggingStatLogger", required=False),
    ),
    steps=_STEPS_0_8,
    until="0.9.0",
    notes=_NOTES_0_8,
)
