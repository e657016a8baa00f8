"""Forged files: schemas and facts that no kvhook would write, with every checksum right."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from kvhook.cli import main
from kvhook.ring.trace_file import pack_meta
from kvhook.trace import open_trace
from tests.ring.damaged import RING_NAME, STEPS, Files, forged, set_to, use
from tests.ring.synthetic import LAYOUT


def column(kind: str, i: int, cell: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda s: s["columns"][kind][i].__setitem__(cell, value)


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
