"""The account of engine cores, added up in one pass and bit by bit, against the tables that people get."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.analysis.core_report import CoreReport, report
from kvhook.core_schema import LIMITS, MISS_REASONS
from kvhook.records.core import CoreRecords
from kvhook.records.core_files import core_files, open_cores

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def build(core_model: str, driver: Any) -> Callable[[int], Any]:
    from tests.core.scheduler_here import Driver

    def make(seed: int) -> Any:
        blocks = random.Random(seed).choice((24, 30, 60))
        return Driver(core_model, blocks=blocks, max_num_seqs=8, max_num_batched_tokens=96, max_model_len=512)

    return make


def add_some(driver: Any, rng: random.Random, requests: int) -> None:
    stems = [[rng.randrange(2, 500) for _ in range(60)] for _ in range(3)]
    for _ in range(requests):
        tail = [rng.randrange(2, 500) for _ in range(rng.randrange(5, 100))]
        driver.add(rng.choice(stems) + tail if rng.random() < 0.6 else tail, max_tokens=rng.randrange(1, 60))


def by_tables(cores: CoreRecords) -> dict[str, Any]:
    """The same numbers, each straight from the tables of the whole run."""
    steps, lookups, requests = cores.steps(), cores.lookups(), cores.requests()
    size = cores.facts[0]["block_size"]
    seen = lookups[lookups["miss_reason"] != "not_looked_up"]
    evicted = lookups[lookups["miss_reason"] == "evicted"]
    took, before = [], 0
    for begin, end, tokens in zip(
        steps["t_schedule_ns"].tolist(), steps["t_end_ns"].tolist(), steps["num_scheduled_tokens"].tolist(), strict=True
    ):
        took.append(max(end - max(begin, before), 0) / 1e9 / max(tokens, 1))
        before = end
    again = int(steps["num_recomputed_tokens"].sum())
    seconds = sum(t * n for t, n in zip(took, steps["num_recomputed_tokens"].tolist(), strict=True))
    whole = (lookups["num_tokens"] - 1) // size * size - lookups["num_found_tokens"]
    return {
        "num_steps": len(steps),
        "num_requests": len(requests),
        "num_scheduled_tokens": int(steps["num_scheduled_tokens"].sum()),
        "num_prefill_tokens": int(steps["num_prefill_tokens"].sum()),
        "num_recomputed_tokens": again,
        "num_decode_tokens": int(steps["num_decode_tokens"].sum()),
        "num_spec_tokens": int(steps["num_spec_tokens"].sum()),
        "limited_by": {why: n for why in LIMITS if (n := int((steps["limited_by"] == why).sum()))},
        "num_lookups": len(seen),
        "num_lookup_tokens": int(seen["num_tokens"].sum()),
        "num_found_tokens": int(seen["num_found_tokens"].sum()),
        "num_resumed_lookup_tokens": int(seen["num_tokens"][seen["resumed"] == 1].sum()),
        "num_resumed_found_tokens": int(seen["num_found_tokens"][seen["resumed"] == 1].sum()),
        "misses": {
            why: (int(rows.sum()), int(np.maximum(whole[rows], 0).sum()))
            for why in MISS_REASONS[1:]
            if (rows := lookups["miss_reason"] == why).any()
        },
        "num_evicted_blocks": int(steps["num_kv_blocks_evicted"].sum()),
        "num_lookups_of_evicted": len(evicted),
        "evicted_steps_p50": float(np.median(evicted["evicted_steps"])),
        "evicted_seconds_p50": pytest.approx(float(np.median(evicted["evicted_ns"])) / 1e9),
        "num_preemptions": len(cores.preemptions()),
        "num_lost_tokens": int(cores.preemptions()["num_lost_tokens"].sum()),
        "preempted_seconds": int(requests["preempted_ns"].sum()) / 1e9,
        "preemptions": (again, again / int(steps["num_scheduled_tokens"].sum()), pytest.approx(seconds)),
        "num_kv_blocks_peak": int(steps["num_kv_blocks_peak"].max()),
        "num_kv_blocks_cached_mean": pytest.approx(float(steps["num_kv_blocks_cached"].mean())),
        "num_kv_blocks_empty_mean": pytest.approx(float(steps["num_kv_blocks_empty"].mean())),
        "waste": pytest.approx(1 - steps["num_kv_tokens"].sum() / (steps["num_kv_blocks_peak"].sum() * size)),
        "records_lost": cores.lost,
    }


def told(found: CoreReport | None, names: dict[str, Any]) -> dict[str, Any]:
    assert found is not None
    return {name: getattr(found, name) for name in names}


@pytest.mark.parametrize("seed", range(3))
def test_one_pass_gives_what_the_tables_give(build: Callable[[int], Any], tmp_path: Path, seed: int):
    rng = random.Random(seed)
    with kvhook.install(trace=tmp_path / "run.kvh", core="steps"):
        driver = build(seed)
        add_some(driver, rng, 25)
        list(driver.run())
    cores = open_cores(core_files(tmp_path / "run.kvh"), "run")
    expected = by_tables(cores)
    assert min(expected["num_preemptions"], expected["num_lookups_of_evicted"]) > 0, "the load is too light"
    assert told(report(cores, ledger=False), expected) == expected


def test_a_session_that_is_asked_again_and_again_says_what_one_pass_says(build: Callable[[int], Any], tmp_path: Path):
    rng = random.Random(7)
    session = kvhook.install(trace=tmp_path / "run.kvh", core="steps")
    driver = build(7)
    for _ in range(5):
        add_some(driver, rng, 12)
        list(driver.run())
        expected = by_tables(session.cores())
        found = session.summary().core
        assert told(found, expected) == expected
        # asking changed nothing
        assert same(found, session.summary().core)
    session.close()
    once = report(open_cores(core_files(tmp_path / "run.kvh"), "run"), ledger=False)
    assert same(once, session.summary().core)


def test_what_was_taken_in_is_not_read_again(build: Callable[[int], Any], tmp_path: Path, monkeypatch: Any):
    from kvhook.records.sources import FileSlots

    session = kvhook.install(trace=tmp_path / "run.kvh", core="steps")
    driver = build(1)
    add_some(driver, random.Random(1), 25)
    list(driver.run())
    before = session.summary().core
    read: list[int] = []
    chunks = FileSlots.chunks

    def counted(self: FileSlots, *args: Any, **kwargs: Any) -> Any:
        for slots in chunks(self, *args, **kwargs):
            read.append(len(slots))
            yield slots

    monkeypatch.setattr(FileSlots, "chunks", counted)
    assert same(session.summary().core, before)
    assert sum(read) == 0


def same(a: CoreReport | None, b: CoreReport | None) -> bool:
    """Equal, where NaN equals NaN."""
    if a is None or b is None:
        return a is b
    one, other = dataclasses.asdict(a), dataclasses.asdict(b)
    return all(x == y or (x != x and y != y) for x, y in zip(flat(one), flat(other), strict=True))


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in flat(one)]
    return [math.nan if value is None else value]
