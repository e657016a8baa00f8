"""``kvhook check`` of an engine: an LLM whose numbers are computed by hand, made to lie, or not to be had."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import check, cli
from kvhook.analysis.lookups import Missed
from kvhook.check import FAILED, OK, SKIPPED, inference, run, structure
from kvhook.check.inference import Inference
from kvhook.collector import VLLMMetricsCollector, names, sources
from kvhook.collector.reading import Histogram, Reading, Unavailable
from kvhook.errors import KvhookError
from tests.played_llm import BLOCK_SIZE, PlayedLLM
from tests.standin import fake_vllm

# On an LLM whose numbers are computed by hand

INFERENCE = (
    *("recorded", "basic_collection", "hit_rate_progression", "usage_progression", "methods_agree"),
    *("histograms_agree", "accounts_balance", "cost"),
)


class Played(PlayedLLM):
    """With an engine's own objects and a registry that know the truth, unless they are made to lie."""

    def __init__(self, vllm: Any, patch: pytest.MonkeyPatch) -> None:
        super().__init__(vllm)
        self.of_source: dict[str, Callable[[], Reading]] = {}
        for source in (sources.EngineSource, sources.RegistrySource):
            self.of_source[source.name] = lambda name=source.name: self.read(name)  # type: ignore[misc]
            patch.setattr(source, "read", lambda asked: self.of_source[asked.name]())

    def read(self, source: str, **wrong: float) -> Reading:
        count = len(self.ttft)
        buckets = {"0.5": count, "0.75": count, "+Inf": count}
        ttft = Histogram(count, sum(self.ttft), buckets)
        return Reading(source, self.truth | wrong, {}, {"time_to_first_token_seconds": ttft}, {}, True, "")


@pytest.fixture
def llm(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    with fake_vllm() as vllm:
        session = kvhook.install()
        one = Played(vllm, monkeypatch)
        (engine,) = session.meta["engines"]
        one.of, one.reserved = engine["kv_usage_of"], engine["kv_usage_reserved"]
        yield one


def outcomes(llm: Any) -> dict[str, check.Result]:
    found = {r.name: r for r in run(Inference(llm, kvhook.install()).checks())}
    assert tuple(found) == INFERENCE
    return found


def failures(llm: Any) -> dict[str, str]:
    return {name: r.found for name, r in outcomes(llm).items() if r.outcome == FAILED}


def test_an_llm_that_tells_the_truth_passes(llm: Played):
    found = outcomes(llm)
    assert {r.outcome for r in found.values()} == {OK}, found
    assert "24 of" in found["usage_progression"].found
    assert " = ".join(names.SOURCES) in found["methods_agree"].found


def test_a_hit_too_many_is_found(llm: Played):
    def lie(told: dict[str, Any]) -> None:
        if told["prefix"]["hits"]:
            told["prefix"]["hits"] += BLOCK_SIZE

    llm.lie = lie
    found = failures(llm)
    assert set(found) == {"hit_rate_progression", "methods_agree", "accounts_balance"}
    # in the first round two of three find a block of the first; the next round goes on with one block more; the last
    # is the one before it, again
    expected, seen = [64, 32 + 2 * 64, 64 + 2 * 96, 3 * 96], [96, 192, 288, 320]
    assert f"tokens hit, round by round: expected {expected}, saw {seen}" in found["hit_rate_progression"]


def test_a_hit_rate_that_is_wrongly_computed_is_found(llm: Played, monkeypatch: pytest.MonkeyPatch):
    from kvhook.analysis import history

    monkeypatch.setattr(history, "_rate", lambda hits, queries: 1.0)
    found = failures(llm)
    assert set(found) == {"hit_rate_progression"}
    assert "hit rates: expected [0." in found["hit_rate_progression"]
    assert "saw [1.0, 1.0, 1.0, 1.0]" in found["hit_rate_progression"]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda held: held + 1 if held else 0, "blocks in use at the peak: expected 24, saw 25"),
        (lambda held: max(held, 1), "usage at the end"),
        (lambda held: min(held, 16), "blocks in use at the peak: expected 24, saw 16"),
        (lambda held: 24 if held else 0, "usage on the way to its peak: expected a rise"),
    ],
    ids=["too much", "not back to zero", "the peak is missed", "no rise"],
)
def test_a_wrong_usage_is_found(llm: Played, wrong: Callable[[int], int], text: str):
    def lie(told: dict[str, Any]) -> None:
        held = round(told["kv_cache_usage"] * llm.of) - llm.reserved
        told["kv_cache_usage"] = llm.truth["kv_cache_usage"] = (wrong(held) + llm.reserved) / llm.of

    llm.lie = lie
    assert text in failures(llm)["usage_progression"]


