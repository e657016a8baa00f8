"""The engine cores of several files: each is found with the front end that it belongs to, and is there once."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.errors import KvhookError
from kvhook.options import Options
from kvhook.recording.core_side import CoreSide
from kvhook.records.claims import claimed_by
from kvhook.records.replicas import counted
from kvhook.records.whose import belongs, may_be_beside
from tests.recorded_by_processes import BLOCKS, core, front

pytestmark = pytest.mark.usefixtures("fresh")


def peaks(trace: Any) -> dict[int, list[int]]:
    """Engine -> its peaks."""
    steps = trace.steps(columns=["engine", "num_kv_blocks_peak"])
    return {int(e): steps["num_kv_blocks_peak"][steps["engine"] == e].tolist() for e in set(steps["engine"].tolist())}


def summary(trace: kvhook.Trace, engine: int | None = None) -> Any:
    return trace.summary(engine)


def why_no_peaks(trace: Any) -> str:
    with pytest.raises(KvhookError) as raised:
        trace.steps(columns=["num_kv_blocks_peak"])
    return str(raised.value)


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Two ranks of one job, each with a core in a process of its own; all were given the name ``run.kvh``. The second
    began first."""
    for rank, (used, most, begun) in enumerate([([3, 4, 5], [6, 7, 8], 500), ([1, 2], [9, 10], 100)]):
        session = front(tmp_path / f"run-rank{rank}.kvh", used, pid=11 + rank)
        core(tmp_path / "run.kvh", used, most, pid=21 + rank, parent=11 + rank, session=session, begun=begun)
    return tmp_path


def test_each_rank_has_its_own_core_and_both_have_both(ranks: Path):
    for rank, most in enumerate([[6, 7, 8], [9, 10]]):
        alone = kvhook.open(ranks / f"run-rank{rank}.kvh")
        assert [facts["pid"] for facts in alone.cores().facts] == [21 + rank]
        assert alone.steps()["num_kv_blocks_peak"].tolist() == most
        assert summary(alone).core.num_steps == len(most)
    for both in (kvhook.open(ranks), kvhook.open(str(ranks / "run*.kvh"))):
        assert [facts["pid"] for facts in both.cores().facts] == [21, 22]
        assert peaks(both) == {0: [6, 7, 8], 1: [9, 10]}


def test_summaries_of_one_rank_and_of_all(ranks: Path):
    both = kvhook.open(ranks)
    of_all, *of_each = (summary(both, engine) for engine in (None, 0, 1))
    assert (of_all.core.num_cores, of_all.core.num_steps, of_all.core.num_scheduled_tokens) == (2, 5, 50)
    assert [(s.core.num_cores, s.core.num_steps, s.core.num_kv_blocks_peak) for s in of_each] == [(1, 3, 8), (1, 2, 10)]
    assert [s.kv_cache_usage_peak_in_step for s in of_each] == [8 / BLOCKS, 10 / BLOCKS]
    for engine, told in enumerate(of_each):
        part = both.select(engine=engine)
        assert [facts["pid"] for facts in part.cores().facts] == [21 + engine]
        assert summary(part).core.num_steps == told.core.num_steps
        assert [facts["pid"] for facts in part[0:1].cores().facts] == [21 + engine]


def test_a_trace_is_pickled_with_the_places_of_all_its_cores(ranks: Path):
    again = pickle.loads(pickle.dumps(kvhook.open(ranks)))
    assert [facts["pid"] for facts in again.cores().facts] == [21, 22]
    assert peaks(again) == {0: [6, 7, 8], 1: [9, 10]}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_what_is_exported_has_all_cores_and_says_whose_they_are(ranks: Path, tmp_path: Path, suffix: str):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out{suffix}"
    kvhook.open(ranks).dump(out)
    again = kvhook.open(out)
    assert [facts["pid"] for facts in again.cores().facts] == [21, 22]
    assert peaks(again) == {0: [6, 7, 8], 1: [9, 10]}
    assert summary(again, 1).core.num_steps == 2
    more = kvhook.open(out, ranks / "run-rank0.kvh")
    assert sorted(facts["pid"] for facts in more.cores().facts) == [21, 21, 22]
    assert peaks(more) == {0: [6, 7, 8], 1: [9, 10], 2: [6, 7, 8]}


