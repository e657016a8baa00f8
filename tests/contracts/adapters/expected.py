"""Which adapters serve a release, and which columns are live: written down as changes, release by release, and not
taken from the adapters."""

from __future__ import annotations

from kvhook.adapters import ADAPTERS
from kvhook.adapters.table import Adapter
from tests.contracts.releases import ALL, between

BY_NAME = {a.name: a for a in ADAPTERS}


#: first release, last release, the adapters that serve it
SERVED_BY = (
    ("0.6.0", "0.7.3", "v0"),
    ("0.8.0", "0.8.5.post1", "v0 v1-0.8 v1-async-0.8"),
    ("0.9.0", "0.9.2", "v0 v1-0.9 v1-async-0.9"),
    ("0.10.0", "0.10.2", "v0 v1-0.9 v1-async"),
    ("0.11.0", None, "v1 v1-async"),
)

#: columns of a family, and from which release on there are more
STEP_COLUMNS = {
    "v0": {
        "0.6.0": "num_running_reqs num_waiting_reqs num_swapped_reqs kv_cache_usage cpu_kv_cache_usage "
        "v0_prefix_cache_hit_rate num_prompt_tokens num_generation_tokens num_preempted_reqs",
    },
    "v1": {
        "0.8.0": "num_running_reqs num_waiting_reqs kv_cache_usage prefix_cache_requests prefix_cache_queries "
        "prefix_cache_hits prefix_cache_reset num_prompt_tokens num_generation_tokens num_preempted_reqs",
        "0.8.3": "num_draft_tokens num_accepted_tokens",
        "0.8.5": "num_drafts",
        "0.11.1": "num_corrupted_reqs prefix_cache_preempted_requests prefix_cache_preempted_queries "
        "prefix_cache_preempted_hits connector_prefix_cache_queries connector_prefix_cache_hits "
        "mm_cache_queries mm_cache_hits",
        "0.12.0": "num_evicted_blocks_sampled",
        "0.16.0": "num_prompt_tokens_computed num_prompt_tokens_cached num_prompt_tokens_external",
        "0.20.0": "num_skipped_waiting_reqs",
    },
}
REQUEST_COLUMNS = {
    "v0": {
        "0.6.0": "finish_reason num_prompt_tokens num_generation_tokens e2e_latency",
        "0.6.4": "max_tokens queued_time prefill_time decode_time inference_time time_to_first_token",
    },
    "v1": {
        "0.8.0": "finish_reason num_prompt_tokens num_generation_tokens max_tokens queued_time prefill_time "
        "decode_time inference_time e2e_latency",
        "0.10.2": "time_to_first_token",
        "0.11.0": "mean_time_per_output_token",
        "0.13.0": "num_cached_tokens",
        "0.20.0": "request_id",
        "0.30.0": "num_preemptions",
    },
}
#: what kvhook knows by itself, or works out
OWN = {
    "step": "step engine_index t_start_ns t_end_ns has_scheduler_stats scheduler_stats_logged "
    "has_iteration_stats level kvhook_ns "
    "num_kv_blocks num_kv_blocks_used num_finished_reqs ttft_count ttft_sum ttft_min ttft_max "
    "itl_count itl_sum itl_min itl_max",
    "request": "request step t_end_ns",
}


def expected_adapters(release: str) -> list[str]:
    return next(names.split() for first, last, names in SERVED_BY if between(release, first, last))


def expected_columns(release: str, adapter: Adapter, kind: str) -> set[str]:
    table = {"step": STEP_COLUMNS, "request": REQUEST_COLUMNS}[kind][adapter.family]
    changes = [names.split() for first, names in table.items() if between(release, first)]
    return {*OWN[kind].split(), *(name for names in changes for name in names)}


ENGINES = [(release, name) for release in ALL for name in expected_adapters(release)]