def test_a_token_that_was_not_counted_is_found(llm: Played):
    def lie(told: dict[str, Any]) -> None:
        told["generated"] -= 1

    llm.lie = lie
    found = failures(llm)
    assert set(found) == {"basic_collection", "methods_agree", "accounts_balance"}
    assert "tokens that they generated: expected 64, saw 48" in found["basic_collection"]
    assert "generated tokens (tokens generated in steps, against generated tokens of req" in found["accounts_balance"]


@pytest.mark.parametrize("source", [names.INTERNAL, names.REGISTRY])
def test_a_source_that_counts_otherwise_is_found(llm: Played, source: str):
    llm.of_source[source] = lambda: llm.read(source, num_prompt_tokens=1)
    found = failures(llm)
    assert set(found) == {"methods_agree"}
    assert found["methods_agree"].startswith("num_prompt_tokens: expected")
    assert f"'{source}': 1" in found["methods_agree"]


@pytest.mark.parametrize("lie", [0, 1])
def test_what_vllms_own_counters_missed_is_said_and_no_fault(llm: Played, monkeypatch: pytest.MonkeyPatch, lie: int):
    missed = {"prefix_cache_queries": 40, "prefix_cache_hits": 32}
    summary = kvhook.Session.summary

    def with_missed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(summary(self, *args, **kwargs), missed_by_vllm=Missed(2, *missed.values()))

    def read(source: str) -> Reading:
        told = {name: llm.truth[name] - number - lie for name, number in missed.items()}
        told["prefix_cache_hit_rate"] = told["prefix_cache_hits"] / told["prefix_cache_queries"]
        return llm.read(source, **told)

    monkeypatch.setattr(kvhook.Session, "summary", with_missed)
    for source in (names.INTERNAL, names.REGISTRY):
        llm.of_source[source] = lambda source=source: read(source)  # type: ignore[misc]
    agree = outcomes(llm)["methods_agree"]
    assert agree.outcome == (FAILED if lie else OK), agree
    assert lie or "counters missed 40 tokens looked up, 32 found: rely on hook for the prefix cache" in agree.found


@pytest.mark.parametrize("source", [names.INTERNAL, names.REGISTRY])
@pytest.mark.parametrize("error", [Unavailable("it is gone"), OSError("it is gone")], ids=["absent", "raises"])
def test_a_source_that_cannot_be_read_is_found(llm: Played, source: str, error: Exception):
    def broken() -> Reading:
        raise error

    llm.of_source[source] = broken
    found = failures(llm)
    assert set(found) == {"methods_agree", "histograms_agree"}
    assert f"the source {source}: expected numbers, saw " in found["methods_agree"]
    assert "it is gone. To do: " in found["methods_agree"]


def test_a_histogram_that_counts_otherwise_is_found(llm: Played):
    def shifted() -> Reading:
        found = llm.read(names.REGISTRY)
        one = found.histograms["time_to_first_token_seconds"]
        found.histograms["time_to_first_token_seconds"] = Histogram(
            one.count, one.sum, {**one.buckets, "0.5": one.count - 1}
        )
        return found

    llm.of_source[names.REGISTRY] = shifted
    found = failures(llm)
    assert set(found) == {"histograms_agree"}
    assert "time_to_first_token_seconds: buckets from prometheus_registry" in found["histograms_agree"]


