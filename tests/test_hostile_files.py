"""Whatever opens a file, or reads a condition or a variable, survives what somebody has forged. The long form: ``make
fuzz``. Damaged and forged traces and rings have files of their own, in `tests/ring`."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kvhook
from kvhook.analysis.conditions import read_condition
from kvhook.core.plan import VARIABLE, CorePlan, read_plan
from kvhook.errors import KvhookError
from kvhook.options import parse_size
from kvhook.recording.from_environment import completed, is_on
from kvhook.recording.own_files import rank_of
from kvhook.records.events import Scope, described
from kvhook.ring import frames
from kvhook.whatif.recorded import recorded_requests
from tests.conftest import ROOT
from tests.hostile import DATA


def test_forged_files_of_every_kind_given_to_every_verb():
    # a process of its own: it may take only so much memory
    command = [sys.executable, str(ROOT / "tests/hostile.py"), "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 went wrong" in done.stdout


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(frames.zstandard is None, reason="zstandard is not installed")
def test_a_zstd_frame_that_says_itself_how_long_it_is_takes_no_memory(tmp_path: Path):
    payload = frames.zstandard.ZstdCompressor().compress(bytes(1 << 28))
    path = tmp_path / "frame"
    path.write_bytes(payload)
    frame = frames.Frame(0, len(payload), 1, frames.ZSTD, zlib.crc32(payload))
    with open(path, "rb") as file, pytest.raises(KvhookError, match="is damaged"):
        frames.read_frame(file.fileno(), frame, 512, "x")


def test_a_frame_does_not_hold_a_thousand_times_its_bytes(tmp_path: Path):
    payload = zlib.compress(struct.pack("<64Q", *([0] * 64)))
    path = tmp_path / "frame"
    path.write_bytes(payload)
    frame = frames.Frame(0, len(payload), 1 << 16, frames.ZLIB, zlib.crc32(payload))
    with open(path, "rb") as file, pytest.raises(KvhookError, match="is damaged"):
        frames.read_frame(file.fileno(), frame, 1 << 16, "x")


def test_scopes_that_lie_in_each_other_without_end_have_short_paths():
    scopes = [Scope(n, "x" * 1000, parent=n - 1) for n in range(2000)]
    assert max(len(scope.path) for scope in described(scopes)) <= 4096


def test_a_parquet_file_of_more_rows_than_fit_into_it_is_refused(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = 1 << 21
    columns = {name: pa.array([1]).take(pa.array([0] * rows)) for name in ("engine", "step")}
    pq.write_table(pa.table(columns).replace_schema_metadata({"kvhook": '{"engines": []}'}), tmp_path / "run.parquet")
    assert 4 * (tmp_path / "run.parquet").stat().st_size < rows
    with pytest.raises(KvhookError, match="do not fit into it"):
        kvhook.open(tmp_path / "run.parquet")


def test_texts_of_an_arrow_file_that_begin_elsewhere_in_memory_are_refused(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    kvhook.open(DATA / "baseline.kvh").dump(tmp_path / "run.arrow")
    path = tmp_path / "run.requests.arrow"
    table = arrow.ipc.open_file(path).read_all().combine_chunks()
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)  # as it is, not compressed
    assert len(kvhook.open(tmp_path / "run.arrow").requests()) == len(table)
    texts = next(column for column in table.columns if arrow.types.is_string(column.type))
    begins = texts.chunk(0).buffers()[1].to_pybytes()[: 4 * (len(texts) + 1)]
    forged = begins[:4] + struct.pack("<i", 1 << 30) + begins[8:]
    data = path.read_bytes()
    assert data.count(begins) >= 1
    path.write_bytes(data.replace(begins, forged))
    with pytest.raises(KvhookError, match="cannot be read"):
        kvhook.open(tmp_path / "run.arrow").requests()


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("requests", "num_prompt_tokens", -5),
        ("requests", "num_prompt_tokens", 1 << 36),
        ("requests", "num_generation_tokens", (1 << 63) - 1),
        ("lookups", "request", -1),
        ("lookups", "request", 1 << 39),
        ("lookups", "request", 1 << 62),
    ],
)
def test_requests_that_no_engine_core_can_have_had_are_refused(
    table: str, column: str, value: int, monkeypatch: pytest.MonkeyPatch
):
    cores = kvhook.open(DATA / "baseline.kvh").cores()
    assert len(recorded_requests(cores)) > 0
    forged = getattr(cores, table)(0).copy()
    forged[column][0] = value
    monkeypatch.setattr(cores, table, lambda core=None: forged)
    with pytest.raises(KvhookError, match="this file is damaged"):
        recorded_requests(cores)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '"hash_ids"',
        "{",
        "[" * 5000,
        json.dumps({"input_length": -5, "hash_ids": []}),
        json.dumps({"input_length": 1 << 70, "hash_ids": [1]}),
        json.dumps({"input_length": 5, "hash_ids": [1 << 80]}),
        json.dumps({"input_length": 5, "hash_ids": "x"}),
        json.dumps({"input_length": 5, "hash_ids": [1], "timestamp": 1e300}),
        json.dumps({"input_length": 5, "hash_ids": [1], "timestamp": math.inf}),
        json.dumps({"input_length": 5, "hash_ids": [1], "output_length": {}}),
    ],
)
def test_a_line_that_is_no_request_is_refused(tmp_path: Path, line: str):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"input_length": 5, "output_length": 1, "hash_ids": [1]}) + "\n" + line + "\n")
    with pytest.raises(KvhookError, match="line 2"):
        kvhook.open(path)


# ---- texts ---------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("and", "or", "not", "(", ")", "<", "<=", "==", "+", "-", "*", "/", "1", "1e400", "80%", "5ms"),
        *("itl_p99", "B.itl_p99", ".", "__class__", "[", "]", "'", "\0"),
    ]
)


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=40).map(" ".join)))
@example("(" * 900)
@example("1/0 < 1")
@example("1e400 - 1e400 < 1")
def test_a_condition_is_read_or_refused(text: str):
    with contextlib.suppress(KvhookError):
        condition = read_condition(text)
        assert condition.holds(lambda side, name: 1.0) in (True, False)


@given(st.dictionaries(st.sampled_from(["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"]), st.text(max_size=12)))
@example({"RANK": "9" * 5000, "WORLD_SIZE": "9" * 5000})
def test_a_rank_in_the_environment_is_one_or_none(environment: dict[str, str]):
    rank = rank_of(environment)
    assert rank is None or 0 <= rank < 10**9


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*CorePlan.__dataclass_fields__, "more"])


@given(st.dictionaries(FIELDS, JSON, max_size=14))
def test_a_plan_in_the_environment_is_one_or_none(fields: dict[str, Any]):
    good: dict[str, Any] = dict.fromkeys(("level", "ring_dir", "stem", "session", "key"), "ab")
    good |= {"ring_slots": 64, "limit": None, "pid": 1}
    with pytest.MonkeyPatch.context() as patch:
        for text in (json.dumps(good | fields), "[" * 100_000, json.dumps(list(fields))):
            patch.setenv(VARIABLE, text)
            plan = read_plan()
            assert plan is None or len(bytes.fromhex(plan.key)) * 2 == len(plan.key)


@given(st.text(max_size=12))
@example("9" * 400 + "g")
def test_a_size_is_one_or_refused(text: str):
    with contextlib.suppress(KvhookError):
        assert parse_size(text) >= 0


@given(st.text(max_size=8), st.text(max_size=8))
def test_variables_of_recording_are_options_or_refused(level: str, core: str):
    environment = {"KVHOOK": "1", "KVHOOK_LEVEL": level, "KVHOOK_CORE": core, "KVHOOK_ANONYMOUS": level}
    assert is_on(environment)
    with contextlib.suppress(KvhookError):
        completed(kvhook_options(), environment).check()


def kvhook_options() -> Any:
    from kvhook.options import Options

    return Options()
