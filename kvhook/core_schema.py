"""What kvhook records inside vLLM's engine core: every column's name, type, unit and meaning.

The engine core is where the scheduler and the KV cache live: in the process of ``LLM``, or in one of its own. Each
core has a ring and trace files of its own, beside those of the front end, with the kinds of records in `CORE_KINDS`.
"""

from __future__ import annotations

from kvhook.schema import COUNTER, FINISH_REASONS, FLAG, GAUGE, ID, META, META_FIELDS, TIME, Field, unix_columns

#: Record kinds of an engine core, as stored in a slot's ``kind`` word.
CORE_STEP, CORE_REQUEST, PREEMPTION, LOOKUP = 16, 17, 18, 19

#: Values of ``limited_by``: why no more was scheduled in a step.
LIMITS = (
    "none_waiting",
    "max_num_seqs",
    "token_budget",
    "kv_blocks",
    "lora",
    "encoder_budget",
    "structured_output",
    "remote_kv",
    "long_prefill",
    "paused",
    "deferred",
    "unknown",
)

#: Values of ``miss_reason``: why a look-up in the prefix cache did not find more.
MISS_REASONS = (
    "none",
    "never_seen",
    "diverged",
    "evicted",
    "reset",
    "short",
    "salted",
    "lora",
    "not_looked_up",
    "unknown",
)

#: A step is one batch: what its ``schedule`` and its ``update_from_output`` did is counted in it, also where other
#: batches are scheduled in between (asynchronous scheduling, a pipeline). What happens between two steps is counted in
#: the one that comes.
CORE_STEP_FIELDS: tuple[Field, ...] = (
    Field("step", "i8", ID, "", "number of the step in its engine core, from 0: one call of Scheduler.schedule"),
    Field(
        "stats_number",
        "i8",
        ID,
        "",
        "the how-manieth scheduler stats of this core the step sent to the front end, from 0; -1 if it sent none",
    ),
    Field("t_schedule_ns", "i8", TIME, "ns", "start of Scheduler.schedule, monotonic clock"),
    Field("t_scheduled_ns", "i8", TIME, "ns", "end of Scheduler.schedule"),
    Field(
        "t_update_ns", "i8", TIME, "ns", "start of Scheduler.update_from_output: the model has run; -1 if it did not"
    ),
    Field("t_end_ns", "i8", TIME, "ns", "end of Scheduler.update_from_output"),
    Field("num_scheduled_tokens", "i8", COUNTER, "tokens", "tokens scheduled: the sum of the four kinds that follow"),
    Field("num_prefill_tokens", "i8", COUNTER, "tokens", "prompt tokens computed for the first time"),
    Field(
        "num_recomputed_tokens",
        "i8",
        COUNTER,
        "tokens",
        "tokens that had been computed or loaded before and were lost, with a preemption or a failed KV transfer",
    ),
    Field("num_decode_tokens", "i8", COUNTER, "tokens", "generated tokens that were computed, one for each request"),
    Field("num_spec_tokens", "i8", COUNTER, "tokens", "speculative tokens that were to be verified"),
    Field("token_budget", "i8", GAUGE, "tokens", "the most tokens that a step may schedule"),
    Field("num_scheduled_reqs", "i8", COUNTER, "requests", "requests that got tokens in this step"),
    Field("num_prefill_reqs", "i8", COUNTER, "requests", "those of them whose prefill was under way"),
    Field("num_new_reqs", "i8", COUNTER, "requests", "requests that were scheduled for the first time"),
    Field("num_resumed_reqs", "i8", COUNTER, "requests", "requests that were scheduled again after a preemption"),
    Field("num_preempted_reqs", "i8", COUNTER, "requests", "preemptions in this step, or just before it"),
    Field(
        "num_finished_reqs",
        "i8",
        COUNTER,
        "requests",
        "requests that finished or were aborted in this step, or just before it",
    ),
    Field("num_running_reqs", "i8", GAUGE, "requests", "running requests when the batch had been scheduled"),
    Field("num_waiting_reqs", "i8", GAUGE, "requests", "waiting requests at that moment, the deferred ones included"),
    Field("num_skipped_waiting_reqs", "i8", GAUGE, "requests", "the deferred part of them"),
    Field("limited_by", "enum", ID, "", "why no more was scheduled: a value of LIMITS"),
    Field("num_kv_blocks", "i8", GAUGE, "blocks", "KV blocks that can be used"),
    Field("num_kv_blocks_allocated", "i8", COUNTER, "blocks", "blocks handed out to be filled"),
    Field("num_kv_blocks_freed", "i8", COUNTER, "blocks", "blocks that nobody holds any more"),
    Field("num_kv_blocks_reused", "i8", COUNTER, "blocks", "blocks found in the prefix cache and taken"),
    Field("num_kv_blocks_revived", "i8", COUNTER, "blocks", "those of the reused ones that nobody held"),
    Field("num_kv_blocks_evicted", "i8", COUNTER, "blocks", "blocks whose cached content was given up"),
    Field("num_kv_blocks_peak", "i8", GAUGE, "blocks", "blocks in use when the batch had been scheduled"),
    Field(
        "num_kv_blocks_cached", "i8", GAUGE, "blocks", "blocks at that moment that nobody held and that can be found"
    ),
    Field("num_kv_blocks_empty", "i8", GAUGE, "blocks", "blocks at that moment that held nothing of use"),
    Field(
        "num_kv_blocks_used",
        "i8",
        GAUGE,
        "blocks",
        "blocks in use at the end of the step; those of a batch that was scheduled meanwhile are among them",
    ),
    Field("num_kv_tokens", "i8", GAUGE, "tokens", "tokens that the blocks in use hold when the batch has run"),
    Field("num_lookups", "i8", COUNTER, "look-ups", "look-ups in the prefix cache, repeated ones included"),
    Field("num_lookup_tokens", "i8", COUNTER, "tokens", "tokens looked up by the requests that were then scheduled"),
    Field("num_found_tokens", "i8", COUNTER, "tokens", "tokens found by them"),
    Field("prefix_cache_reset", "i8", COUNTER, "0/1", "1 if the prefix cache was reset just before this step"),
    Field("kvhook_ns", "i8", GAUGE, "ns", "what kvhook took in the core in the step before, less the calls themselves"),
)

