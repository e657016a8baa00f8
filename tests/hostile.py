"""Files as somebody might forge them, and every verb of the command line that opens one: ``make fuzz``.

    python tests/hostile.py 20000            so many files, each given to one verb; prints what went wrong
    python tests/hostile.py --atheris 600    the same for so many seconds, led by coverage (needs `atheris`)

A file is made from an intact one. Bytes are changed anywhere; or a value is put in the place of another one with all
checksums right, as somebody would who knows the format. The process may take a gigabyte more memory than it has at the
beginning: a file of some kilobytes that makes it ask for more is found so.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

DATA = ROOT / "tests/report/data"
#: Memory that the reading of a hostile file may take beyond what the process has at the beginning.
ROOM = 1 << 30

#: Numbers and other values that no kvhook has written there.
WORDS = [0, 1, 2, 255, 1 << 31, 1 << 32, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 1.7e308, -1.7e308]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 40, 1 << 62, -(1 << 63), 1 << 64, 10**30),
    *(float("nan"), float("inf"), -1e308, 1.5),
    *("", "x", "\x1b[2J", "../../../etc/passwd", "/etc/passwd", "é" * 300, "\ud800", "1e9", "nan"),
    *([], [1], [[1, 2], [3]], {}, {"a": 1}, [None, "x"], {"x": {"x": {"x": []}}}),
]

#: The verbs, with FILE in the place of the file and OUT in that of what is written.
VERBS = (
    "summary FILE",
    "summary FILE --json",
    "summary FILE --scopes --warmup",
    "summary FILE --scope generate --label x",
    "summary FILE --windows 3",
    "cache FILE",
    "cache FILE --json",
    "whatif FILE",
    "whatif FILE --json --reorder --replicas 2",
    "report FILE -o OUT.html",
    "compare FILE SOUND",
    "compare SOUND FILE --json",
    "export FILE OUT.jsonl",
    "export FILE OUT.csv",
    "export FILE OUT.parquet",
    "export FILE OUT.arrow",
    "export FILE OUT.perfetto.json.gz",
    "export FILE OUT.kvh --compress",
    "export FILE OUT.jsonl --format mooncake",
    "autopsy FILE",
    "autopsy FILE --json",
    "recover FILE",
    "ls --dir FOLDER",
)


#: How many files were read in spite of what was done to them (0), and how many were refused (1).
codes: Counter[int] = Counter()


class Sound:
    """Intact small files of every kind, in a folder of their own. `kinds`: name -> the file and those beside it."""

    def __init__(self, folder: Path) -> None:
        from kvhook.trace import open_trace

        self.folder = folder
        short = folder / "short"
        short.mkdir(parents=True)
        for part, slots in (("", 160), (".core0-32109", 200), (".blocks0-32109", 80)):
            _shorten(DATA / f"baseline{part}.kvh", short / f"run{part}.kvh", slots)
        run = open_trace(short / "run.kvh")
        for suffix in (".jsonl", ".parquet", ".arrow"):
            run.dump(folder / f"exported{suffix}")
        with contextlib.redirect_stdout(io.StringIO()):
            main_of(["export", str(short / "run.kvh"), str(folder / "packed.kvh"), "--compress"])
            main_of(["export", str(DATA / "baseline.kvh"), str(folder / "sent.jsonl"), "--format", "mooncake"])
        lines = (folder / "sent.jsonl").read_text().splitlines(keepends=True)[:20]
        (folder / "sent.jsonl").write_text("".join(lines))
        self.kinds: dict[str, list[Path]] = {
            "run.kvh": sorted(short.glob("run*.kvh")),
            **{path.name: [path] for path in sorted(folder.glob("*.*")) if path.name.count(".") == 1},
            "exported.parquet": sorted(folder.glob("exported*.parquet")),
            "exported.arrow": sorted(folder.glob("exported*.arrow")),
        }


def _shorten(path: Path, to: Path, slots: int) -> None:
    from kvhook.ring.trace_file import header_of

    header = header_of(path)
    to.write_bytes(path.read_bytes()[: header.header_bytes + slots * header.layout.slot_bytes])


def main_of(argv: list[str]) -> int:
    """The command line in this process."""
    from kvhook.cli import main

    return main(argv)


# ---- forging -------------------------------------------------------------------------------------------------------


def forge(name: str, data: bytes, r: random.Random) -> bytes:
    """A file like this one in which something is not as it should be."""
    known: list[Callable[[bytes, random.Random], bytes]] = [_bytes]
    if name.endswith(".kvh"):
        known += [_fields, _fields, _facts, _facts] if not name.startswith("packed") else [_frames]
    if name.endswith(".jsonl"):
        known += [_lines] * 4
    if name.endswith((".parquet", ".arrow")):
        known += [lambda data, r: _columns(name, data, r)] * 4
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        data = r.choice(known)(data, r)
    return data


def _bytes(data: bytes, r: random.Random) -> bytes:
    from kvhook.ring.layout import MAGIC, seal

    out = bytearray(data)
    for _ in range(r.choice((1, 1, 3, 20))):
        at = int(len(out) * r.random() ** r.choice((1, 4)))  # often near the beginning
        how = r.randrange(5)
        if how == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << r.randrange(8)
        elif how == 1 and len(out) >= 8:
            struct.pack_into("<Q", out, min(at // 8 * 8, len(out) // 8 * 8 - 8), r.choice(WORDS))
        elif how == 2:
            del out[at:]
        elif how == 3:
            out[at:at] = out[at : at + r.randrange(300)]
        else:
            out[at : at + 200] = r.randbytes(len(out[at : at + 200]))
    if out[:8] == MAGIC and len(out) > 128 and r.random() < 0.7:
        return seal(out)
    return bytes(out)


def _fields(data: bytes, r: random.Random) -> bytes:
    """Numbers in records, which carry no checksum in a trace."""
    from kvhook.errors import KvhookError
    from kvhook.ring.layout import FIELDS_AT, parse_header

    with contextlib.suppress(KvhookError):
        header = parse_header(data, len(data), "x")
        slot, first = header.layout.slot_bytes, header.header_bytes
        count = (len(data) - first) // slot
        out = bytearray(data)
        column = FIELDS_AT + 8 * r.randrange((slot - FIELDS_AT) // 8)
        value = struct.pack("<Q", r.choice(WORDS)) if r.random() < 0.6 else struct.pack("<d", r.choice(FLOATS))
        if count:
            which = range(count) if r.random() < 0.3 else [r.randrange(count) for _ in range(r.choice((1, 5)))]
            for i in which:
                at = first + i * slot
                if out[at + 24] != 4 or r.random() < 0.1:  # pieces of facts have a crc
                    out[at + column : at + column + 8] = value
        return bytes(out)
    return data


def _facts(data: bytes, r: random.Random) -> bytes:
    """Facts about engines, with their checksums: in the header, or behind everything else."""
    from kvhook.errors import KvhookError
    from kvhook.ring.layout import FIXED, SCHEMA_AT, parse_header, seal
    from kvhook.ring.trace_file import pack_meta

    with contextlib.suppress(KvhookError, ValueError, TypeError, KeyError):
        header = parse_header(data, len(data), "x")
        size = FIXED.unpack(data[: FIXED.size])[8]
        facts = json.loads(data[SCHEMA_AT : SCHEMA_AT + size])
        if r.random() < 0.5:
            changed = json.dumps(_changed(facts, r)).encode()
            if len(changed) > header.header_bytes - SCHEMA_AT:
                return data
            out = bytearray(data)
            out[SCHEMA_AT : header.header_bytes] = changed.ljust(header.header_bytes - SCHEMA_AT, b"\0")
            struct.pack_into("<2Q", out, 64, len(changed), zlib.crc32(changed))
            return seal(out)
        from kvhook.schema import FACT_FIELDS

        names = [f.name for f in FACT_FIELDS] + ["ring", "session", "kv_groups", "core_level", "token_budget", "stream"]
        new = {r.choice(names): r.choice(VALUES) for _ in range(r.choice((1, 3)))}
        if r.random() < 0.4:
            new["events"] = [_event(r) for _ in range(r.randrange(6))]
        engine = r.choice((0, 0, 0, 1, 7, (1 << 31) - 1, -1))
        whole = len(data) - (len(data) - header.header_bytes) % header.layout.slot_bytes
        return data[:whole] + pack_meta(header.layout, engine, new).tobytes()
    return data


def _event(r: random.Random) -> list[Any]:
    made: list[Any] = r.choice(
        [
            ["scope", 0, "a", "scope", -1, 5, False, [], 1, ""],
            ["scope", r.randrange(5), "b", "generate", r.randrange(5), 7, True, [0], -1, "n=1"],
            ["end", 0, 9],
            ["name", "label", 0, "a"],
            ["request", 0, 5, "ff", 0, -1],
            ["clock", 5, 10**18],
        ]
    )
    return [r.choice(VALUES) if i and r.random() < 0.2 else cell for i, cell in enumerate(made)]


def _changed(value: Any, r: random.Random) -> Any:
    """The same JSON with another value somewhere."""
    if isinstance(value, dict) and value and r.random() < 0.95:
        key = r.choice(sorted(value))
        if r.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.9:
        at = r.randrange(len(value))
        if r.random() < 0.2:
            return value[:at] + value[at + 1 :] if r.random() < 0.5 else [*value, value[at]]
        return [*value[:at], _changed(value[at], r), *value[at + 1 :]]
    return r.choice(VALUES)


def _frames(data: bytes, r: random.Random) -> bytes:
    """A frame that holds more than it says, or another number of slots, with its checksums right."""
    from kvhook.ring import frames

    at = data.find(frames.MAGIC)
    if at < 0:
        return data
    slots = r.choice((0, 1, 30, 8192, 1 << 16))
    method = r.choice((1, 2, 2, 3))
    size = r.choice((0, 64, 1 << 14, 1 << 20, 1 << 26))
    raw = bytes(size) if r.random() < 0.7 else r.randbytes(min(size, 1 << 16))
    payload = zlib.compress(raw)
    if method == 2 and frames.zstandard is not None:
        payload = frames.zstandard.ZstdCompressor().compress(raw)
    head = struct.pack("<8s4I", frames.MAGIC, slots, len(payload), method, zlib.crc32(payload))
    head += bytes(frames._CHECKED - len(head))
    return data[:at] + head + struct.pack("<2I", zlib.crc32(head), 0) + payload


def _lines(data: bytes, r: random.Random) -> bytes:
    lines = data.splitlines()
    for _ in range(r.choice((1, 1, 4))):
        if not lines:
            break
        at = r.choice((0, r.randrange(len(lines))))
        how = r.randrange(6)
        with contextlib.suppress(ValueError, RecursionError):
            if how == 0:
                lines[at] = json.dumps(r.choice(VALUES)).encode()
            elif how == 1:
                lines[at] = b"[" * 3000
            elif how == 2:
                del lines[at]
            else:
                lines[at] = json.dumps(_changed(json.loads(lines[at]), r)).encode()
    return b"\n".join(lines) + b"\n" * r.randrange(2)


def _columns(name: str, data: bytes, r: random.Random) -> bytes:
    """A table with a column of other values, or of another type, or without one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pa.BufferReader(data)
    try:
        table = pq.read_table(source) if name.endswith(".parquet") else pa.ipc.open_file(source).read_all()
        meta = dict(table.schema.metadata or {})
        for _ in range(r.choice((1, 1, 3))):
            at = r.randrange(table.num_columns)
            field = table.schema.names[at]
            how = r.randrange(5)
            value = r.choice(VALUES)
            if how == 0:
                table = table.remove_column(at)
            elif how == 1:
                table = table.set_column(at, field, pa.array([value] * len(table)))
            elif how == 2:
                values = table.column(at).to_pylist()
                values[r.randrange(len(values))] = value
                table = table.set_column(at, field, pa.array(values))
            elif how == 3 and b"kvhook" in meta:
                meta[b"kvhook"] = json.dumps(_changed(json.loads(meta[b"kvhook"]), r)).encode()
            else:
                table = pa.concat_tables([table] * r.choice((0, 2, 3))) if r.random() < 0.5 else table.slice(0, 0)
        table = table.replace_schema_metadata(meta)
        sink = io.BytesIO()
        if name.endswith(".parquet"):
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, IndexError, KeyError, OSError):
        return data


