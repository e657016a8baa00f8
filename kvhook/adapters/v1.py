"""vLLM's V1 engine from 0.11: a `StatLoggerManager` is given `SchedulerStats` and `IterationStats` once a step."""

from __future__ import annotations

from kvhook.adapters.table import Adapter, Read, Source, Target

ENGINE = "vllm.v1.engine.llm_engine"
LOGGERS = "vllm.v1.metrics.loggers"
STATS = "vllm.v1.metrics.stats"

_READMITTED = "this vLLM counts re-admitted requests as new ones"
_PROMPT_SPLIT = "this vLLM does not split prompt tokens by where they came from"
_NO_CONNECTOR = "this vLLM does not count the KV connector's cache"
_NO_MM = "this vLLM has no stats of the multi-modal cache"
_NOT_PER_REQUEST = "this vLLM does not count it per request"

V1 = Adapter(
    name="v1",
    trigger=ENGINE,
    targets=(
        Target("engine_init", f"{ENGINE}:LLMEngine.__init__"),
        Target("engine_step", f"{ENGINE}:LLMEngine.step"),
        Target("manager", f"{ENGINE}:StatLoggerManager"),
        Target("record", f"{LOGGERS}:StatLoggerManager.record"),
        Target(
            "finished",
            f"{STATS}:IterationStats.update_from_finished_request",
            required=False,
            loss="time_to_first_token of single requests",
            field=(f"{STATS}:RequestStateStats", "first_token_latency"),
        ),
        Target("get_metrics", f"{ENGINE}:LLMEngine.get_metrics", required=False),
    ),
    sources=(
        Source("sched", f"{STATS}:SchedulerStats"),
        Source("iteration", f"{STATS}:IterationStats"),
        Source("mm", f"{STATS}:MultiModalCacheStats", optional=True),
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
        Read("num_corrupted_reqs", ("iteration.num_corrupted_reqs", "sched.num_corrupted_reqs")),
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
        Read("request_id", ("number(request.request_id)",), "this vLLM does not say which request finished"),
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
            "this vLLM does not keep it per request; every value of the run is in session.latencies()",
            needs="finished_hook",
        ),
        Read(
            "mean_time_per_output_token",
            ("request.mean_time_per_output_token",),
            "this vLLM does not compute it; it is decode_time / (num_generation_tokens - 1)",
        ),
    ),
    facts={
        "model": "model_config.model",
        "dtype": "model_config.dtype",
        "max_model_len": "model_config.max_model_len",
        "block_size": "cache_config.block_size",
        "num_gpu_blocks": "cache_config.num_gpu_blocks",
        "kv_cache_dtype": "cache_config.cache_dtype",
        "enable_prefix_caching": "cache_config.enable_prefix_caching",
        "kv_cache_metrics": "observability_config.kv_cache_metrics",
        "max_num_seqs": "scheduler_config.max_num_seqs",
        "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
        "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
        "tensor_parallel_size": "parallel_config.tensor_parallel_size",
        "pipeline_parallel_size": "parallel_config.pipeline_parallel_size",
        "data_parallel_size": "parallel_config.data_parallel_size",
        "data_parallel_rank": "parallel_config.data_parallel_rank",
        "device": "device_config.device_type",
    },
)
