"""A `Summary` as text: what a person wants to know first comes first."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator

from kvhook.analysis.accounts import Account
from kvhook.analysis.distribution import Distribution
from kvhook.analysis.engine_events import EventTotal
from kvhook.analysis.summary import LeftOut, Summary
from kvhook.records.engine_events import KINDS
from kvhook.records.levels import tokens_are_known
from kvhook.text.cache import cache_lines, group_lines
from kvhook.text.core_report import LIMITS, again
from kvhook.text.diagnosis import finding_lines
from kvhook.text.numbers import count, percent, rate, seconds

_WIDTH = 16
#: The longest text of a row that is wrapped.
_LONGEST = 80
_NO_STEP = "on an event loop (AsyncLLM) there is no step that could be timed"


class PrintedSummary(Summary):
    """A `Summary` that ``print`` shows as a table."""

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from kvhook.text.notebook import summary_html

        return summary_html(self)


def printed(summary: Summary) -> PrintedSummary:
    """The same numbers, as an object that prints as a table."""
    return PrintedSummary(**{f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)})


def as_text(s: Summary) -> str:
    """The whole summary, some thirty lines of at most 100 characters."""
    return "\n".join(_lines(s))


#: A summary tells that the wall clock was adjusted if it was by so many nanoseconds.
WORTH_SAYING_NS = 10_000_000


def _lines(s: Summary) -> Iterator[str]:
    yield from _head(s)
    if not s.steps:
        why = "all of them are warm-up" if s.left_out else "this part holds none" if s.part else "the trace holds none"
        yield _row("no steps yet", s.why_no_steps or why)
        return
    yield from _steps(s)
    # paragraphs; one without lines leaves no gap
    for part in (_caches, _queue, _accounts, _latencies, _own, _diagnosis):
        lines = list(part(s))
        if lines:
            yield ""
            yield from lines


def _head(s: Summary) -> Iterator[str]:
    of = f" of {s.engines} engines" if s.engines > 1 else ""
    # of a path the last part says enough; of a hub's name all of it is wanted
    model = s.model.rsplit("/", 1)[-1] if s.model.startswith("/") else s.model
    yield f"vLLM {s.vllm or '?'}{f', {model}' if model else ''}: {s.steps:,} steps{of} in {seconds(s.wall_time)}"
    if s.part:
        yield _row("only", s.part)
    if s.not_closed:
        for i, line in enumerate(textwrap.wrap(s.not_closed, _LONGEST, break_long_words=False, break_on_hyphens=False)):
            yield _row("" if i else "not closed", line)
    if s.left_out:
        yield _row("left out", _left_out(s.left_out))
    if s.replicas:
        ranks = "1 rank" if s.replicas == 1 else f"{s.replicas:,} ranks"
        yield _row(
            "counted once",
            f"{ranks} did the same work as another one, and {'is' if s.replicas == 1 else 'are'} left out",
        )


def _steps(s: Summary) -> Iterator[str]:
    share = f" ({s.time_in_steps / s.wall_time:.0%} of it inside steps)" if s.wall_time else ""
    if s.step_time.count:
        yield _row("step time", f"p50 {seconds(s.step_time.p50)}, p99 {seconds(s.step_time.p99)}{share}")
        if s.steps_without_times:
            yield _row("", f"left out here: {s.steps_without_times:,} of the steps, which have no times")
    else:
        yield _row("step time", f"not known: {s.why_steps_have_no_times or _NO_STEP}")
    for text in _levels(s):
        yield _row("level", text)
    if abs(s.clock_drift_ns) >= WORTH_SAYING_NS:
        moved = f"{seconds(abs(s.clock_drift_ns) / 1e9)} {'ahead' if s.clock_drift_ns > 0 else 'back'}"
        yield _row("clock", f"the machine's wall clock was set {moved} in this run, compared with the monotonic one")
    if s.steps_without_stats:
        yield _row("", f"{s.steps_without_stats:,} step{'s' * (s.steps_without_stats > 1)} brought no stats")


def _caches(s: Summary) -> Iterator[str]:
    for name, text in (*cache_lines(s), *group_lines(s)):
        yield _row(name, text)
    yield _row("prompt tokens", _prompt(s))
    if s.pooling:
        yield _row("pooling", "no tokens are generated")
    else:
        generated = f"{count(s.num_generation_tokens)} tokens, {rate(s.generation_tokens_per_second)}"
        why = s.not_recorded.get("num_generation_tokens", "")
        unknown = f"not known{f': {why}' if why else ''}"
        yield _row("generated", unknown if s.num_generation_tokens is None else generated)
    if s.num_drafts:
        yield _row("speculative", _drafts(s))
    if s.max_loras and not s.by_lora_name:
        yield _row("LoRA", f"on, at most {s.max_loras} adapters in a batch; no finished request had one")
    if s.engine_events:
        yield from rows_of("engine events", map(_event, s.engine_events))


def _accounts(s: Summary) -> Iterator[str]:
    for account in s.accounts:
        if not account.ok:
            yield from _unbalanced(account)


def _latencies(s: Summary) -> Iterator[str]:
    if not s.steps_by_level.get("full"):
        yield _row("latency", "not recorded at level light: kvhook.install(level='full') does")
        return
    yield f"  {'latency':{_WIDTH}}{'count':>9}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"
    if not s.pooling:
        yield _latency("first token", s.time_to_first_token)
        yield _latency("inter-token", s.inter_token_latency)
        yield _latency("per out. token", s.mean_time_per_output_token)
    yield _latency("end to end", s.e2e_latency)


def _own(s: Summary) -> Iterator[str]:
    """What kvhook cost, what it lost, and what failed in it."""
    yield _row("kvhook", _cost(s))
    if s.vllm_stats_ns_p50 is not None:
        stats = f"vLLM's stats, made for it: p50 {s.vllm_stats_ns_p50 / 1e3:.1f} us; {percent(s.vllm_stats_share, 3)}"
        yield _row("", stats)
    yield _row("lost", _lost(s))
    for where, error in s.faults.items():
        yield _row("fault", f"{where}: {error}")


def _diagnosis(s: Summary) -> Iterator[str]:
    for i, line in enumerate(finding_lines(s.findings, _WIDTH + 2)):
        yield _row("" if i else "diagnosis", line)


def rows_of(name: str, texts: Iterable[str]) -> Iterator[str]:
    """Rows that hold these texts with commas between them, each row as many as fit."""
    line = ""
    for text in texts:
        if line and len(line) + len(text) > _LONGEST:
            yield _row(name, f"{line},")
            name, line = "", text
        else:
            line = f"{line}, {text}" if line else text
    yield _row(name, line)


def _event(total: EventTotal) -> str:
    times = "once" if total.calls == 1 else f"{total.calls:,} times"
    bad = [f"{n:,} {what}" for what, n in (("refused", total.refused), ("failed", total.failed)) if n]
    more = ", ".join([seconds(total.seconds), *bad] if total.seconds >= 0.0005 else bad)
    return f"{KINDS.get(total.kind, total.kind)} {times}{f' ({more})' if more else ''}"


def _left_out(left: LeftOut) -> str:
    names = ", ".join(map(repr, left.scopes[:3])) + (", ..." if len(left.scopes) > 3 else "")
    scopes = f"scope{'s' * (len(left.scopes) != 1)} {names}"
    return f"warm-up: {left.steps:,} step{'s' * (left.steps != 1)} in {scopes}; summary(warmup=True) counts them"


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


def _queue(s: Summary) -> Iterator[str]:
    """Requests: in the batch, waiting, preempted, finished; and those that were there before, or still are."""
    if s.num_running_reqs_peak is not None:
        each = " of one engine" if len(s.engine_lives) > 1 else ""
        if s.num_running_reqs_peak or not s.pooling:
            yield _row("running", f"mean {s.num_running_reqs_mean:.1f}, peak {s.num_running_reqs_peak:,}{each}")
        if s.num_waiting_reqs_peak or not s.pooling:
            yield _row("waiting", f"mean {s.num_waiting_reqs_mean:.1f}, peak {s.num_waiting_reqs_peak or 0:,}{each}")
    if s.num_reqs_before:
        yield _row("", f"{_requests(s.num_reqs_before)} in the queue before")
    yield from (_row("limited by", text) for text in limits(s))
    yield _row("preemptions", count(s.num_preempted_reqs))
    if s.core is not None and s.core.num_preemptions:
        also = f"{s.core.num_preemptions:,} in the engine core, " * (s.core.num_preemptions != s.num_preempted_reqs)
        yield _row("", f"{also}{s.core.num_lost_tokens:,} computed tokens thrown away")
        yield _row("", again(s.core.preemptions))
    reasons = ", ".join(f"{name} {n:,}" for name, n in sorted(s.finished_by_reason.items()))
    if s.num_aborted_reqs and "abort" not in s.finished_by_reason:
        reasons = f"{s.num_aborted_reqs:,} of them aborted"
    finished = "not known" if s.num_finished_reqs is None else f"{s.num_finished_reqs:,} requests"
    yield _row("finished", f"{finished}{f' ({reasons})' if reasons else ''}")
    if s.num_reqs_at_end:
        yield _row("", f"{_requests(s.num_reqs_at_end)} still in the queue after the last step")


def limits(s: Summary) -> Iterator[str]:
    """What kept batches from growing, if something often did."""
    if s.core is None or not s.core.num_steps:
        return
    shares = {
        why: n / s.core.num_steps for why, n in s.core.limited_by.items() if why not in ("none_waiting", "unknown")
    }
    often = [f"{LIMITS[why]} {percent(share)}" for why, share in sorted(shares.items(), key=_rank) if share >= 0.01]
    if often:
        yield f"{', '.join(often)} of the steps"


def _rank(item: tuple[str, float]) -> float:
    return -item[1]


def _requests(number: int) -> str:
    return "1 request was" if number == 1 else f"{number:,} requests were"


def _unbalanced(account: Account) -> Iterator[str]:
    """An account with a difference that nothing explains."""
    of = f" of engine {account.engines[0]}" if account.engines != (0,) else ""
    more = "more" if account.difference > 0 else "less"
    yield _row("NOT BALANCED", f"{account.left_is}{of}: {account.left:,}; {account.right_is}: {account.right:,}")
    unit = account.unit.removesuffix("s") if abs(account.difference) == 1 else account.unit
    yield _row("", f"{abs(account.difference):,} {unit} {more}, which nothing in this run explains")


def _drafts(s: Summary) -> str:
    return (
        f"{count(s.num_draft_tokens)} tokens in {count(s.num_drafts)} drafts, {count(s.num_accepted_tokens)} accepted "
        f"({percent(s.draft_acceptance_rate)}), mean acceptance length {s.mean_acceptance_length or 0:.2f}"
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