def test_a_file_that_is_opened_twice_has_its_core_once(ranks: Path):
    twice = kvhook.open(ranks / "run-rank0.kvh", ranks / "rings" / ".." / "run-rank0.kvh")
    assert len(twice.cores()) == 1
    assert summary(twice).core.num_steps == 3


def test_folders_of_folders_are_put_side_by_side(tmp_path: Path):
    """Cores of two machines, or of two containers, may have the same numbers, and clocks of their own."""
    for place, used, most, begun in (("a", [3, 4], [6, 7], 10**15), ("b", [1, 2], [9, 10], 10)):
        (tmp_path / place).mkdir()
        session = front(tmp_path / place / "run.kvh", used, pid=7)
        core(tmp_path / place / "run.kvh", used, most, pid=8, parent=7, session=session, begun=begun)
    for order in (("a", "b"), ("b", "a")):
        both = kvhook.open(*(tmp_path / place / "run.kvh" for place in order))
        expected = {n: {"a": [6, 7], "b": [9, 10]}[place] for n, place in enumerate(order)}
        assert peaks(both) == expected
        nested = kvhook.open(*(tmp_path / place for place in order))
        assert peaks(nested) == expected
        assert summary(nested).core.num_steps == 4


def test_several_api_servers_share_one_core_which_is_counted_once(tmp_path: Path):
    names = ["run.kvh", "run-pid12.kvh"]
    for name, pid in zip(names, (11, 12), strict=True):
        front(tmp_path / name, [3, 4], pid=pid, parent=10)
    core(tmp_path / "run.kvh", [3, 4, 3, 4], [6, 7, 8, 9], pid=13, parent=10, session="main", num_front_ends=2)
    for opened in (kvhook.open(tmp_path), kvhook.open(*(tmp_path / name for name in names))):
        assert [facts["pid"] for facts in opened.cores().facts] == [13]
        assert summary(opened).core.num_scheduled_tokens == 40
        assert "several front ends" in why_no_peaks(opened)
        # whose part of the shared core's work it was is not known
        assert summary(opened, 0).core is None
        assert len(opened.select(engine=1).cores()) == 0
        assert "several front ends" in opened.select(engine=1).cores().why_none
    for name in names:
        alone = kvhook.open(tmp_path / name)
        assert len(alone.cores()) == 1
        assert "several front ends" in why_no_peaks(alone)


def test_in_a_folder_each_process_has_a_name_of_its_own_and_api_servers_find_their_core(tmp_path: Path):
    for pid in (11, 12):
        front(tmp_path / f"api_server-{pid}.kvh", [3, 4], pid=pid, parent=10)
    core(tmp_path / "api_server-10.kvh", [3] * 4, [6] * 4, pid=13, parent=10, session="main", num_front_ends=2)
    assert [facts["pid"] for facts in kvhook.open(tmp_path).cores().facts] == [13]


def test_processes_that_were_given_one_name_do_not_get_each_other_s_cores(tmp_path: Path):
    for name, pid, used, most in (("run.kvh", 11, [3], [6]), ("run-pid12.kvh", 12, [1, 2], [9, 10])):
        session = front(tmp_path / name, used, pid=pid)
        core(tmp_path / "run.kvh", used, most, pid=pid + 10, parent=pid, session=session)
    first, second = (kvhook.open(tmp_path / name) for name in ("run.kvh", "run-pid12.kvh"))
    assert first.steps()["num_kv_blocks_peak"].tolist() == [6]
    assert (summary(first).core.num_steps, summary(second).core.num_steps) == (1, 2)
    assert peaks(kvhook.open(tmp_path / "run.kvh", tmp_path / "run-pid12.kvh")) == {0: [6], 1: [9, 10]}


def test_a_core_of_another_recording_is_not_taken_although_processes_have_the_same_numbers(tmp_path: Path):
    """In containers the same numbers come again and again."""
    front(tmp_path / "run.kvh", [3], pid=7)
    core(tmp_path / "run.kvh", [3], [6], pid=8, parent=7, session="another")
    trace = kvhook.open(tmp_path / "run.kvh")
    assert len(trace.cores()) == 0
    assert "those of other processes" in trace.cores().why_none
    assert summary(trace).core is None