# ---- trying out ----------------------------------------------------------------------------------------------------


def try_one(sound: Sound, r: random.Random, folder: Path) -> str:
    """Forge one file and give it to one verb. Returns what went wrong, "" if nothing did."""
    from kvhook.cli import ENV_DEBUG, INTERNAL

    name = r.choice(sorted(sound.kinds))
    verb = r.choice(VERBS)
    here = folder / "case"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    files = sound.kinds[name]
    hostile = r.choice(files)
    for path in files:
        data = path.read_bytes()
        (here / path.name).write_bytes(forge(name, data, r) if path == hostile else data)
    words = {"FILE": str(here / name), "SOUND": str(sound.kinds["run.kvh"][-1]), "FOLDER": str(here)}
    argv = [words.get(word, word.replace("OUT", str(here / "out"))) for word in verb.split()]
    before = set(sound.folder.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    os.environ.pop(ENV_DEBUG, None)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            code = main_of(argv)
    except BaseException as error:
        return f"{verb}, {hostile.name}: {type(error).__name__}: {error}"
    said = err.getvalue()
    codes[code] += 1
    if INTERNAL in said or "Traceback" in said or "not enough memory" in said:
        return f"{verb}, {hostile.name}: {said.strip()[:400]}"
    if code not in (0, 1, 3):
        return f"{verb}, {hostile.name}: exit code {code}: {said.strip()[:400]}"
    if "\x1b" in out.getvalue() + said:
        return f"{verb}, {hostile.name}: the file moves the terminal's cursor"
    if set(sound.folder.rglob("*")) != before:
        return f"{verb}, {hostile.name}: something was written elsewhere"
    if time.process_time() and time.monotonic() - began > 300:
        return f"{verb}, {hostile.name}: took {time.monotonic() - began:.0f} s"
    return ""


@contextlib.contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """This process can take only so much more address space."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(first: int, count: int, seconds: float = float("inf")) -> Counter[str]:
    """So many cases; prints each that went wrong with its seed, and gives how often each was seen."""
    for module in ("pyarrow.parquet", "numba", "matplotlib", "zstandard", "orjson"):
        with contextlib.suppress(ImportError):
            __import__(module)  # what they map does not count as the file's
    wrong: Counter[str] = Counter()
    codes.clear()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        sound = Sound(Path(name) / "sound")
        with little_memory():
            for seed in range(first, first + count):
                if time.monotonic() > until:
                    break
                problem = try_one(sound, random.Random(seed), Path(name))
                if problem:
                    wrong[problem.partition(":")[2].strip()[:160]] += 1
                    print(f"seed {seed}: {problem}", flush=True)
    return wrong


def led_by_coverage(seconds: float) -> None:
    """The same with `atheris`: what it makes of bytes decides what is forged."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["kvhook"]):
        import kvhook.cli
        import kvhook.trace  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        sound = Sound(Path(name) / "sound")

        def one(data: bytes) -> None:
            problem = try_one(sound, random.Random(data), Path(name))
            if problem:
                raise AssertionError(problem)

        prefix = f"-artifact_prefix={tempfile.gettempdir()}/kvhook-"  # not into the checkout
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}", "-max_len=64", prefix], one)
        atheris.Fuzz()


def main() -> int:
    """See the head of this file."""
    if sys.argv[1:2] == ["--atheris"]:
        led_by_coverage(float(sys.argv[2]))
        return 0
    count = int(float(sys.argv[1])) if len(sys.argv) > 1 else 2000
    first = int(os.environ.get("KVHOOK_FIRST_SEED", "0"))
    began = time.monotonic()
    wrong = run(first, count)
    took = time.monotonic() - began
    print(f"{count:,} files in {took:.0f} s, {sum(wrong.values())} went wrong; exit codes: {dict(codes)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