CORE_REQUEST_FIELDS: tuple[Field, ...] = (
    Field("request", "i8", ID, "", "number of the request in its engine core, from 0, in the order of arrival"),
    Field("request_id", "i8", ID, "", "the number in vLLM's request id, as in requests"),
    Field("sample", "i8", ID, "", "which of n samples of one prompt it is; -1 for a request of its own"),
    Field("request_key", "i8", ID, "", "keyed digest of the request id, see Session.request_key"),
    Field("finish_reason", "enum", ID, "", "stop, length, abort, error or repetition"),
    Field("arrived_step", "i8", ID, "", "number of the first step that was scheduled after it arrived"),
    Field("first_scheduled_step", "i8", ID, "", "step in which it was first scheduled; -1 if it never was"),
    Field("first_token_step", "i8", ID, "", "step whose model run gave its first token; -1 if none did"),
    Field("finished_step", "i8", ID, "", "step whose update ended it; else the last that was scheduled before"),
    Field("t_arrived_ns", "i8", TIME, "ns", "when it came to the core; -1 if it was there before kvhook"),
    Field("t_first_scheduled_ns", "i8", TIME, "ns", "when it was first scheduled; -1 if it never was"),
    Field("t_first_token_ns", "i8", TIME, "ns", "end of the step of its first token; -1 if there is none"),
    Field("t_finished_ns", "i8", TIME, "ns", "when it finished"),
    Field("num_prompt_tokens", "i8", COUNTER, "tokens", "length of the prompt"),
    Field("num_generation_tokens", "i8", COUNTER, "tokens", "tokens generated"),
    Field("num_cached_tokens", "i8", COUNTER, "tokens", "tokens it did not have to compute when first scheduled"),
    Field("num_prefill_tokens", "i8", COUNTER, "tokens", "prompt tokens computed for it for the first time"),
    Field("num_recomputed_tokens", "i8", COUNTER, "tokens", "tokens computed once more, as in core_steps"),
    Field("num_preemptions", "i8", COUNTER, "times", "how often it was preempted"),
    Field("preempted_ns", "i8", COUNTER, "ns", "time between its preemptions and being scheduled again"),
    Field("client_index", "i8", ID, "", "which front end sent it: 0 unless several API servers share the engine core"),
)

PREEMPTION_FIELDS: tuple[Field, ...] = (
    Field("step", "i8", ID, "", "step in which it happened (that was being scheduled, or was next)"),
    Field("request", "i8", ID, "", "number of the request, as in core_requests"),
    Field("request_id", "i8", ID, "", "as in core_requests"),
    Field("t_ns", "i8", TIME, "ns", "when it happened"),
    Field("ordinal", "i8", ID, "", "the how-manieth preemption of this request, from 1"),
    Field("num_lost_tokens", "i8", COUNTER, "tokens", "computed tokens that were thrown away"),
    Field("num_kv_blocks_freed", "i8", COUNTER, "blocks", "blocks that came free by it"),
    Field("num_generation_tokens", "i8", COUNTER, "tokens", "tokens it had generated so far"),
)