def test_a_name_that_ends_in_a_number_does_not_get_the_cores_of_the_name_without_it(tmp_path: Path):
    session = front(tmp_path / "exp.kvh", [3], pid=7)
    core(tmp_path / "exp.kvh", [3], [6], pid=8, parent=7, session=session)
    front(tmp_path / "exp-2.kvh", [3], pid=7)
    assert len(kvhook.open(tmp_path / "exp.kvh").cores()) == 1
    assert len(kvhook.open(tmp_path / "exp-2.kvh").cores()) == 0
    assert peaks(kvhook.open(tmp_path)) == {0: [-1], 1: [6]}


def test_an_engine_of_a_forked_child_has_the_core_that_is_in_the_child(tmp_path: Path):
    session = front(tmp_path / "run.kvh", [3], pid=11)
    front(tmp_path / "run-pid12.kvh", [1], pid=12, parent=11)
    core(tmp_path / "run.kvh", [3], [6], pid=11, parent=11, session=session, own_process=False)
    core(tmp_path / "run.kvh", [1], [9], pid=12, parent=11, session=session, own_process=False)
    assert peaks(kvhook.open(tmp_path / "run.kvh")) == {0: [6]}
    assert peaks(kvhook.open(tmp_path / "run-pid12.kvh")) == {0: [9]}
    assert peaks(kvhook.open(tmp_path / "run.kvh", tmp_path / "run-pid12.kvh")) == {0: [6], 1: [9]}


def test_a_session_does_not_count_what_a_forked_child_s_core_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    side = CoreSide(Options(trace=tmp_path / "run.kvh"), tmp_path / "rings")
    monkeypatch.setattr(CoreSide, "session", "s")
    side.arm()
    try:
        for pid, used in ((os.getpid(), [3, 4]), (12, [1])):
            about: dict[str, Any] = {"parent": os.getpid(), "session": "s", "own_process": False}
            core(tmp_path / "run.kvh", used, used, pid=pid, **about)
        assert [facts["pid"] for facts in side.records("run").facts] == [os.getpid()]
        account: Any = side.account()
        assert (account.num_cores, account.num_steps) == (1, 2)
    finally:
        side.disarm()


def test_what_cannot_be_joined_leaves_the_others_as_they_are(tmp_path: Path):
    for name, used, told in (("a", [3, 4], [3, 4]), ("b", [1, 2], [2, 1])):
        session = front(tmp_path / f"{name}.kvh", used, pid=7)
        core(tmp_path / f"{name}.kvh", told, [9, 10], pid=8, parent=7, session=session)
    assert peaks(kvhook.open(tmp_path)) == {0: [9, 10], 1: [-1, -1]}
    assert "do not agree" in why_no_peaks(kvhook.open(tmp_path / "b.kvh"))


def test_two_engines_of_one_process_whose_cores_cannot_be_told_apart_have_no_account_of_their_own(tmp_path: Path):
    session = front(tmp_path / "run.kvh", [3, 4], pid=7)
    for pid, told in ((8, [3, 4]), (9, [3, 4])):
        core(tmp_path / "run.kvh", told, [6, 7], pid=pid, parent=7, session=session)
    trace = kvhook.open(tmp_path / "run.kvh")
    assert "2 engine cores and 1 front ends" in why_no_peaks(trace)
    assert summary(trace).core.num_cores == 2


@pytest.fixture
def launched(tmp_path: Path) -> Path:
    """Four ranks that torchrun started: two engines, each over two ranks that do the same."""
    for rank in range(4):
        used = [3, 4] if rank < 2 else [1]
        about: dict[str, Any] = {
            "rank": rank,
            "executor": "external_launcher",
            "tensor_parallel_size": 2,
            "data_parallel_size": 2,
        }
        session = front(tmp_path / f"run-rank{rank}.kvh", used, pid=10 + rank, **about)
        most = [blocks + 1 for blocks in used]
        own = {"own_process": False}
        core(tmp_path / "run.kvh", used, most, pid=10 + rank, parent=10 + rank, session=session, **own)
    return tmp_path


