"""Parquet and Arrow: every value is there, null where it is not known, and an independent program that reads them,
DuckDB, finds the numbers of the summary."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.cli import main
from kvhook.errors import ExportError
from kvhook.export import arrow
from tests.ring.synthetic import Recording

duckdb = pytest.importorskip("duckdb")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DATA = Path(__file__).parent / "data"
TRACES = [DATA / f"{name}.kvh" for name in ("engine-0.32.0-full", "engine-0.32.0-light", "scripted-sparse")]
every_trace = pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
both_formats = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


def read(path: Path) -> Any:
    return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()


def random_run(folder: Path, seed: int, *, engines: int = 2, steps: int = 400) -> Path:
    """Engines that count at random, steps without stats among them."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    paths = []
    for engine in range(engines):
        recording = Recording(folder / f"rings{engine}", slots=4096)
        for _ in range(steps):
            if rng.random() < 0.1:
                recording.finish(rng.randrange(1000), **some_request(rng))
            recording.step(rng.random(), took_ms=rng.lognormvariate(2, 1), **some_counts(rng))
            if rng.random() < 0.05:
                recording.step(math.nan, has_scheduler_stats=0, num_running_reqs=-1, num_waiting_reqs=-1)
        paths.append(recording.path)
    trace = kvhook.open(*paths)
    out = folder / "random.kvh"
    trace.dump(out)
    return out


def some_counts(rng: random.Random) -> dict[str, Any]:
    queries = rng.choice([0, 0, rng.randrange(1, 5000)])
    first = sorted(rng.choices([0.01, 0.02, 0.5, 1.25], k=rng.choice([0, 1, 2])))
    return {
        "prefix_cache_queries": queries,
        "prefix_cache_hits": rng.randrange(queries + 1),
        "num_prompt_tokens": queries,
        "num_generation_tokens": rng.randrange(64),
        "num_running_reqs": rng.randrange(64),
        "num_waiting_reqs": rng.randrange(9),
        "num_preempted_reqs": rng.choice([0, 0, 0, 1]),
        "ttft_count": len(first),
        "ttft_sum": sum(first),
        "ttft_min": min(first, default=0.0),
        "ttft_max": max(first, default=0.0),
    }


def some_request(rng: random.Random) -> dict[str, Any]:
    generated = rng.randrange(1, 50)
    return {
        "finish_reason": rng.randrange(3),
        "num_prompt_tokens": rng.randrange(1, 999),
        "num_generation_tokens": generated,
        "e2e_latency": rng.expovariate(1),
        "time_to_first_token": rng.choice([math.nan, rng.random()]),
    }


@pytest.fixture(scope="module", params=[1, 2])
def random_trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("random"), request.param)


def same(cell: Any, value: Any) -> bool:
    """Null is how a table says that a value is not known."""
    if cell is None:
        return bool(value != value or value in (-1, 0))
    return bool(cell == value)


@both_formats
@every_trace
def test_every_value_is_in_the_tables_and_null_only_where_nothing_is_known(path: Path, suffix: str, tmp_path: Path):
    trace = kvhook.open(path)
    files = trace.dump(tmp_path / f"run{suffix}")
    assert [p.name for p in files] == [f"run{suffix}", f"run.requests{suffix}", f"run.latencies{suffix}"]
    for file, table in zip(files, (trace.steps(), trace.requests()), strict=False):
        got = read(file)
        assert tuple(got.column_names) == table.dtype.names
        assert got.num_rows == len(table)
        for name in table.dtype.names:
            cells = got[name].to_pylist()
            assert all(map(same, cells, table[name].tolist())), name
            assert not (set(cells) & {-1} and name.startswith(("num_", "kv_cache"))), name