def test_an_engine_that_is_not_recorded_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    with fake_vllm() as vllm:
        llm = Played(vllm, monkeypatch)
        found = failures(llm)
    assert "kvhook's recording: expected this engine in it" in found["recorded"]
    assert "kvhook doctor" in found["recorded"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"is_hybrid": True}, "state layers"),
        ({"get_sliding_window": lambda: 4096}, "sliding window"),
        ({"hf_text_config": types.SimpleNamespace(layer_types=["full_attention", "sliding_attention"])}, "layers of"),
    ],
)
def test_where_blocks_cannot_be_predicted_it_is_skipped_and_said(llm: Played, model: dict[str, Any], why: str):
    vars(llm.llm_engine.vllm_config.model_config).update(model)
    found = outcomes(llm)
    skipped = {name: r.found for name, r in found.items() if r.outcome == SKIPPED}
    assert set(skipped) == {"hit_rate_progression", "usage_progression"}
    assert all(why in text for text in skipped.values())
    assert not [r for r in found.values() if r.outcome == FAILED]


def test_v0_which_counts_no_tokens_is_skipped(llm: Played, monkeypatch: pytest.MonkeyPatch):
    get = VLLMMetricsCollector.get_comprehensive_stats

    def as_in_v0(self: VLLMMetricsCollector) -> dict[str, Any]:
        stats = get(self)
        stats["latest_stats"]["metrics_found"][names.V0_RATE] = 0.5
        stats["absent"]["prefix_cache_queries"] = "V0 counts blocks"
        return stats

    monkeypatch.setattr(VLLMMetricsCollector, "get_comprehensive_stats", as_in_v0)
    skipped = {name: r.found for name, r in outcomes(llm).items() if r.outcome == SKIPPED}
    assert skipped == {"hit_rate_progression": "V0 counts blocks"}


def test_a_model_for_short_requests_only_is_skipped(llm: Played):
    llm.llm_engine.vllm_config.model_config.max_model_len = 50
    skipped = {name: r.found for name, r in outcomes(llm).items() if r.outcome == SKIPPED}
    assert set(skipped) == {"hit_rate_progression", "usage_progression"}
    assert "50 at most" in skipped["usage_progression"]


def test_every_check_has_a_title_of_its_own():
    checks = [*structure.CHECKS, *(vars(Inference)[name] for name in INFERENCE)]
    titles = [(one.__doc__ or "").split("\n")[0] for one in checks]
    assert all(title.endswith(".") for title in titles)
    assert len(set(titles)) == len(titles)


# The engine that could not be had


def test_a_model_that_does_not_load_is_a_failed_check_and_vllms_messages_are_kept(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuses(model: str, **_: Any) -> Any:
        os.write(2, b"vLLM's own words\n")
        os.write(1, b"and its log's\n")
        raise ValueError(f"no such model: {model}\nand much more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    with fake_vllm():
        sys.modules["vllm"].LLM = refuses  # type: ignore[attr-defined]
        assert cli.main(["check", "--model", "my/model"]) == 1
    *_, line, verdict, last = capsys.readouterr().out.splitlines()
    assert line.startswith("FAILED  The engine starts")
    assert "vLLM with my/model: expected an engine, saw ValueError: no such model: my/model. To do: read" in line
    assert verdict.startswith("FAILED: 1 of")
    (log,) = Path(tempfile.gettempdir()).glob("kvhook-check-*/vllm.log")
    assert last == f"vLLM's messages are in {log}"
    assert log.read_text() == "vLLM's own words\nand its log's\n"
    assert kvhook.recording.installation.current_session() is None, "nothing is left installed"
    assert "VLLM_LOGGING_LEVEL" not in os.environ


def test_a_kvhook_that_cannot_record_here_is_a_failed_check(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses() -> Any:
        raise KvhookError("no place for a ring")

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(kvhook, "install", refuses)
    (result,) = inference.check_engine(None, fresh / "log")
    assert (result.outcome, result.advice) == (FAILED, "no place for a ring")
