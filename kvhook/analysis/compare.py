"""Several runs side by side: one line per number, one column per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath

from kvhook.analysis.distribution import Distribution
from kvhook.analysis.summary import Summary
from kvhook.text.summary import count, percent, seconds

_NAME, _CELL, _MOST = 28, 16, 28

#: What is compared: name, and how it is read from a summary as text.
ROWS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("vLLM", lambda s: s.vllm or "-"),
    ("model", lambda s: s.model.rsplit("/", 1)[-1][-(_CELL - 2) :] or "-"),
    ("steps", lambda s: count(s.steps)),
    ("level", lambda s: "/".join(s.steps_by_level) or "-"),
    ("time in steps", lambda s: seconds(s.time_in_steps)),
    ("step time p50", lambda s: seconds(s.step_time.p50)),
    ("step time p99", lambda s: seconds(s.step_time.p99)),
    ("KV blocks", lambda s: _known(s.num_kv_blocks)),
    ("KV usage peak", lambda s: percent(s.kv_cache_usage_peak)),
    ("KV usage mean", lambda s: percent(s.kv_cache_usage_mean)),
    ("prefix cache hit rate", lambda s: "off" if s.prefix_caching is False else percent(s.prefix_cache_hit_rate)),
    ("prefix cache hit tokens", lambda s: _known(s.prefix_cache_hits)),
    ("prompt tokens", lambda s: _known(s.num_prompt_tokens)),
    ("prompt tokens computed", lambda s: _known(s.num_prompt_tokens_computed)),
    ("generated tokens", lambda s: _known(s.num_generation_tokens)),
    ("generated per s in steps", lambda s: _known(s.generation_tokens_per_second)),
    ("running peak", lambda s: _known(s.num_running_reqs_peak)),
    ("waiting peak", lambda s: _known(s.num_waiting_reqs_peak)),
    ("preemptions", lambda s: _known(s.num_preempted_reqs)),
    ("finished requests", lambda s: _known(s.num_finished_reqs)),
    ("time to first token p50", lambda s: _p50(s.time_to_first_token)),
    ("inter-token latency p50", lambda s: _p50(s.inter_token_latency)),
    ("end to end p50", lambda s: _p50(s.e2e_latency)),
    ("records lost", lambda s: count(s.records_lost)),
)


def side_by_side(summaries: Sequence[Summary], names: Sequence[str]) -> str:
    """A table of runs; ``-`` where a vLLM does not give the number.

    Args:
        summaries: the runs.
        names: what to put over each column; of a path its last part.
    """
    heads = [PurePath(name).stem[:_MOST] for name in names]
    width = max(_CELL, *(len(head) + 2 for head in heads))
    lines = [" " * _NAME + "".join(f"{head:>{width}}" for head in heads)]
    lines += [f"{name:{_NAME}}" + "".join(f"{read(s):>{width}}" for s in summaries) for name, read in ROWS]
    if len({s.vllm for s in summaries}) > 1:
        lines.append("\nvLLM counts prefix-cache look-ups differently from release to release: where requests were")
        lines.append("preempted or had to wait for blocks, compare hit tokens and computed tokens, not hit rates.")
    return "\n".join(lines)


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _p50(values: Distribution) -> str:
    return seconds(values.p50)