@both_formats
@every_trace
def test_the_single_latencies_are_those_of_the_trace(path: Path, suffix: str, tmp_path: Path):
    trace = kvhook.open(path)
    rows = read(trace.dump(tmp_path / f"run{suffix}")[2]).to_pylist()
    steps = {(int(s["engine"]), int(s["step"])): s for s in trace.steps()}
    for series in ("time_to_first_token", "inter_token_latency"):
        values, counts = trace.latencies(series)
        mine = [r for r in rows if r["series"] == series]
        got = sorted(v for r in mine for v in [r["value"]] * r["count"])
        assert got == sorted(np.repeat(values, counts).tolist())
        assert all((r["engine"], r["step"]) in steps for r in mine)


@both_formats
def test_the_schema_holds_the_facts_of_the_run_and_what_columns_mean(suffix: str, tmp_path: Path):
    trace = kvhook.open(TRACES[0])
    for file, name in zip(trace.dump(tmp_path / f"run{suffix}"), ("steps", "requests", "latencies"), strict=True):
        schema = read(file).schema
        assert json.loads(schema.metadata[b"kvhook"]) == json.loads(json.dumps(trace.meta))
        assert schema.metadata[b"kvhook.table"] == name.encode()
    schema = read(tmp_path / f"run{suffix}").schema
    assert schema.field("kv_cache_usage").metadata[b"unit"] == b"0-1"
    assert schema.field("prefix_cache_hits").metadata[b"meaning"] == b"prompt tokens that were found"


def test_rows_keep_their_order_over_several_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_trace: Path):
    monkeypatch.setattr(arrow, "GROUP", 100)
    trace = kvhook.open(random_trace)
    file, *_ = trace.dump(tmp_path / "run.parquet")
    assert pq.ParquetFile(file).num_row_groups > 1
    for name in ("engine", "step", "t_start_ns"):
        assert read(file)[name].to_pylist() == trace.steps()[name].tolist()


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ExportError, match=r"run.parquet needs pyarrow.*pip install \"kvhook\[arrow\]\""):
        kvhook.open(TRACES[0]).dump(tmp_path / "run.parquet")
    assert list(tmp_path.iterdir()) == []


# An independent computation


QUANTILES = (0.5, 0.9, 0.99)


def ask(sql: str) -> list[Any]:
    return list(duckdb.execute(sql).fetchone())


def agree(ours: Any, theirs: Any) -> bool:
    if ours is None or theirs is None:
        return bool(ours is None and (theirs is None or theirs == 0))
    return bool(math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12))


def quoted(path: Path | str) -> str:
    """A path in SQL."""
    return "'" + str(path).replace("'", "''") + "'"


def compare(trace: Path, folder: Path) -> None:
    """Sums, rates and percentiles of a trace's summary, and those that DuckDB finds in the exported tables."""
    run = kvhook.open(trace)
    s = run.summary()
    steps, requests, latencies = (quoted(p) for p in run.dump(folder / "run.parquet"))
    columns = {c for (c, *_) in duckdb.execute(f"describe select * from {steps}").fetchall()}
    sums = [name for name in SUMS if name in columns and getattr(s, name) is not None]
    for name, total in zip(sums, ask(f"select {', '.join(f'sum({n})' for n in sums)} from {steps}"), strict=True):
        assert agree(getattr(s, name), total), name
    (rate,) = ask(f"select sum(prefix_cache_hits) / nullif(sum(prefix_cache_queries), 0) from {steps}")
    assert agree(s.prefix_cache_hit_rate, rate)
    usage = ask(
        f"select avg(kv_cache_usage), quantile_cont(kv_cache_usage, 0.95), max(kv_cache_usage), "
        f"avg(num_running_reqs), max(num_waiting_reqs) from {steps} where has_scheduler_stats = 1"
    )
    ours = (s.kv_cache_usage_mean, s.kv_cache_usage_p95, s.kv_cache_usage_peak)
    assert all(map(agree, (*ours, s.num_running_reqs_mean, s.num_waiting_reqs_peak), usage))
    took = "(t_end_ns - t_start_ns) / 1e9"
    distribution(s.step_time, f"select {took} as v, 1 as n from {steps} where t_end_ns != t_start_ns")
    of_series = f"select value as v, count as n from {latencies} where series"
    distribution(s.time_to_first_token, f"{of_series} = 'time_to_first_token'")
    distribution(s.inter_token_latency, f"{of_series} = 'inter_token_latency'")
    if len(run.requests()):  # at level light there are no records of them
        distribution(s.e2e_latency, f"select e2e_latency as v, 1 as n from {requests} where e2e_latency is not null")


