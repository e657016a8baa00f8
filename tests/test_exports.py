"""Exports, read back with other people's readers and compared with the arrays."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.errors import ExportError
from kvhook.export import cells
from kvhook.facts import printable
from kvhook.records.rows import rows
from tests.ring.synthetic import Recording
from tests.standin import NO_STATS, fake_vllm, step_stats

NAMES = {
    ".csv": ["run.csv", "run.requests.csv", "run.latencies.csv", "run.meta.json"],
    ".jsonl": ["run.jsonl"],
    ".kvh": ["run.kvh"],
    ".parquet": ["run.parquet", "run.requests.parquet", "run.latencies.parquet"],
    ".arrow": ["run.arrow", "run.requests.arrow", "run.latencies.arrow"],
    ".perfetto.json.gz": ["run.perfetto.json.gz"],
}
every_format = pytest.mark.parametrize("suffix", NAMES)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvhook.Session]:
    """Two engines, steps with and without stats, requests, lists of latencies."""
    kvhook.uninstall()
    with fake_vllm() as vllm, kvhook.install(ring_dir=tmp_path_factory.mktemp("rings")) as session:
        for engine in (vllm.engine(), vllm.engine(log_stats=True)):
            for n in range(60):
                request = {
                    "finish_reason": n % 3,
                    "request_id": str(n) if n % 4 else "not a number",
                    "num_prompt_tokens": 10 * n,
                    "num_generation_tokens": n,
                    "e2e_latency": 0.1 * n,
                    "ttft": 0.01 * n if n % 6 else math.nan,
                }
                engine.plan.append(
                    step_stats(
                        num_running_reqs=n,
                        kv_cache_usage=n / 60,
                        generated=n,
                        itl=[0.1, 0.2, 0.3 + n],
                        finished=[request] if n % 2 else [],
                    )
                )
                engine.step()
                if not n % 10:
                    engine.plan.append(NO_STATS)
                    engine.step()
        yield session


def rows_of(table: np.ndarray) -> list[dict[str, Any]]:
    return [dict(zip(table.dtype.names or (), row, strict=True)) for row in table.tolist()]


def known(value: Any, gauge: bool) -> Any:
    """A cell as an export shows it: unknown is nothing, never a number that looks like one."""
    return None if value != value or (gauge and value == -1) else value


GAUGES = {"num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "num_kv_blocks", "num_kv_blocks_used"} | {
    "kvhook_ns",
    "kv_cache_usage",
}


def expected(table: np.ndarray) -> list[dict[str, Any]]:
    return [{name: known(v, name in GAUGES) for name, v in row.items()} for row in rows_of(table)]


def by_engine(rows: list[dict[str, Any]], number: str) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda r: (int(r["engine"]), int(r[number])))


def test_csv_holds_every_step_and_request(recorded: kvhook.Session, tmp_path: Path):
    written = recorded.dump(tmp_path / "run.csv")
    assert [p.name for p in written] == NAMES[".csv"]
    tables = recorded.steps(), recorded.requests()
    for path, table, number in zip(written[:2], tables, ("step", "request"), strict=True):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == table.dtype.names
        want = [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected(table)]
        assert by_engine(rows, number) == by_engine(want, number)


def test_jsonl_holds_every_step_and_request_and_the_facts(recorded: kvhook.Session, tmp_path: Path):
    (path,) = recorded.dump(tmp_path / "run.jsonl")
    # strictly JSON: no NaN
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "meta"
    assert lines[0]["engines"][0]["model"] == "stand-in"
    assert lines[0]["absent"] == recorded.meta["absent"]
    for kind, table, number in (("step", recorded.steps(), "step"), ("request", recorded.requests(), "request")):
        got = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind]
        assert by_engine(got, number) == by_engine(expected(table), number)
    assert {line["kind"] for line in lines} == {"meta", "step", "request", "latency"}
    values = {
        s: sorted(np.repeat(*recorded.latencies(s)).tolist()) for s in ("time_to_first_token", "inter_token_latency")
    }
    singles = [line for line in lines if line["kind"] == "latency"]
    for series, want in values.items():
        assert sorted(v for r in singles if r["series"] == series for v in [r["value"]] * r["count"]) == want


def test_kvh_opens_as_what_it_was(recorded: kvhook.Session, tmp_path: Path):
    (path,) = recorded.dump(tmp_path / "run.kvh")
    trace = kvhook.open(path)
    for mine, theirs in ((trace.steps(), recorded.steps()), (trace.requests(), recorded.requests())):
        assert mine.dtype == theirs.dtype
        assert mine.tobytes() == theirs.tobytes()
    for series in ("time_to_first_token", "inter_token_latency"):
        values, counts = trace.latencies(series)
        again, again_counts = recorded.latencies(series)
        assert sorted(np.repeat(values, counts)) == sorted(np.repeat(again, again_counts))
    assert trace.meta["engines"] == recorded.meta["engines"]
    assert trace.meta["absent"] == recorded.meta["absent"]
    assert trace.summary().as_dict() == recorded.summary().as_dict()


def test_kvh_of_a_kvh_is_the_same_again(recorded: kvhook.Session, tmp_path: Path):
    recorded.dump(tmp_path / "a.kvh")
    kvhook.open(tmp_path / "a.kvh").dump(tmp_path / "b.kvh")
    a, b = kvhook.open(tmp_path / "a.kvh"), kvhook.open(tmp_path / "b.kvh")
    assert a.steps().tobytes() == b.steps().tobytes()
    assert a.summary().as_dict() == b.summary().as_dict()


def plain_csv(trace: kvhook.Trace) -> list[bytes]:
    """Both tables by Python's own writer, a row at a time."""
    texts = {"step": io.StringIO(newline=""), "request": io.StringIO(newline="")}
    writers = {k: csv.DictWriter(t, trace.all_columns(k)) for k, t in texts.items()}
    for writer in writers.values():
        writer.writeheader()
    for kind, batch in rows(trace):
        writers[kind].writerows(batch)
    return [text.getvalue().encode() for text in texts.values()]


