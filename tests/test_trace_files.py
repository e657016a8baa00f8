"""Opening what was recorded: whole, cut off, damaged, foreign."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvhook
from kvhook.errors import TraceFormatError
from tests.standin import fake_vllm, step_stats


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 40 steps."""
    folder = tmp_path_factory.mktemp("trace")
    kvhook.uninstall()
    with fake_vllm() as vllm, kvhook.install(ring_dir=folder, trace=folder / "run.kvh"):
        engine = vllm.engine()
        engine.plan += [step_stats(generated=n) for n in range(40)]
        for _ in range(40):
            engine.step()
    return folder / "run.kvh"


def places_of_steps(data: bytes | bytearray) -> tuple[list[int], int]:
    """Where the slots with steps begin, and how long a slot is: by the documented offsets, not by kvhook."""
    header, slot = int.from_bytes(data[104:112], "little"), int.from_bytes(data[16:24], "little")
    return [at for at in range(header, len(data), slot) if int.from_bytes(data[at + 24 : at + 28], "little") == 1], slot


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.floats(0, 1))
def test_cut_off_anywhere_it_opens_up_to_the_last_whole_record(file: Path, share: float):
    data = file.read_bytes()
    places, slot = places_of_steps(data)
    assert len(places) == 40
    header = int.from_bytes(data[104:112], "little")
    cut = header + int(share * (len(data) - header))
    short = file.with_name("cut.kvh")
    short.write_bytes(data[:cut])
    tokens = kvhook.open(short).steps()["num_generation_tokens"].tolist()
    assert tokens == list(range(sum(at + slot <= cut for at in places)))


@pytest.mark.parametrize("length", [0, 7, 8, 255, 256, 4000])
def test_cut_off_in_the_header_it_is_refused(file: Path, tmp_path: Path, length: int):
    (tmp_path / "cut.kvh").write_bytes(file.read_bytes()[:length])
    with pytest.raises(TraceFormatError, match=r"cut\.kvh"):
        kvhook.open(tmp_path / "cut.kvh")


def test_a_damaged_record_is_left_out_and_counted(file: Path, tmp_path: Path):
    data = bytearray(file.read_bytes())
    data[places_of_steps(data)[0][30]] ^= 0xFF
    (tmp_path / "bad.kvh").write_bytes(data)
    trace = kvhook.open(tmp_path / "bad.kvh")
    assert trace.steps()["num_generation_tokens"].tolist() == [n for n in range(40) if n != 30]
    assert trace.meta["damaged"] == 1
    assert trace.summary().records_lost == 1


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(kvhook.KvhookError, match=r"cannot open .*none\.kvh: No such file"):
        kvhook.open(tmp_path / "none.kvh")


def test_an_empty_folder_holds_no_trace(tmp_path: Path):
    with pytest.raises(kvhook.KvhookError, match=r"holds no \.kvh file"):
        kvhook.open(tmp_path)


def test_another_file_is_no_trace(tmp_path: Path):
    (tmp_path / "a.kvh").write_text("step,kv_cache_usage\n" * 500)
    with pytest.raises(TraceFormatError, match="not a kvhook ring or trace"):
        kvhook.open(tmp_path / "a.kvh")


def test_an_open_trace_survives_the_removal_of_its_file(file: Path, tmp_path: Path):
    copy = tmp_path / "copy.kvh"
    copy.write_bytes(file.read_bytes())
    trace = kvhook.open(copy)
    copy.unlink()
    assert len(trace.steps()) == 40


def test_the_ring_of_a_running_session_opens_too(fresh: Path):
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        engine.plan += [step_stats(generated=n) for n in range(5)]
        for _ in range(5):
            engine.step()
        (ring,) = session.rings
        trace = kvhook.open(ring)
        there, here = trace.steps(), session.steps()
        for name in here.dtype.names or ():
            if name.endswith("_unix_ns"):  # a ring has one reading of the clocks, the session has several
                assert abs(there[name] - here[name]).max() < 10_000_000
            else:
                np.testing.assert_array_equal(there[name], here[name], err_msg=name)
        assert trace.meta["engines"][0]["model"] == "stand-in"
