"""Any damage, and any forged facts and columns: whatever hypothesis comes upon, no file does harm when it is read."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvhook.ring.layout import seal
from kvhook.ring.trace_file import pack_meta
from tests.ring.damaged import RING_NAME, STEPS, Files, forged, set_to, use
from tests.ring.synthetic import LAYOUT

slow = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
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
