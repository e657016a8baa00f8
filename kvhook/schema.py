"""The tables of what kvhook records: every column's and every fact's name, type, unit and meaning.

Ring layout, trace columns, exports, help texts and documentation are derived from here; a field that is not in
this table does not exist. Names are vLLM's current ones.

A trace is a row of equally long *slots*. Each slot holds one record of one kind: a step, a finished request, a
list of values that belongs to a step (its single TTFTs, say), or, in trace files only, a piece of metadata.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

#: Record kinds, as stored in a slot's ``kind`` word.
STEP, REQUEST, VALUES, META = 1, 2, 3, 4

#: How a column is to be read: identity, clock, flag, something that happened in the step, or a state at its end.
ID, TIME, FLAG, COUNTER, GAUGE = "id", "time", "flag", "counter", "gauge"


class Field(NamedTuple):
    """One column.

    ``type`` is ``"i8"`` or ``"f8"`` (stored as is) or ``"enum"`` (stored as an ``i8`` code, read as text).
    ``role``: ``counter`` columns hold what happened in this step and may be summed; ``gauge`` columns hold a state
    at the end of the step and may not. In a step without stats counters are 0 and gauges are -1 (``i8``) or NaN.
    """

    name: str
    type: str
    role: str
    unit: str
    meaning: str


STEP_FIELDS: tuple[Field, ...] = (
    Field("step", "i8", ID, "", "number of the step, from 0, per engine"),
    Field("engine_index", "i8", ID, "", "vLLM's index of the engine core (data-parallel rank) behind the record"),
    Field("t_start_ns", "i8", TIME, "ns", "start of LLMEngine.step, monotonic clock; without a step: as t_end_ns"),
    Field("t_end_ns", "i8", TIME, "ns", "end of LLMEngine.step, monotonic clock; without a step: when its stats came"),
    Field("has_scheduler_stats", "i8", FLAG, "0/1", "1 if the step brought the scheduler's stats"),
    Field(
        "scheduler_stats_logged",
        "i8",
        FLAG,
        "0/1",
        "1 if vLLM's front end passed the scheduler's stats on to its stat loggers; some releases drop them",
    ),
    Field("has_iteration_stats", "i8", FLAG, "0/1", "1 if the step brought iteration stats (outputs came back)"),
    Field("level", "i8", FLAG, "0-2", "how much of the step was recorded: an index into LEVELS"),
    Field("num_running_reqs", "i8", GAUGE, "requests", "requests in the running batch"),
    Field("num_waiting_reqs", "i8", GAUGE, "requests", "requests that wait, the deferred ones included"),
    Field("num_skipped_waiting_reqs", "i8", GAUGE, "requests", "the deferred part of the waiting requests"),
    Field("num_kv_blocks", "i8", GAUGE, "blocks", "KV blocks that can be used (num_gpu_blocks less the null block)"),
    Field("num_kv_blocks_used", "i8", GAUGE, "blocks", "KV blocks in use: kv_cache_usage x num_kv_blocks"),
    Field(
        "num_kv_blocks_peak",
        "i8",
        GAUGE,
        "blocks",
        "KV blocks in use when the step had been scheduled, before finished requests gave theirs back",
    ),
    Field("num_added_reqs", "i8", COUNTER, "requests", "requests added to the engine since the step before"),
    Field("prefix_cache_requests", "i8", COUNTER, "requests", "new requests that looked into the prefix cache"),
    Field("prefix_cache_queries", "i8", COUNTER, "tokens", "prompt tokens that were looked up"),
    Field("prefix_cache_hits", "i8", COUNTER, "tokens", "prompt tokens that were found"),
    Field("prefix_cache_preempted_requests", "i8", COUNTER, "requests", "re-admitted requests that looked it up again"),
    Field("prefix_cache_preempted_queries", "i8", COUNTER, "tokens", "tokens looked up by re-admitted requests"),
    Field("prefix_cache_preempted_hits", "i8", COUNTER, "tokens", "tokens found by re-admitted requests"),
    Field("prefix_cache_reset", "i8", COUNTER, "0/1", "1 if the prefix cache was reset before this step"),
    Field("connector_prefix_cache_queries", "i8", COUNTER, "tokens", "tokens asked of the KV connector"),
    Field("connector_prefix_cache_hits", "i8", COUNTER, "tokens", "tokens the KV connector had"),
    Field("num_prompt_tokens", "i8", COUNTER, "tokens", "prompt tokens whose prefill finished in this step"),
    Field("num_prompt_tokens_computed", "i8", COUNTER, "tokens", "the part of them that was computed"),
    Field("num_prompt_tokens_cached", "i8", COUNTER, "tokens", "the part of them that came from a cache"),
    Field("num_prompt_tokens_external", "i8", COUNTER, "tokens", "the part of the cached ones a KV transfer brought"),
    Field("num_generation_tokens", "i8", COUNTER, "tokens", "tokens generated"),
    Field(
        "num_preempted_reqs",
        "i8",
        COUNTER,
        "requests",
        "preemptions (KV blocks taken away) that vLLM reported; it does so with the request's next output",
    ),
    Field("num_finished_reqs", "i8", COUNTER, "requests", "requests finished, the aborted ones included"),
    Field("num_aborted_reqs", "i8", COUNTER, "requests", "requests aborted since the step before"),
    Field("num_corrupted_reqs", "i8", COUNTER, "requests", "finished requests whose logits held NaN"),
    Field("ttft_count", "i8", COUNTER, "values", "times to first token in this step"),
    Field("itl_count", "i8", COUNTER, "values", "inter-token latencies in this step"),
    Field("num_drafts", "i8", COUNTER, "drafts", "speculative drafts"),
    Field("num_draft_tokens", "i8", COUNTER, "tokens", "tokens drafted"),
    Field("num_accepted_tokens", "i8", COUNTER, "tokens", "drafted tokens accepted"),
    Field("mm_cache_queries", "i8", COUNTER, "items", "multi-modal items looked up in the processor cache"),
    Field("mm_cache_hits", "i8", COUNTER, "items", "multi-modal items found there"),
    Field("num_evicted_blocks_sampled", "i8", COUNTER, "blocks", "evictions among the blocks that vLLM samples"),
    Field("num_swapped_reqs", "i8", GAUGE, "requests", "requests swapped out to the CPU (V0)"),
    Field("kvhook_ns", "i8", GAUGE, "ns", "what kvhook itself took in an earlier step; measured now and then, else -1"),
    Field(
        "vllm_stats_ns",
        "i8",
        GAUGE,
        "ns",
        "what vLLM took in an earlier step to make iteration stats only because kvhook records; now and then, else -1",
    ),
    Field("kv_cache_usage", "f8", GAUGE, "0-1", "share of the usable KV blocks in use at the end of the step"),
    Field(
        "kv_cache_usage_peak",
        "f8",
        GAUGE,
        "0-1",
        "num_kv_blocks_peak as a share, counted as this vLLM counts kv_cache_usage",
    ),
    Field("cpu_kv_cache_usage", "f8", GAUGE, "0-1", "share of the CPU swap space in use (V0)"),
    Field("v0_prefix_cache_hit_rate", "f8", GAUGE, "0-1", "V0's own running hit rate, over blocks, not tokens"),
    Field("ttft_sum", "f8", COUNTER, "s", "sum of the times to first token"),
    Field("ttft_min", "f8", COUNTER, "s", "smallest of them"),
    Field("ttft_max", "f8", COUNTER, "s", "largest of them"),
    Field("itl_sum", "f8", COUNTER, "s", "sum of the inter-token latencies"),
    Field("itl_min", "f8", COUNTER, "s", "smallest of them; equal to itl_max in most steps: the batch moves together"),
    Field("itl_max", "f8", COUNTER, "s", "largest of them"),
)

REQUEST_FIELDS: tuple[Field, ...] = (
    Field("request", "i8", ID, "", "number of the finished request, from 0, in the order of finishing, per engine"),
    Field(
        "request_id",
        "i8",
        ID,
        "",
        "vLLM's request id where it is a number of up to nine digits (LLM counts its prompts), else -1; with "
        "kvhook.install(request_ids='hashed') a keyed digest of any id: Session.request_key(id) >> 11",
    ),
    Field(
        "sample_index",
        "i8",
        ID,
        "",
        "which sample of its prompt, from 0, where n > 1; samples of one prompt share their request_id",
    ),
    Field(
        "prompt_number",
        "i8",
        ID,
        "",
        "number of its prompt in the order in which they were added, from 0, per engine; the samples of a prompt share "
        "it. -1 if it was there before kvhook",
    ),
    Field("label", "i8", ID, "", "its label, see kvhook.label; empty if it has none"),
    Field("lora_name", "i8", ID, "", "its LoRA adapter; empty if it has none"),
    Field("step", "i8", ID, "", "step in which it finished, or the first one published after it was aborted"),
    Field("t_end_ns", "i8", TIME, "ns", "end of that step, monotonic clock"),
    Field("finish_reason", "enum", ID, "", "stop, length, abort, error or repetition"),
    Field("num_prompt_tokens", "i8", COUNTER, "tokens", "length of the prompt"),
    Field("num_generation_tokens", "i8", COUNTER, "tokens", "tokens generated"),
    Field("num_cached_tokens", "i8", COUNTER, "tokens", "prompt tokens that came from a cache at first admission"),
    Field("num_preemptions", "i8", COUNTER, "times", "how often it was preempted"),
    Field("max_tokens", "i8", ID, "tokens", "the request's max_tokens, -1 if it had none"),
    Field("queued_time", "f8", TIME, "s", "from queued to first scheduled"),
    Field("prefill_time", "f8", TIME, "s", "from first scheduled to first token"),
    Field("decode_time", "f8", TIME, "s", "from first to last token"),
    Field("inference_time", "f8", TIME, "s", "from first scheduled to last token"),
    Field("e2e_latency", "f8", TIME, "s", "from arrival to the end"),
    Field("time_to_first_token", "f8", TIME, "s", "from arrival to first token"),
    Field("mean_time_per_output_token", "f8", TIME, "s", "decode_time / (generated tokens - 1), 0 for one token"),
)

#: Head of a VALUES record; behind it come the values themselves (``f8``) to the end of the slot.
VALUES_FIELDS: tuple[Field, ...] = (
    Field("step", "i8", ID, "", "step the values belong to"),
    Field("series", "i8", ID, "", "which list: an index into VALUE_SERIES"),
    Field("count", "i8", ID, "values", "how many values this slot holds"),
)

#: Head of a META record (trace files only); behind it come ``nbytes`` of JSON.
META_FIELDS: tuple[Field, ...] = (
    Field("part", "i8", ID, "", "number of this piece, from 0"),
    Field("parts", "i8", ID, "", "number of pieces"),
    Field("nbytes", "i8", ID, "bytes", "bytes of JSON in this piece"),
)


class FactField(NamedTuple):
    """One fact about an engine, or about a run.

    ``type`` is ``"text"``, ``"i8"`` (an integer from 0), ``"f8"``, ``"flag"`` (true or false), ``"texts"`` (name ->
    text), ``"reasons"`` (kind of record -> column -> text) or ``"list"``. Where vLLM does not tell it, its value is
    None; but a ``"count"``, an integer from 0 as well, is never None.
    """

    name: str
    type: str
    unit: str
    meaning: str


#: What a ring or trace tells about each engine: an entry of ``session.meta["engines"]``. Files of a newer kvhook may
#: have more. A fact of another type than this is not believed, see `kvhook.facts.clean_facts`.
FACT_FIELDS: tuple[FactField, ...] = (
    # the process
    FactField("kvhook", "text", "", "version of kvhook that recorded"),
    FactField("vllm", "text", "", "vLLM's version"),
    FactField("python", "text", "", "Python's version"),
    FactField("pid", "i8", "", "process id"),
    FactField("parent_pid", "i8", "", "process id of the parent process"),
    FactField("rank", "i8", "", "rank of the process, where its launcher started several"),
    FactField(
        "pid_namespace", "i8", "", "the namespace in which that id counts (each container has its own), 0 if unknown"
    ),
    FactField("program", "text", "", "file name of the program that ran"),
    FactField("session", "text", "", "a name for this recording, which the files of its engine cores carry too"),
    FactField(
        "kvhook_runs", "text", "", "random marks of the kvhook run commands above it, outermost first; only under one"
    ),
    FactField("anonymous", "flag", "", "true where kvhook.install(anonymous=True) left out what could name somebody"),
    # the recording
    FactField("engine", "count", "", "number of the engine in its process, from 0"),
    FactField("adapter", "text", "", "kvhook's adapter that read this vLLM"),
    FactField("engine_class", "text", "", "name of the engine's class"),
    FactField("engine_index", "i8", "", "vLLM's index of the engine core (data-parallel rank); of AsyncLLM alone"),
    FactField("absent", "reasons", "", "columns that are not recorded, and why"),
    FactField("notes", "texts", "", "column -> what to know about its numbers from this vLLM"),
    FactField("levels", "list", "", "from which step on which level was recorded, and why it changed"),
    FactField(
        "max_overhead", "f8", "share", "the budget that kvhook.install(max_overhead=...) set; only if there was one"
    ),
    FactField("hook_call_ns", "i8", "ns", "what kvhook costs in each step outside of what kvhook_ns measures"),
    FactField("stats_on", "flag", "", "whether the user had vLLM's stats on"),
    FactField("stats_for_kvhook", "flag", "", "whether vLLM makes iteration stats only because kvhook records"),
    FactField("finished_hook", "flag", "", "whether the first token's time of single requests could be hooked"),
    FactField("timed_steps", "flag", "", "whether steps have a start and an end; false for AsyncLLM"),
    FactField("stats_from_core", "flag", "", "whether the scheduler's stats are taken from the engine core's outputs"),
    FactField("sees_requests", "flag", "", "whether calls that add and abort requests are seen"),
    FactField("sees_schedule", "flag", "", "whether the scheduler is in this process: a peak inside a step is seen"),
    FactField("splits_prompt_tokens", "flag", "", "level light: whether this vLLM tells cached prompt tokens apart"),
    # the engine's configuration
    FactField("model", "text", "", "model's name or path, as it was given to vLLM"),
    FactField("dtype", "text", "", "type of the weights"),
    FactField("runner_type", "text", "", "what the engine does: generate, pooling or draft"),
    FactField("device", "text", "", "vLLM's device type"),
    FactField("on_gpu", "flag", "", "whether that is not a CPU"),
    FactField("max_model_len", "i8", "tokens", "longest request"),
    FactField("block_size", "i8", "tokens", "tokens in a KV block"),
    FactField("num_gpu_blocks", "i8", "blocks", "KV blocks of vLLM's cache, of all its engine cores"),
    FactField("num_kv_blocks", "i8", "blocks", "KV blocks that requests can use, of one engine core"),
    FactField("num_kv_cache_groups", "i8", "groups", "groups of layers that share the blocks; more than one if hybrid"),
    FactField("kv_cache_size_tokens", "i8", "tokens", "tokens that fit into the KV cache, as vLLM reckons"),
    FactField("kv_usage_of", "i8", "blocks", "num_kv_blocks_used = kv_cache_usage x kv_usage_of - kv_usage_reserved"),
    FactField("kv_usage_reserved", "i8", "blocks", "see kv_usage_of: 1 where vLLM counts its null block as used"),
    FactField("kv_cache_dtype", "text", "", "type of the KV cache's entries"),
    FactField("enable_prefix_caching", "flag", "", "whether prefix caching is on"),
    FactField("kv_cache_metrics", "flag", "", "whether vLLM samples evictions"),
    FactField("max_num_seqs", "i8", "requests", "most requests in a batch"),
    FactField("max_num_batched_tokens", "i8", "tokens", "most tokens in a step"),
    FactField("enable_chunked_prefill", "flag", "", "whether a prompt may take several steps"),
    FactField("async_scheduling", "flag", "", "whether a step is scheduled before the one before it has ended"),
    FactField("max_loras", "i8", "adapters", "LoRA adapters in a batch; only where LoRA is on"),
    FactField("tensor_parallel_size", "i8", "", "tensor-parallel ranks"),
    FactField("pipeline_parallel_size", "i8", "", "pipeline-parallel ranks"),
    FactField("data_parallel_size", "i8", "", "data-parallel ranks"),
    FactField("data_parallel_rank", "i8", "", "number of this rank"),
    FactField("executor", "text", "", "what runs the workers: uni, mp, ray, external_launcher, or a class"),
    # the account of the records
    FactField("records_published", "count", "records", "records that were made"),
    FactField(
        "records_overrun", "count", "records", "those overwritten in the ring before they were copied to the file"
    ),
    FactField("records_unwritten", "count", "records", "those that could not be written to the file"),
    FactField("tokens_not_counted", "flag", "", "whether outputs came that nobody counted: tokens are not known then"),
    FactField("faults", "texts", "", "what failed inside kvhook while this engine was recorded: the first error each"),
    FactField("recovered", "i8", "records", "records that `kvhook recover` added from the ring"),
    FactField("trace", "text", "", "kvhook.open with several files: the file this engine is from"),
    FactField("clocks", "list", "", "of several files: both clocks of this engine's machine, as those of the run"),
)

#: What a trace tells about the whole run: ``session.meta`` beside ``engines``, the list of `FACT_FIELDS`.
RUN_FIELDS: tuple[FactField, ...] = (
    FactField("name", "text", "", 'the file, or "this session"'),
    FactField("kvhook", "text", "", "version of kvhook that recorded the first engine"),
    FactField("vllm", "text", "", "vLLM's version, of the first engine"),
    FactField("python", "text", "", "Python's version, of the first engine"),
    FactField("adapter", "text", "", "kvhook's adapter, of the first engine"),
    FactField("engines", "list", "", "the facts about each engine"),
    FactField("absent", "texts", "", "columns that no engine fills, and why"),
    FactField("records", "count", "records", "records that are there"),
    FactField("records_lost", "count", "records", "records overwritten or not written before they could be kept"),
    FactField("records_dropped", "count", "records", "records that fell out of a bounded history"),
    FactField("damaged", "count", "records", "records that are not whole and are left out"),
    FactField("monotonic_ns", "count", "ns", "the recording machine's monotonic clock at one moment"),
    FactField("realtime_ns", "count", "ns", "the same moment since 1970"),
    FactField("clocks", "list", "", "both clocks at some moments: pairs of monotonic_ns and realtime_ns"),
    FactField(
        "clock_drift_ns",
        "i8",
        "ns",
        "how much further the time since 1970 went in the run than the monotonic clock",
    ),
    FactField("scopes", "list", "", "the scopes, as `kvhook.records.events.Scope` has them"),
    FactField(
        *("engine_events", "list", ""),
        "what was done to the engines, as `kvhook.records.engine_events.EngineEvent` has it",
    ),
    FactField("labels", "list", "", "the labels that requests were given"),
    FactField("part", "text", "", "which part of a run this is; empty if it is all of it"),
    FactField("not_closed", "text", "", "that the process was killed, and what became of its last records"),
    FactField("faults", "texts", "", "what failed inside kvhook: the first error at each place"),
    FactField("hook_call_ns", "i8", "ns", "a session's: see the fact of that name about engines"),
    FactField("why_no_steps", "text", "", "a session's: what to do if no steps are recorded"),
)

#: Lists of single values kept beside the steps. A list takes slots of its own only when the step record does not
#: tell it already: one or two values are its min and max, equal ones are min = max.
VALUE_SERIES = ("time_to_first_token", "inter_token_latency")

#: Values of ``level``. Light: what the engine core sends, and counts of its outputs. Sparse: as light, with the outputs
#: counted in every n-th step only (in the others ``has_iteration_stats`` is 0).
LEVELS = ("full", "light", "sparse")

#: Columns of a step that level light does not have, and those that are counted from outputs: at level sparse they are
#: known only where these were looked at.
FULL_ONLY = (
    "scheduler_stats_logged",
    "num_corrupted_reqs",
    "ttft_count",
    "ttft_sum",
    "ttft_min",
    "ttft_max",
    "itl_count",
    "itl_sum",
    "itl_min",
    "itl_max",
    "mm_cache_queries",
    "mm_cache_hits",
    "vllm_stats_ns",
)
COUNTED = (
    "num_prompt_tokens",
    "num_prompt_tokens_computed",
    "num_prompt_tokens_cached",
    "num_prompt_tokens_external",
    "num_generation_tokens",
    "num_preempted_reqs",
    "num_finished_reqs",
)

#: Codes of ``finish_reason``, in the order of vLLM's FinishReason. Newer reasons keep their number as text.
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")

#: Columns of requests that hold a code, which is read as a text. The trace says what each code means; -1 is "".
NAMES = ("label", "lora_name")

#: Kind of record -> its code and its fields.
KINDS: dict[str, tuple[int, tuple[Field, ...]]] = {
    "step": (STEP, STEP_FIELDS),
    "request": (REQUEST, REQUEST_FIELDS),
    "values": (VALUES, VALUES_FIELDS),
    "meta": (META, META_FIELDS),
}


def unix_columns(fields: Iterable[Field]) -> dict[str, str]:
    """The columns of nanoseconds since 1970 that a table has beside those of the monotonic clock: name -> the column
    that it is made of."""
    return {f.name.replace("_ns", "_unix_ns"): f.name for f in fields if f.role == TIME and f.unit == "ns"}


def stored(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """The fields in the order in which a slot holds them: 8-byte integers first, then floats."""
    return tuple(f for f in fields if f.type != "f8") + tuple(f for f in fields if f.type == "f8")


def blank(field: Field) -> str:
    """What a column holds in a step that brought no stats, as Python source.

    Nothing was counted (0), or the state or the name is not known (-1, or NaN); never a number that looks like one.
    """
    if field.role == GAUGE or field.name in NAMES:
        return "nan" if field.type == "f8" else "-1"
    return "0.0" if field.type == "f8" else "0"