SUMS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_preempted_reqs",
)


def distribution(ours: Any, values: str) -> None:
    quantiles = ", ".join(f"quantile_cont(v, {q})" for q in QUANTILES)
    repeated = f"select v from ({values}), unnest(range(n))"
    count, mean, *rest = ask(f"select count(*), avg(v), {quantiles}, max(v) from ({repeated})")
    assert ours.count == count
    if count:
        assert all(map(agree, (ours.mean, ours.p50, ours.p90, ours.p99, ours.max), (mean, *rest)))


@every_trace
def test_duckdb_finds_the_summarys_numbers_in_real_traces(path: Path, tmp_path: Path):
    compare(path, tmp_path)


def test_duckdb_finds_the_summarys_numbers_in_random_traces(random_trace: Path, tmp_path: Path):
    compare(random_trace, tmp_path)


def test_that_comparison_would_see_a_wrong_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = kvhook.Trace.summary

    def off_by_one(self: kvhook.Trace) -> Any:
        summary = good(self)
        object.__setattr__(summary, "prefix_cache_hits", (summary.prefix_cache_hits or 0) + 1)
        return summary

    monkeypatch.setattr(kvhook.Trace, "summary", off_by_one)
    with pytest.raises(AssertionError, match="prefix_cache_hits"):
        compare(TRACES[0], tmp_path)


# A folder of many runs


@pytest.fixture
def fleet(tmp_path: Path, random_trace: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "fleet"
    assert main(["export", str(TRACES[0]), f"{folder}/"]) == 0
    assert main(["export", str(random_trace), f"{folder}", "--run", "b=a %/№ 2"]) == 0
    assert "run=engine-0.32.0-full/engine=0/steps.parquet" in capsys.readouterr().out
    return folder


def test_one_query_reads_every_run_of_a_folder(fleet: Path, random_trace: Path):
    found = duckdb.execute(
        f"""
        select run, engine, count(*), sum(prefix_cache_hits), max(kv_cache_usage)
        from read_parquet({quoted(f"{fleet}/*/*/steps.parquet")}, hive_partitioning = true, union_by_name = true)
        group by run, engine order by run, engine
        """
    ).fetchall()
    expected = []
    for run, path in (("b=a %/№ 2", random_trace), ("engine-0.32.0-full", TRACES[0])):
        trace = kvhook.open(path)
        for engine in (e["engine"] for e in trace.meta["engines"]):
            steps = trace.steps(engine)
            expected.append(
                (
                    run,
                    engine,
                    len(steps),
                    int(steps["prefix_cache_hits"].sum()),
                    float(np.nanmax(steps["kv_cache_usage"])),
                )
            )
    assert found == expected


def test_files_of_a_folder_say_of_which_run_and_engine_they_are(fleet: Path):
    schema = pq.read_schema(fleet / "run=engine-0.32.0-full" / "engine=0" / "requests.parquet")
    assert schema.metadata[b"kvhook.run"] == b"engine-0.32.0-full"
    assert schema.metadata[b"kvhook.engine"] == b"0"
    assert "engine" not in schema.names  # a reader makes it of the folder's name


def test_a_run_of_a_folder_is_not_overwritten(fleet: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(TRACES[1]), f"{fleet}/", "--run", "engine-0.32.0-full"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(TRACES[1]), f"{fleet}/", "--run", "engine-0.32.0-full", "--force"]) == 0


def test_a_run_of_a_folder_needs_a_name(fleet: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(TRACES[1]), f"{fleet}/", "--run", ""]) == 1
    assert "needs a name" in capsys.readouterr().err
