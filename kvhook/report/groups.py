"""Hit rates of groups of requests as HTML: by label, by LoRA adapter, and by prompt where it has several samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from kvhook.analysis.prompt_groups import PromptGroup
from kvhook.analysis.summary import GroupRate, Summary
from kvhook.report.runs import Run
from kvhook.report.tables import absent, table, wide
from kvhook.text.numbers import count, percent

#: Labels, and adapters, that are listed of each run.
_MOST = 50
_TOKENS = ("prompt tokens", "of them cached", "hit rate", "tokens generated")


def section(runs: Sequence[Run]) -> str:
    """What stands in the section: of each run the groups that it has."""
    out = ""
    for run in runs:
        head = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        found = "".join(_groups(run.summary))
        out += head + found if found else absent(run, _why_none(run.summary))
    return out


def _why_none(s: Summary) -> str:
    if not s.steps_by_level.get("full"):
        return "recorded at level light, without single requests"
    return "no request that has ended had a label, a LoRA adapter, or another sample of its prompt (n > 1)"


def _groups(s: Summary) -> Iterator[str]:
    for title, what, rates, none in (
        ("By label", "label", s.by_label, "without a label"),
        ("By LoRA adapter", "adapter", s.by_lora_name, "no adapter"),
    ):
        if rates:
            yield _heading(title, len(rates), _MOST)
            yield wide(table((what, "requests", *_TOKENS), [_rate(rate, none) for rate in rates[:_MOST]]))
    if s.by_prompt is not None:
        most = s.by_prompt.most
        yield _heading("By prompt, where it has several samples (n > 1)", s.by_prompt.prompts, len(most))
        yield "".join(f"<p class=explain>{escape(text)}</p>" for text in _siblings(s))
        several = len({group.engine for group in most}) > 1
        heads = ("prompt", *(["engine"] if several else []), "samples", *_TOKENS)
        yield wide(table(heads, [_prompt(group, several) for group in most]))


def _heading(title: str, number: int, most: int) -> str:
    some = f": the {most} of {number:,} with the most prompt tokens" if number > most else ""
    return f"<h4>{escape(title + some)}</h4>"


def _rate(rate: GroupRate, none: str) -> Sequence[str]:
    return rate.name or none, f"{rate.requests:,}", *_tokens(rate)


def _prompt(group: PromptGroup, engine: bool) -> Sequence[str]:
    which = [str(group.engine)] if engine else []
    return f"{group.prompt_number:,}", *which, f"{group.num_samples:,}", *_tokens(group)


def _tokens(group: GroupRate | PromptGroup) -> Sequence[str]:
    cached = "not known" if group.num_cached_tokens is None else f"{group.num_cached_tokens:,}"
    rate = "-" if group.hit_rate is None else percent(group.hit_rate)
    return f"{group.num_prompt_tokens:,}", cached, rate, f"{group.num_generation_tokens:,}"


def _siblings(s: Summary) -> Iterator[str]:
    """Hits of samples among each other, against hits across prompts."""
    if s.sibling_hits is None or not s.num_prompt_tokens:
        return
    siblings, others, of = s.sibling_hits.siblings, s.sibling_hits.others, s.num_prompt_tokens
    yield (
        f"Of all {of:,} prompt tokens {percent(siblings / of)} ({count(siblings)}) were found because a sample of the "
        f"same prompt had computed them, and {percent(others / of)} ({count(others)}) because another prompt or an "
        "earlier call had."
    )