def test_ranks_that_did_the_same_work_are_counted_once(
    launched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    every = kvhook.open(launched)
    assert len(every.steps()) == 2 * 2 + 2 * 1  # each rank can be looked at
    assert len(every.cores()) == 4
    whole = summary(every)
    assert (whole.steps, whole.num_generation_tokens, whole.engines, whole.replicas) == (3, 3, 2, 2)
    assert (whole.core.num_cores, whole.core.num_steps) == (2, 3)
    assert "2 ranks did the same work" in str(whole)
    assert [summary(every, engine).num_generation_tokens for engine in range(4)] == [2, 2, 1, 1]
    assert [summary(every, engine).core.num_steps for engine in range(4)] == [2, 2, 1, 1]
    # one rank alone, and one of each engine, are not replicas of anything
    assert summary(kvhook.open(launched / "run-rank1.kvh")).num_generation_tokens == 2
    two = kvhook.open(launched / "run-rank1.kvh", launched / "run-rank2.kvh")
    assert (summary(two).num_generation_tokens, summary(two).replicas) == (3, 0)
    assert main(["cache", str(launched), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 3
    assert main(["report", str(launched), "-o", str(tmp_path / "page.html")]) == 0
    every.dump(tmp_path / "all.csv")
    assert summary(kvhook.open(tmp_path / "all.csv")).num_generation_tokens == 3


@pytest.mark.parametrize("odd", ["../../x", -1, None, [], {"a": 1}, 1.5, "external_launcher"])
def test_facts_may_be_anything(tmp_path: Path, odd: Any):
    """A file may be edited or forged."""
    names = (
        "rank",
        "executor",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "session",
        "trace",
        "pid",
        "parent_pid",
    )
    told = {"engine": 0, "rank": 1, "executor": "external_launcher", "tensor_parallel_size": 2, "pid": 5}
    for name in names:
        facts = [told | {name: odd}, told | {"engine": 1}]
        assert counted(facts) in ([0], [0, 1])
        assert may_be_beside(tmp_path / "run-5.kvh", facts) == []
        for change in ({}, {"own_process": odd}, {"num_front_ends": odd}, {"parent": odd}, {"pid": odd}):
            assert belongs({"pid": 5, "parent": 5, "session": "s"} | change, facts[0], named=True) in (True, False)
    assert claimed_by({"of_engines": odd}) in (None, frozenset())


def test_the_same_ranks_of_another_job_are_not_replicas(tmp_path: Path):
    for name, job in (("a-rank0", 0), ("a-rank1", 0), ("b-rank0", 1), ("b-rank1", 1)):
        about: dict[str, Any] = {"rank": int(name[-1]), "executor": "external_launcher", "tensor_parallel_size": 2}
        front(tmp_path / f"{name}.kvh", [3] * (2 + job), pid=10 + job, **about)
    assert (summary(kvhook.open(tmp_path)).steps, summary(kvhook.open(tmp_path)).replicas) == (5, 2)


def test_ranks_without_a_launcher_are_engines_of_their_own(ranks: Path):
    assert (summary(kvhook.open(ranks)).steps, summary(kvhook.open(ranks)).replicas) == (5, 0)


def test_commands_take_a_pattern_and_count_each_core_once(
    ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pattern = str(ranks / "run*.kvh")
    assert main(["cache", pattern, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_cores"], found["num_steps"], found["num_scheduled_tokens"]) == (2, 5, 50)
    assert main(["cache", pattern]) == 0
    assert "5 steps of 2 engine cores" in capsys.readouterr().out
    assert main(["cache", str(ranks / "run-rank1.kvh"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 2
    for verb in (["summary"], ["report", "-o", str(tmp_path / "r.html")], ["autopsy"]):
        assert main([*verb, pattern if verb != ["autopsy"] else str(ranks / "run-rank0.kvh")]) == 0
    capsys.readouterr()
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_cores_with_different_blocks_have_no_size_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, size in (("a", 16), ("b", 32)):
        session = front(tmp_path / f"{name}.kvh", [3], pid=7)
        facts = {"block_size": size, "num_kv_blocks": 10 * size}
        core(tmp_path / f"{name}.kvh", [3], [6], pid=8, parent=7, session=session, **facts)
    account = summary(kvhook.open(tmp_path)).core
    assert (account.block_size, account.num_kv_blocks, account.waste, account.evictions) == (0, 0, None, None)
    assert main(["cache", str(tmp_path)]) == 0
    assert "peak 6 in the core that used most" in capsys.readouterr().out
    assert [summary(kvhook.open(tmp_path), engine).core.block_size for engine in (0, 1)] == [16, 32]
