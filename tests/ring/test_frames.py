"""Compressed traces: what goes in comes out, a file that was cut off opens up to its last whole frame, and one that was
damaged says so."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

import kvhook
from kvhook.cli import main
from kvhook.errors import ExportError, KvhookError, TraceFormatError
from kvhook.ring import frames
from kvhook.ring.trace_file import header_of
from tests.ring.synthetic import Recording

DATA = Path(__file__).parents[1] / "data"
SLOT = 512


@pytest.fixture(params=["zlib", "zstd"], autouse=True)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with what everybody has, once with what has to be installed."""
    if request.param == "zlib":
        monkeypatch.setattr(frames, "zstandard", None)
    else:
        pytest.importorskip("zstandard")
    return str(request.param)


def through_a_file(slots: np.ndarray, path: Path) -> np.ndarray:
    path.write_bytes(frames.pack_frame(slots))
    with path.open("rb") as file:
        (frame,) = frames.frames_of(file.fileno(), 0, path.stat().st_size, "it")
        return frames.read_frame(file.fileno(), frame, slots.shape[1], "it")


@pytest.mark.parametrize("seed", range(12))
def test_any_slots_come_out_as_they_went_in(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    count, width = int(rng.integers(1, 300)), int(rng.integers(1, 9)) * 8
    words = np.zeros((count, width), "<i8")
    for i in range(width):
        match rng.integers(7):
            case 0:
                words[:, i] = rng.integers(-(2**63), 2**63 - 1, count)
            case 1:
                words[:, i] = np.cumsum(rng.integers(0, 300, count))
            case 2:
                words[:, i] = rng.normal(size=count).view("<i8")
            case 3:
                words[:, i] = -1
            case 4 if i:
                words[:, i] = words[:, i - 1] + rng.integers(0, 2, count)
            case 5:
                words[:, i] = np.where(rng.random(count) < 0.1, rng.integers(0, 9, count), 0)
    words[:, 3] = rng.integers(1, 5, count) | rng.integers(0, 3, count) << 32
    slots = words.view(np.uint8)
    assert (through_a_file(slots, tmp_path / "frame") == slots).all()


@pytest.mark.parametrize("path", sorted(DATA.glob("*.kvh")), ids=lambda path: path.stem)
def test_a_compressed_run_is_the_same_run(path: Path, tmp_path: Path, method: str):
    trace = kvhook.open(path)
    (small,) = trace.dump(tmp_path / "small.kvh", compress=True)
    again = kvhook.open(small)
    assert again.steps().tobytes() == trace.steps().tobytes()
    assert again.requests().tobytes() == trace.requests().tobytes()
    assert again.summary().as_dict() == trace.summary().as_dict()
    assert {k: v for k, v in again.meta.items() if k != "name"} == {k: v for k, v in trace.meta.items() if k != "name"}
    assert small.stat().st_size < path.stat().st_size / 2
    (back,) = again.dump(tmp_path / "back.kvh")
    assert kvhook.open(back).steps().tobytes() == trace.steps().tobytes()
    assert header_of(back).compressed is False


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 steps in frames of 8 slots."""
    monkeypatch.setattr(frames, "SLOTS", 8)
    trace = kvhook.open(Recording(tmp_path / "rings").run(24).path)
    (path,) = trace.dump(tmp_path / "small.kvh", compress=True)
    return path


def test_wherever_it_is_cut_off_it_opens_up_to_the_last_whole_frame(small: Path, tmp_path: Path):
    data = small.read_bytes()
    header = header_of(small)
    with small.open("rb") as file:
        whole = frames.frames_of(file.fileno(), header.header_bytes, len(data), "it")
    every = kvhook.open(small).steps()
    assert len(every) == 24
    cut = tmp_path / "cut.kvh"
    seen = set()
    for end in range(header.header_bytes, len(data) + 1):
        cut.write_bytes(data[:end])
        steps = kvhook.open(cut).steps()
        there = sum(frame.slots for frame in whole if frame.at + frame.nbytes <= end)
        first = len(pack_of_facts(small))
        assert len(steps) == max(0, there - first)
        assert steps.tobytes() == every[: len(steps)].tobytes() or not len(steps)
        seen.add(len(steps))
    assert len(seen) > 2


def pack_of_facts(path: Path) -> list[int]:
    """The slots of a file that hold facts."""
    trace = kvhook.open(path)
    return [0] * (sum(len(slots) for slots in trace.sources[0].chunks()) - trace.meta["records"])


def test_any_byte_that_is_wrong_is_noticed(small: Path, tmp_path: Path):
    data = small.read_bytes()
    first = header_of(small).header_bytes
    wrong = tmp_path / "wrong.kvh"
    right = kvhook.open(small).steps().tobytes()
    with small.open("rb") as file:
        whole = frames.frames_of(file.fileno(), first, len(data), "it")
    meaningless = {byte for frame in whole for byte in range(frame.at - 4, frame.at)}
    for at in range(first, len(data)):
        wrong.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        if at in meaningless:
            assert kvhook.open(wrong).steps().tobytes() == right
        else:
            with pytest.raises(TraceFormatError, match=r"wrong\.kvh.*damaged"):
                kvhook.open(wrong).steps()


def test_a_file_that_claims_too_much_takes_no_memory(tmp_path: Path, small: Path):
    data = bytearray(small.read_bytes())
    at = header_of(small).header_bytes
    head = bytearray(data[at : at + 32])
    head[8:12] = (1 << 31).to_bytes(4, "little")
    head[24:28] = zlib.crc32(head[:24]).to_bytes(4, "little")
    data[at : at + 32] = head
    small.write_bytes(data)
    with pytest.raises(TraceFormatError, match="damaged"):
        kvhook.open(small).summary()


def test_only_kvh_files_are_compressed(small: Path, tmp_path: Path):
    with pytest.raises(ExportError, match=r"only \.kvh"):
        kvhook.open(small).dump(tmp_path / "run.csv", compress=True)


def test_every_command_that_reads_a_trace_reads_a_compressed_one(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for arguments in (["summary", str(small)], ["autopsy", str(small)], ["recover", str(small)]):
        assert main(arguments) == 0, arguments
    assert main(["export", str(small), str(tmp_path / "run.csv")]) == 0
    assert main(["export", str(small), str(tmp_path / "again.kvh"), "--compress"]) == 0
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 25
    assert kvhook.open(tmp_path / "again.kvh").steps().tobytes() == kvhook.open(small).steps().tobytes()
    assert "it is complete" in capsys.readouterr().out


def test_without_zstd_a_file_that_needs_it_says_what_to_install(
    small: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    if method == "zlib":
        return
    monkeypatch.setattr(frames, "zstandard", None)
    with pytest.raises(KvhookError, match=r"pip install .kvhook\[fast\]"):
        kvhook.open(small).steps()
