"""Whatever is done to a file: a clear error or what is intact of it. Never a traceback, a hang, or an allocation that
a number in the file drives."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvhook.analysis.autopsy import examine
from kvhook.cli import main
from kvhook.discovery.cleaning import leftovers
from kvhook.discovery.follow import follow
from kvhook.discovery.rings import find_rings
from kvhook.errors import KvhookError, TraceFormatError
from kvhook.ring.layout import SCHEMA_AT, seal
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import pack_meta
from kvhook.text.autopsy import as_text
from kvhook.text.steps import StepLines
from kvhook.trace import open_trace
from tests.ring.synthetic import LAYOUT, Recording

STEPS = 30
SLOT = LAYOUT.slot_bytes
RING_NAME = "4194999-77-0.ring"  # of a process that cannot be: its number is beyond Linux's largest

slow = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Files:
    """An intact trace, an intact ring of a dead process, and a place for damaged ones."""

    def __init__(self, folder: Path) -> None:
        recording = Recording(folder / "made", slots=64, pid=4194999)
        for n in range(STEPS):
            if n % 5 == 4:
                recording.finish(n, num_prompt_tokens=20, num_generation_tokens=5, finish_reason=1)
            values = {
                "itl_count": 2,
                "itl_min": 0.01,
                "itl_max": 0.02,
                "prefix_cache_queries": 10,
                "prefix_cache_hits": 4,
            }
            recording.step(n / STEPS, **values)
        recording.record("values", step=3, series=1, count=4)
        recording.die()
        recording.spool_to(folder / "run.kvh", 1000)
        self.trace = (folder / "run.kvh").read_bytes()
        self.ring = recording.path.read_bytes()
        self.folder = folder / "bad"
        self.folder.mkdir()
        self.header = struct.unpack_from("<Q", self.trace, 104)[0]

    def put(self, data: bytes, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("damage"))


def use(path: Path) -> int | None:
    """Everything that can be done with a file, in this process, so that an exception is seen as what it is.

    Gives the number of steps, or None where the file was refused.
    """
    trace = None
    with contextlib.suppress(KvhookError):
        trace = open_trace(path)
    if path.suffix == ".ring":
        for ring in find_rings([path.parent]):
            assert ring.path == path
        leftovers([path.parent], path.parent / "none")
        follow_to_the_end(path)
    if trace is None:
        return None
    steps = trace.steps()
    trace.requests()
    for series in ("time_to_first_token", "inter_token_latency"):
        trace.latencies(series)
    summary = trace.summary()
    assert str(summary)
    json.dumps(summary.as_dict())
    autopsy = examine(trace, "killed")
    header = trace.header
    assert header is not None
    assert as_text(autopsy, StepLines(header.monotonic_ns, header.realtime_ns))
    json.dumps(autopsy.as_dict())
    for suffix in (".jsonl", ".csv", ".kvh"):
        with contextlib.suppress(KvhookError):
            trace.dump(path.with_name(f"out{suffix}"), overwrite=True)
    for out in path.parent.glob("out*"):
        out.unlink()
    return len(steps)


def follow_to_the_end(path: Path) -> None:
    from kvhook.cli.tail import lines

    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 100:
            raise TimeoutError

    try:
        with RingReader(path) as reader:
            news = follow(reader, sleep=sleep, clock=lambda: now[0])
            for as_json in (False, True):
                for line in lines(news, reader.header, as_json=as_json, say=lambda text: None):
                    assert "\n" not in line
    except (KvhookError, TimeoutError):
        pass


def commands(path: Path) -> list[tuple[int, str]]:
    """Exit code and what is said on stderr, of every verb that takes a file."""
    said = []
    for argv in (["summary", path], ["autopsy", path], ["export", path, path.with_name("out.jsonl"), "--force"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            said.append((main([str(a) for a in argv]), err.getvalue()))
    path.with_name("out.jsonl").unlink(missing_ok=True)
    return said


# ---- one damage at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trace", "ring"])
def test_intact_files_are_read_whole(files: Files, kind: str):
    path = files.put(getattr(files, kind), "run.kvh" if kind == "trace" else RING_NAME)
    assert use(path) == STEPS
    assert [code for code, _ in commands(path)] == [0, 0, 0]
    path.unlink()


def cuts() -> list[int]:
    """Lengths of every class: nothing, within the magic, the words, the schema, on and beside each kind of boundary."""
    ends = [0, 1, 7, 8, 9, 111, 112, 120, 127, 128, 136, 255, 256, 257, 4095]
    return [*ends, *(4096 * page + d for page in (1, 2) for d in (-1, 0, 1))]


@pytest.mark.parametrize("length", cuts())
def test_cut_off_in_or_near_the_header(files: Files, length: int):
    path = files.put(files.trace[:length], "cut.kvh")
    assert use(path) == (None if length < files.header else 0)
    if length < files.header:
        assert all(code == 1 and "Traceback" not in err and err.count("\n") == 1 for code, err in commands(path))
    path.unlink()


@pytest.mark.parametrize("within", [0, 1, 7, 8, 15, 16, 17, 24, 31, 32, 33, SLOT // 2, SLOT - 1])
@pytest.mark.parametrize("slot", [0, 1, 12, -1])
def test_cut_off_in_a_slot_the_prefix_is_intact(files: Files, slot: int, within: int):
    count = (len(files.trace) - files.header) // SLOT
    at = files.header + (slot % count) * SLOT
    path = files.put(files.trace[: at + within], "cut.kvh")
    kinds = [struct.unpack_from("<i", files.trace, p + 24)[0] for p in range(files.header, at, SLOT)]
    assert use(path) == kinds.count(1)
    path.unlink()


def test_a_ring_that_was_cut_off_says_so(files: Files):
    path = files.put(files.ring[:-1], RING_NAME)
    with pytest.raises(
        TraceFormatError, match=f"is cut short: {len(files.ring) - 1} of at least {len(files.ring)} bytes"
    ):
        open_trace(path)
    assert use(path) is None
    path.unlink()


def forged(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Another schema, with every checksum right: what a forger would do, and what no checksum finds."""
    at, size = struct.unpack_from("<2Q", data, 56)
    header = struct.unpack_from("<Q", data, 104)[0]
    schema = json.loads(data[at : at + size])
    changed = change(schema)
    text = changed if isinstance(changed, bytes) else json.dumps(schema).encode()
    pages = -(-(SCHEMA_AT + len(text)) // 4096) * 4096
    head = bytearray(data[:SCHEMA_AT] + text.ljust(pages - SCHEMA_AT, b"\0"))
    struct.pack_into("<3Q", head, 56, SCHEMA_AT, len(text), zlib.crc32(text))
    struct.pack_into("<Q", head, 104, pages)
    return seal(head) + data[header:]


def column(kind: str, i: int, cell: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda s: s["columns"][kind][i].__setitem__(cell, value)


def set_to(**facts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda s: s.update(facts)


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "two columns of one name": lambda s: s["columns"]["step"][1].__setitem__(0, s["columns"]["step"][0][0]),
    "two columns in one place": lambda s: s["columns"]["step"][1].__setitem__(2, s["columns"]["step"][0][2]),
    "a column called engine": column("step", 0, 0, "engine"),
    "a column without a name": column("step", 0, 0, ""),
    "a name of control characters": column("step", 0, 0, "\x1b[2J"),
    "a name of a megabyte": column("step", 0, 0, "x" * 500_000),
    "a reason that is a float": lambda s: [c.__setitem__(1, "<f8") for c in s["columns"]["request"] if c[5]],
    "an enum that is a word": column("step", 0, 5, "yes"),
    "a unit that is a list": column("step", 0, 3, [1]),
    "a column of many cells": lambda s: s["columns"]["step"].__setitem__(0, list(range(100))),
    "offset as text": column("step", 0, 2, "32"),
    "offset true": column("step", 0, 2, True),
    "negative offset": column("step", 0, 2, -8),
    "no start of a step": lambda s: s["columns"].update(step=s["columns"]["step"][:1]),
    "no step columns": lambda s: s["columns"].update(step=[]),
    "no meta columns": lambda s: s["columns"].update(meta=[]),
    "values elsewhere": column("values", 1, 2, 200),
    "a kind that is a number": lambda s: s["columns"].update(step=7),
    "columns as a list": lambda s: s.update(columns=[]),
    "a schema that is a list": lambda s: b"[1, 2]",
    "a schema that is deep": lambda s: b"[" * 200_000,
    "a schema that is no JSON": lambda s: b"{" + b"\xff" * 100,
    "an empty schema": lambda s: b"",
    "a huge number": lambda s: b'{"columns": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("kind", ["trace", "ring"])
def test_a_forged_schema_is_refused(files: Files, how: str, kind: str):
    path = files.put(forged(getattr(files, kind), REFUSED[how]), "forged.kvh" if kind == "trace" else RING_NAME)
    assert use(path) is None
    path.unlink()


FACTS: dict[str, Any] = {
    "absent is text": {"absent": "nothing"},
    "absent of numbers": {"absent": {"step": {"kv_cache_usage": 5}, "request": 7}},
    "all is absent": {"absent": {k: {c.name: "gone" for c in LAYOUT.columns[k]} for k in ("step", "request")}},
    "engine is text": {"engine": "zero"},
    "engine is huge": {"engine": 10**300},
    "engine is negative": {"engine": -5},
    "blocks are text": {"num_kv_blocks": "many", "block_size": [16]},
    "blocks are huge": {"num_kv_blocks": 10**400},
    "cost is text": {"hook_call_ns": "0.5 us"},
    "cost is not a number": {"hook_call_ns": float("nan")},
    "model is a list": {"model": ["a"], "vllm": {"version": 1}, "kvhook": None, "program": 5},
    "model clears the screen": {"model": "\x1b[2J\x1b]0;gone\x07"},
    "caching is text": {"enable_prefix_caching": "on"},
    "namespace is text": {"pid_namespace": "host"},
    "deep": {"more": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]},
    "counts lie": {"records_published": 10**18, "records_overrun": -4, "records_unwritten": "all"},
}


@pytest.mark.parametrize("how", FACTS)
@pytest.mark.parametrize("kind", ["trace", "ring"])
def test_facts_of_the_wrong_type_count_as_unknown(
    files: Files, how: str, kind: str, capsys: pytest.CaptureFixture[str]
):
    if kind == "ring":
        path = files.put(forged(files.ring, set_to(**FACTS[how])), RING_NAME)
    else:
        path = files.put(files.trace + pack_meta(LAYOUT, 0, FACTS[how]).tobytes(), "facts.kvh")
    assert use(path) == STEPS
    trace = open_trace(path)
    assert [e["engine"] for e in trace.meta["engines"]] == [0]
    assert "\x1b" not in str(trace.summary())
    if kind == "ring":
        assert main(["ls", "--dir", str(path.parent)]) == 0
        assert main(["autopsy", str(path)]) == 0
        assert "\x1b" not in capsys.readouterr().out
    path.unlink()


@pytest.mark.parametrize("text", [b"[" * 60_000, b'{"a": ' + b"9" * 6000 + b"}", b"[1]", b"null", b"{", b"\xff\xfe"])
def test_facts_that_are_no_facts_are_passed_over(files: Files, text: bytes):
    room = LAYOUT.meta_bytes_per_slot
    parts = -(-len(text) // room)
    pack = LAYOUT.struct_of("meta", tail=f"{room}s").pack
    raw = b""
    for part in range(parts):
        piece = text[part * room : (part + 1) * room]
        body = pack(part, 4, 0, part, parts, len(piece), piece)
        raw += struct.pack("<2Q", 2 * part + 2, zlib.crc32(body)) + body
    path = files.put(files.trace + raw, "facts.kvh")
    assert use(path) == STEPS
    path.unlink()


def test_a_flipped_bit_in_the_facts_is_damage_and_not_another_fact(files: Files):
    at = files.trace.index(b"tiny-llama", files.header)
    data = bytearray(files.trace)
    data[at] ^= 0x02
    path = files.put(bytes(data), "facts.kvh")
    trace = open_trace(path)
    assert trace.meta["damaged"] == 1
    assert "viny-llama" not in str(trace.summary())
    assert len(trace.steps()) == STEPS
    path.unlink()


LIES = [(at, value) for at in (16, 24, 56, 64, 104, 128) for value in (0, 1, 1 << 20, 1 << 32, 1 << 40, (1 << 64) - 1)]


@pytest.mark.parametrize(("at", "value"), LIES)
@pytest.mark.parametrize("kind", ["trace", "ring"])
def test_no_number_in_the_header_drives_an_allocation(files: Files, kind: str, at: int, value: int):
    data = bytearray(getattr(files, kind))
    struct.pack_into("<Q", data, at, value)
    path = files.put(seal(data), "lie.kvh" if kind == "trace" else RING_NAME)
    tracemalloc.start()
    start = time.monotonic()
    try:
        use(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20, f"{peak / 2**20:.0f} MiB for a file of {len(data) / 2**10:.0f} KiB"
    assert time.monotonic() - start < 20
    path.unlink()


def test_a_dead_ring_is_read_without_its_head(files: Files):
    for head in (0, 3, 1 << 40, (1 << 64) - 1):
        data = bytearray(files.ring)
        struct.pack_into("<Q", data, 128, head)
        path = files.put(bytes(data), RING_NAME)
        assert use(path) == STEPS
        path.unlink()


@pytest.mark.parametrize("major", [0, 2, 99])
def test_a_ring_of_another_major_layout_is_refused_by_every_verb(
    files: Files, major: int, capsys: pytest.CaptureFixture[str]
):
    data = bytearray(files.ring)
    struct.pack_into("<Q", data, 8, major << 32)
    path = files.put(seal(data), RING_NAME)
    for argv in (["tail", str(path)], ["autopsy", str(path)], ["summary", str(path)]):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert f"was written by kvhook 0.1.0 in layout {major}; this one reads layout 1" in said
    assert main(["ls", "--dir", str(path.parent)]) == 0
    out = capsys.readouterr().out
    assert "damaged" in out
    assert f"in layout {major}" in out
    path.unlink()


@pytest.mark.parametrize("content", [b"", b"KVHOOK01", b"PAR1" * 5000, b"\0" * 9000])
def test_what_is_none_of_ours_is_refused(files: Files, content: bytes):
    for name in ("other.kvh", RING_NAME):
        path = files.put(content, name)
        assert use(path) is None
        assert all(code == 1 and err.count("\n") == 1 for code, err in commands(path))
        path.unlink()


# ---- any damage ----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([0, 1, 2, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x7FF0000000000000])


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, int]]:
    """Some damages: what is done, where (0 to 1), with which number."""
    kinds = st.sampled_from(["flip", "word", "cut", "double", "zero"])
    return draw(
        st.lists(st.tuples(kinds, st.floats(0, 1), st.one_of(WORDS, st.integers(0, (1 << 64) - 1))), max_size=6)
    )


def damage(data: bytes, what: list[tuple[str, float, int]], first: int, resealed: bool) -> bytes:
    """Damage the part from `first` on; with `resealed` the header's own checksum is put right again."""
    out = bytearray(data)
    for kind, where, number in what:
        if len(out) <= first + 8:
            break
        at = first + int(where * (len(out) - first - 8))
        if kind == "flip":
            out[at] ^= 1 << number % 8
        elif kind == "word":
            struct.pack_into("<Q", out, at // 8 * 8, number)
        elif kind == "cut":
            del out[at:]
        elif kind == "double":
            out[at:at] = out[at : at + number % 1000]
        else:
            out[at : at + number % 5000] = bytes(len(out[at : at + number % 5000]))
    if resealed and len(out) >= 120:
        return seal(out)
    return bytes(out)


@slow
@given(st.sampled_from(["trace", "ring"]), damages(), st.booleans())
def test_any_damage_anywhere(files: Files, kind: str, what: list[tuple[str, float, int]], resealed: bool):
    data = damage(getattr(files, kind), what, 0, resealed)
    path = files.put(data, "any.kvh" if kind == "trace" else RING_NAME)
    use(path)
    path.unlink()


@slow
@example("trace", [("flip", 0.36328125, 255)])  # the time since 1970
@given(st.sampled_from(["trace", "ring"]), damages())
def test_any_damage_in_the_words_of_the_header(files: Files, kind: str, what: list[tuple[str, float, int]]):
    data = getattr(files, kind)
    path = files.put(
        seal(damage(data[:256], [w for w in what if w[0] in ("flip", "word")], 8, False) + data[256:]),
        "any.kvh" if kind == "trace" else RING_NAME,
    )
    use(path)
    path.unlink()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FACT_NAMES = (
    "engine absent model vllm kvhook num_kv_blocks block_size hook_call_ns enable_prefix_caching records_published "
    "records_overrun records_unwritten pid_namespace program adapter python"
)
KNOWN_FACTS = st.sampled_from(FACT_NAMES.split())


@slow
@given(st.dictionaries(KNOWN_FACTS, JSON, max_size=5), st.sampled_from(["trace", "ring"]))
@example({"engine": (1 << 31) - 1}, "ring")
@example({"engine": 1 << 31}, "ring")  # it was told as it is, and no record has room for it
@example({"engine": 1 << 31}, "trace")
def test_any_facts_with_all_checksums_right(files: Files, facts: dict[str, Any], kind: str):
    if kind == "ring":
        path = files.put(forged(files.ring, set_to(**facts)), RING_NAME)
    else:
        path = files.put(files.trace + pack_meta(LAYOUT, 0, facts).tobytes(), "facts.kvh")
    assert use(path) == STEPS
    path.unlink()


@slow
@given(st.sampled_from(["step", "request", "values", "meta"]), st.integers(0, 40), st.integers(0, 5), JSON)
def test_any_cell_of_the_table_of_columns_with_all_checksums_right(
    files: Files, kind: str, i: int, cell: int, value: Any
):
    def change(schema: dict[str, Any]) -> None:
        columns = schema["columns"][kind]
        columns[i % len(columns)][cell] = value

    path = files.put(forged(files.trace, change), "columns.kvh")
    use(path)
    path.unlink()