def plain_lines(trace: kvhook.Trace) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"step": [], "request": []}
    for kind, batch in rows(trace):
        found[kind] += [json.dumps({"kind": kind, **row}) for row in batch]
    return found


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data").glob("*.kvh")), ids=lambda path: path.stem)
def test_csv_and_jsonl_are_to_the_byte_what_pythons_own_writers_make(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cells, "orjson", None)
    monkeypatch.setattr(cells, "ROWS", 17)
    trace = kvhook.open(path)
    assert [p.read_bytes() for p in trace.dump(tmp_path / "run.csv")[:2]] == plain_csv(trace)
    (written,) = trace.dump(tmp_path / "run.jsonl")
    lines = written.read_text().splitlines()[1:]
    for kind, want in plain_lines(trace).items():
        assert [line for line in lines if line.startswith(f'{{"kind": "{kind}"')] == want


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data").glob("*.kvh")), ids=lambda path: path.stem)
def test_with_orjson_they_hold_the_same_values(path: Path, tmp_path: Path):
    pytest.importorskip("orjson")
    trace = kvhook.open(path)
    (written,) = trace.dump(tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()[1:]]
    for kind, want in plain_lines(trace).items():
        assert [line for line in lines if line["kind"] == kind] == [json.loads(line) for line in want]
    for written, plain in zip(trace.dump(tmp_path / "run.csv")[:2], plain_csv(trace), strict=True):
        got, expected = (list(csv.reader(io.StringIO(b.decode(), newline=""))) for b in (written.read_bytes(), plain))
        assert [[number(c) for c in row] for row in got] == [[number(c) for c in row] for row in expected]


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def test_what_is_no_number_in_json_is_written_as_python_writes_it(tmp_path: Path):
    recording = Recording(tmp_path / "rings")
    recording.step(itl_sum=math.inf)
    recording.step(itl_sum=-math.inf, ttft_sum=1e-300)
    trace = kvhook.open(recording.path)
    (written,) = trace.dump(tmp_path / "run.jsonl")
    infinite = [json.loads(line)["itl_sum"] for line in written.read_text().splitlines()[1:]]
    assert infinite == [math.inf, -math.inf]
    assert trace.dump(tmp_path / "run.csv")[0].read_bytes() == plain_csv(trace)[0]


# Bad days


@every_format
def test_a_file_that_is_there_is_not_overwritten(recorded: kvhook.Session, tmp_path: Path, suffix: str):
    # whichever of the files it is: the one in the way is named, and none is written
    for name in NAMES[suffix]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ExportError, match=rf"{name} exists.*overwrite=True"):
            recorded.dump(folder / f"run{suffix}")
        assert (folder / name).read_text() == "mine"
        assert [p.name for p in folder.iterdir()] == [name]


