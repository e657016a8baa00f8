"""Numbers and files without a bound: they cost what the run's own length justifies, or are refused with the limit."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.cli.whatif import MOST, MOST_REPLICAS
from kvhook.errors import TraceFormatError
from kvhook.records import text_lines
from kvhook.ring.trace_file import header_of
from kvhook.whatif.fleet import fleet
from kvhook.whatif.replay import replay
from kvhook.whatif.report import what_if
from tests.conftest import ROOT
from tests.whatif.test_report import RULES, recorded

BASELINE = ROOT / "tests/report/data/baseline.kvh"


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """The most memory that was taken, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


# Sizes of caches


def test_a_cache_for_everything_is_played_as_a_larger_one_and_takes_no_more(memory: Callable[[], int]):
    requests, run = recorded(30)
    (size,) = what_if(requests, run, blocks=[MOST]).sizes
    assert (size.blocks, size.hit_tokens) == (MOST, replay(requests, 100_000, RULES).num_found_tokens)
    assert memory() < 64 << 20


@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.5])
def test_where_blocks_are_kept_free_as_well(watermark: float):
    requests, run = recorded(30)
    rules = replace(RULES, watermark=watermark)
    run = replace(run, rules=rules)
    played = replay(requests, 100_000, rules)
    (size,) = what_if(requests, run, blocks=[100_000]).sizes
    assert (size.hit_tokens, size.num_preemptions) == (played.num_found_tokens, played.num_preemptions)


@pytest.mark.parametrize("option", ["--blocks", "--block-size", "--max-num-seqs"])
def test_numbers_that_nobody_means_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    for number in ("9" * 23, "1" + "0" * 5000):
        with pytest.raises(SystemExit):
            main(["whatif", str(BASELINE), option, number])
        assert "an error in kvhook" not in capsys.readouterr().err


# Engines behind a router


def test_engines_that_get_no_request_cost_nothing_and_change_nothing(memory: Callable[[], int]):
    requests, _ = recorded(30)
    enough, many = (fleet(requests, 30, [count]) for count in (len(requests), 10**8))
    for one, other in zip(enough, many, strict=True):
        if one.routing != "prefix":  # which looks at the share of each
            assert one.hit_tokens == other.hit_tokens
        assert other.replicas == 10**8
    assert memory() < 64 << 20


def test_too_many_engines_are_refused_with_the_limit(capsys: pytest.CaptureFixture[str]):
    assert main(["whatif", str(BASELINE), "--replicas", str(MOST_REPLICAS)]) == 0
    for number in (MOST_REPLICAS + 1, 10**8, 10**22):
        with pytest.raises(SystemExit):
            main(["whatif", str(BASELINE), "--replicas", str(number)])
        said = capsys.readouterr().err
        assert f"{MOST_REPLICAS:,}" in said or f"{MOST:,}" in said


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_without_an_end_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Callable[[], int], suffix: str
):
    monkeypatch.setattr(text_lines, "LONGEST", 1 << 20)
    path = tmp_path / f"run{suffix}"
    path.touch()
    os.truncate(path, 1 << 30)
    with pytest.raises(TraceFormatError, match="longer than 1 MiB"):
        kvhook.open(path)
    assert memory() < 400 << 20


def test_nor_one_of_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(text_lines, "LONGEST", 1 << 20)
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"input_length": 3, "output_length": 1, "hash_ids": [1]}) + "\n")
    os.truncate(path, 1 << 30)
    assert main(["whatif", str(path)]) == 1
    assert "line 2, is longer than 1 MiB" in capsys.readouterr().err


def test_nor_facts_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Callable[[], int]):
    kvhook.open(BASELINE).dump(tmp_path / "run.csv")
    os.truncate(tmp_path / "run.meta.json", 1 << 32)
    with pytest.raises(TraceFormatError, match=r"run\.meta\.json is longer than"):
        kvhook.open(tmp_path / "run.csv")
    assert memory() < 200 << 20


def test_a_hole_in_a_trace_is_not_read_and_counts_as_damage(tmp_path: Path):
    """The rest is there: what stands before the hole, and what stands behind it."""
    path = tmp_path / "run.kvh"
    shutil.copy(BASELINE, path)
    header, steps, size = header_of(path), len(kvhook.open(path).steps()), path.stat().st_size
    slot, begin = header.layout.slot_bytes, header.header_bytes
    os.truncate(path, size + (slot << 34))
    trace = kvhook.open(path)
    assert len(trace.steps()) == steps
    assert (1 << 34) - 8192 // slot - 1 <= trace.meta["damaged"] <= 1 << 34
    with path.open("r+b") as file:
        slots = (size - begin) // slot
        last = os.pread(file.fileno(), slot, begin + (slots - 1) * slot)
        os.pwrite(file.fileno(), last, begin + (slots - 1 + (1 << 33)) * slot)
    found = sum(len(slots) for source in kvhook.open(path).sources for slots in source.chunks())
    assert slots < found < slots + 100
    assert main(["summary", str(path)]) == 0


def test_damage_is_counted_slot_for_slot_beside_a_hole(tmp_path: Path):
    path = tmp_path / "run.kvh"
    shutil.copy(BASELINE, path)
    os.truncate(path, path.stat().st_size + 1000 * header_of(path).layout.slot_bytes)
    assert kvhook.open(path).meta["damaged"] == 1000