LOOKUP_FIELDS: tuple[Field, ...] = (
    Field("step", "i8", ID, "", "step in which the request was scheduled with what had been found"),
    Field("request", "i8", ID, "", "number of the request, as in core_requests"),
    Field("request_id", "i8", ID, "", "as in core_requests"),
    Field("t_ns", "i8", TIME, "ns", "when it was looked up"),
    Field("resumed", "i8", FLAG, "0/1", "1 if the request was scheduled again after a preemption"),
    Field(
        "num_tries",
        "i8",
        COUNTER,
        "look-ups",
        "look-ups until it was scheduled: one for each step it was first in line",
    ),
    Field("num_tokens", "i8", COUNTER, "tokens", "tokens that were looked up"),
    Field("num_found_tokens", "i8", COUNTER, "tokens", "tokens found in the prefix cache"),
    Field(
        "num_shared_tokens",
        "i8",
        COUNTER,
        "tokens",
        "the longest beginning that the prompt shares with one of those that were looked up just before, up to 8192; "
        "found or not, and of whole blocks or not",
    ),
    Field("miss_reason", "enum", ID, "", "why no more was found: a value of MISS_REASONS"),
    Field("miss_block", "i8", ID, "", "the first block that was not found, counted from 0; -1 if all were"),
    Field("evicted_steps", "i8", GAUGE, "steps", "how many steps before that block had been evicted; -1 if it was not"),
    Field("evicted_ns", "i8", GAUGE, "ns", "how long before it had been evicted; -1 if it was not"),
    Field("evicted_by", "i8", ID, "", "number of the request whose allocation evicted it; -1 if not known"),
    Field(
        "num_evicted_tokens",
        "i8",
        COUNTER,
        "tokens",
        "tokens of that block and those behind it that had been cached and evicted: what evictions cost this look-up",
    ),
)

#: Record kind of the ledger of blocks: a slot holds as many events as fit into it.
BLOCKS = 20

#: Values of ``event`` in the ledger.
BLOCK_EVENTS = ("allocate", "hit", "cache", "free", "evict", "reset")

#: Head of a BLOCKS record; behind it come the events themselves, each as `BLOCK_EVENT_FIELDS` says.
BLOCKS_FIELDS: tuple[Field, ...] = (Field("count", "i8", ID, "events", "how many events this slot holds"),)

#: One event of a block: name, numpy type, meaning.
BLOCK_EVENT_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("step", "<u4", "step in which it happened (that was being scheduled, or was next)"),
    ("request", "<i4", "number of the request it happened for, as in core_requests; -1 if for none"),
    ("block", "<u4", "number of the block"),
    ("index", "<i4", "cache: the how-manieth block of its request, from 0; else -1"),
    ("event", "<u4", "a value of BLOCK_EVENTS"),
    ("group", "<u4", "KV cache group"),
    ("digest", "<u8", "keyed digest of the content the block holds, with all before it; 0 while it cannot be found"),
)
#: An event takes as many bytes.
BLOCK_EVENT_BYTES = 32

#: Columns that are codes -> the text of each code.
CORE_ENUMS: dict[str, tuple[str, ...]] = {
    "limited_by": LIMITS,
    "miss_reason": MISS_REASONS,
    "finish_reason": FINISH_REASONS,
}

#: Kind of record -> its code and its fields, for the ring and the traces of an engine core.
CORE_KINDS: dict[str, tuple[int, tuple[Field, ...]]] = {
    "core_step": (CORE_STEP, CORE_STEP_FIELDS),
    "core_request": (CORE_REQUEST, CORE_REQUEST_FIELDS),
    "preemption": (PREEMPTION, PREEMPTION_FIELDS),
    "lookup": (LOOKUP, LOOKUP_FIELDS),
    "meta": (META, META_FIELDS),
}

#: Kind of record -> column of nanoseconds since 1970 -> the column of the monotonic clock that it is made of.
CORE_UNIX = {kind: unix_columns(fields) for kind, (_, fields) in CORE_KINDS.items()}

#: Columns of an event of a block that are not stored: name -> meaning.
BLOCK_EVENT_TIMES = {
    "t_ns": "when that step had been scheduled, monotonic clock; -1 if the step is not recorded",
    "t_unix_ns": "the same moment since 1970",
}

#: The same for the ledger of blocks, which has a ring and traces of its own.
BLOCKS_KINDS: dict[str, tuple[int, tuple[Field, ...]]] = {
    "blocks": (BLOCKS, BLOCKS_FIELDS),
    "meta": (META, META_FIELDS),
}
