"""A `Summary` as text: what a person wants to know first comes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from kvhook.analysis.distribution import Distribution
from kvhook.analysis.summary import Summary
from kvhook.records.levels import tokens_are_known
from kvhook.text.numbers import count, percent, rate, seconds

_WIDTH = 16


class PrintedSummary(Summary):
    """A `Summary` that ``print`` shows as a table."""

    def __str__(self) -> str:
        return as_text(self)


def printed(summary: Summary) -> PrintedSummary:
    """The same numbers, as an object that prints as a table."""
    return PrintedSummary(**{f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)})


def as_text(s: Summary) -> str:
    """The whole summary, some thirty lines of at most 100 characters."""
    return "\n".join(_lines(s))


def _lines(s: Summary) -> Iterator[str]:
    of = f" of {s.engines} engines" if s.engines > 1 else ""
    # of a path the last part says enough; of a hub's name all of it is wanted
    model = s.model.rsplit("/", 1)[-1] if s.model.startswith("/") else s.model
    yield f"vLLM {s.vllm or '?'}{f', {model}' if model else ''}: {s.steps:,} steps{of} in {seconds(s.wall_time)}"
    if not s.steps:
        yield _row("no steps yet", s.why_no_steps or "the trace holds none")
        return
    share = f" ({s.time_in_steps / s.wall_time:.0%} of it inside steps)" if s.wall_time else ""
    if s.step_time.count:
        yield _row("step time", f"p50 {seconds(s.step_time.p50)}, p99 {seconds(s.step_time.p99)}{share}")
    else:
        yield _row("step time", "not known: on an event loop (AsyncLLM) there is no step that could be timed")
    for text in _levels(s):
        yield _row("level", text)
    if s.steps_without_stats:
        yield _row("", f"{s.steps_without_stats:,} steps brought no stats")
    yield ""
    yield _row("KV cache", _usage(s))
    yield _row("prefix cache", _prefix(s))
    if s.prefix_cache_preempted_queries:
        yield _row(
            "",
            f"re-admitted requests: {s.prefix_cache_preempted_hits:,} of {s.prefix_cache_preempted_queries:,} tokens "
            f"hit, {percent(s.preempted_share_of_hits)} of all hits",
        )
    yield _row("prompt tokens", _prompt(s))
    generated = f"{count(s.num_generation_tokens)} tokens, {rate(s.generation_tokens_per_second)}"
    yield _row("generated", "not known" if s.num_generation_tokens is None else generated)
    yield ""
    if s.num_running_reqs_peak is not None:
        yield _row("running", f"mean {s.num_running_reqs_mean:.1f}, peak {s.num_running_reqs_peak:,}")
        yield _row("waiting", f"mean {s.num_waiting_reqs_mean:.1f}, peak {s.num_waiting_reqs_peak:,}")
    yield _row("preemptions", count(s.num_preempted_reqs))
    reasons = ", ".join(f"{name} {n:,}" for name, n in sorted(s.finished_by_reason.items()))
    finished = "not known" if s.num_finished_reqs is None else f"{s.num_finished_reqs:,} requests"
    yield _row("finished", f"{finished}{f' ({reasons})' if reasons else ''}")
    yield ""
    if s.steps_by_level.get("full"):
        yield f"  {'latency':{_WIDTH}}{'count':>9}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"
        yield _latency("first token", s.time_to_first_token)
        yield _latency("inter-token", s.inter_token_latency)
        yield _latency("per out. token", s.mean_time_per_output_token)
        yield _latency("end to end", s.e2e_latency)
    else:
        yield _row("latency", "not recorded at level light: kvhook.install(level='full') does")
    yield ""
    yield _row("kvhook", _cost(s))
    if s.vllm_stats_ns_p50 is not None:
        yield _row(
            "",
            f"vLLM's stats, made for it: p50 {s.vllm_stats_ns_p50 / 1e3:.1f} us; {percent(s.vllm_stats_share, 3)}",
        )
    yield _row("lost", _lost(s))
    for where, error in s.faults.items():
        yield _row("fault", f"{where}: {error}")


def _levels(s: Summary) -> Iterator[str]:
    """What was recorded at which level, where not all is full."""
    if s.steps_by_level.keys() <= {"full"} and not s.level_changes:
        return
    if len(s.steps_by_level) == 1 and "light" in s.steps_by_level:
        yield "light: no latencies, no single requests"
    elif len(s.steps_by_level) > 1:
        yield ", ".join(f"{name} in {n:,} steps" for name, n in s.steps_by_level.items())
        yield f"latencies and single requests are those of the {s.steps_by_level.get('full', 0):,} steps at level full"
    if not tokens_are_known(s.steps_by_level):
        yield "tokens are not known: in some steps outputs were not counted"
    for change in s.level_changes:
        yield f"step {change.get('step')}: {change.get('level')}, because {change['why']}"


def _usage(s: Summary) -> str:
    if s.kv_cache_usage_peak is None:
        return f"not known: {s.absent.get('kv_cache_usage', 'no step brought stats')}"
    size = f" of {s.num_kv_blocks:,} blocks" if s.num_kv_blocks else ""
    tokens = f" of {s.block_size} tokens" if s.num_kv_blocks and s.block_size else ""
    return (
        f"peak {percent(s.kv_cache_usage_peak)}, p95 {percent(s.kv_cache_usage_p95)}, "
        f"mean {percent(s.kv_cache_usage_mean)}{size}{tokens}"
    )


def _prefix(s: Summary) -> str:
    if s.prefix_caching is False:
        return "off (enable_prefix_caching=False): no hit rate"
    if s.prefix_cache_queries is None:
        return f"not known: {s.absent.get('prefix_cache_queries', 'no reason given')}"
    if s.prefix_cache_hit_rate is None:
        return "no look-ups yet"
    return (
        f"hit rate {percent(s.prefix_cache_hit_rate)} of this run: {s.prefix_cache_hits:,} of "
        f"{s.prefix_cache_queries:,} tokens"
    )


def _prompt(s: Summary) -> str:
    if s.num_prompt_tokens is None:
        return "not known"
    if s.num_prompt_tokens_computed is None:
        return f"{count(s.num_prompt_tokens)}, {rate(s.prompt_tokens_per_second)}"
    return (
        f"{count(s.num_prompt_tokens)}: {count(s.num_prompt_tokens_computed)} computed, "
        f"{count(s.num_prompt_tokens_cached)} cached; {rate(s.prompt_tokens_per_second)}"
    )


def _cost(s: Summary) -> str:
    if s.kvhook_ns_p50 is None or s.kvhook_ns_p99 is None:
        return "cost not measured yet"
    return (
        f"cost per step p50 {s.kvhook_ns_p50 / 1e3:.1f} us, p99 {s.kvhook_ns_p99 / 1e3:.1f} us; "
        f"{percent(s.kvhook_share, 3)} of the time inside steps"
    )


def _lost(s: Summary) -> str:
    dropped = f"; {s.records_dropped:,} dropped from the bounded history" if s.records_dropped else ""
    return f"{s.records_lost:,} records{dropped}"


def _row(name: str, text: str) -> str:
    return f"  {name:{_WIDTH}}{text}"


def _latency(name: str, d: Distribution) -> str:
    cells = "".join(f"{seconds(v):>10}" for v in (d.mean, d.p50, d.p90, d.p99, d.max))
    return f"  {name:{_WIDTH}}{d.count:>9,}{cells}"