@every_format
def test_a_file_that_is_there_is_replaced_when_told_to(recorded: kvhook.Session, tmp_path: Path, suffix: str):
    for name in NAMES[suffix]:
        (tmp_path / name).write_text("old")
    written = recorded.dump(tmp_path / f"run{suffix}", overwrite=True)
    assert [p.name for p in written] == NAMES[suffix]
    assert all(p.stat().st_size > 1000 for p in written)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES[suffix])


@pytest.mark.parametrize("name", ["run.xlsx", "run", "run.txt", ".csv", "run.csv.bak"])
def test_unknown_suffix_lists_the_known_ones(recorded: kvhook.Session, tmp_path: Path, name: str):
    with pytest.raises(ExportError) as error:
        recorded.dump(tmp_path / name)
    assert all(suffix in str(error.value) for suffix in NAMES)
    assert list(tmp_path.iterdir()) == []


@every_format
def test_missing_directory_is_named(recorded: kvhook.Session, tmp_path: Path, suffix: str):
    with pytest.raises(ExportError, match=r"there is no directory .*nowhere; make it first"):
        recorded.dump(tmp_path / "nowhere" / f"run{suffix}")
    assert list(tmp_path.iterdir()) == []


@every_format
def test_a_failure_on_the_way_leaves_nothing_half_written(
    recorded: kvhook.Session, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    for name in NAMES[suffix]:
        (tmp_path / name).write_text("mine")
    trace = recorded.trace()
    chunks = list(trace.chunks())

    def fails_half_way() -> Iterator[Any]:
        yield chunks[0]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "chunks", fails_half_way)
    with pytest.raises(OSError, match="No space left"):
        trace.dump(tmp_path / f"run{suffix}", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES[suffix])
    assert {p.read_text() for p in tmp_path.iterdir()} == {"mine"}


@every_format
def test_ctrl_c_on_the_way_leaves_nothing_half_written(
    recorded: kvhook.Session, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    trace = recorded.trace()
    first = next(trace.chunks())

    def interrupted() -> Iterator[Any]:
        yield first
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace.dump(tmp_path / f"run{suffix}")
    assert list(tmp_path.iterdir()) == []


@every_format
def test_a_directory_in_the_way_is_left_alone(recorded: kvhook.Session, tmp_path: Path, suffix: str):
    (tmp_path / f"run{suffix}").mkdir()
    with pytest.raises((ExportError, OSError)):
        recorded.dump(tmp_path / f"run{suffix}", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [f"run{suffix}"]
    assert (tmp_path / f"run{suffix}").is_dir()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_run_without_steps_dumps_empty_tables(fresh: Path, suffix: str):
    with fake_vllm() as vllm, kvhook.install() as session:
        vllm.engine()
        written = session.dump(fresh / f"run{suffix}")
    assert all(len(p.read_text().splitlines()) == 1 for p in written)


def test_path_may_be_text(recorded: kvhook.Session, tmp_path: Path):
    (path,) = recorded.dump(os.fspath(tmp_path / "run.jsonl"))
    assert path.is_file()


AWKWARD = ('a,b"c', "two\r\nlines", "<b>bold</b>", "ä \N{SNOWMAN} = 1", "'; drop", "{x}\\n")


def test_labels_of_any_text_are_read_back_by_others_as_they_were(tmp_path: Path):
    recording = Recording(tmp_path / "rings")
    for number in range(len(AWKWARD)):
        recording.finish(number, label=number)
        recording.step()
    trace = kvhook.open(recording.path)
    for code, label in enumerate(AWKWARD):
        trace.engines.events.names["label"][code] = label
    files = trace.dump(tmp_path / "run.csv")
    with files[1].open(newline="", encoding="utf-8") as file:
        assert tuple(row["label"] for row in csv.DictReader(file)) == AWKWARD
    lines = [json.loads(line) for line in trace.dump(tmp_path / "run.jsonl")[0].read_text().splitlines()]
    assert tuple(line["label"] for line in lines if line["kind"] == "request") == AWKWARD
    for path in (tmp_path / "run.csv", tmp_path / "run.jsonl"):
        assert tuple(kvhook.open(path).requests()["label"].tolist()) == tuple(map(printable, AWKWARD))
