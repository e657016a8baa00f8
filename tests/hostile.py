"""Forged files of every kind (`forging.py`), each given to a verb of the command line: ``make fuzz``.

    python tests/hostile.py 20000            so many files, each given to one verb; prints what went wrong
    python tests/hostile.py --atheris 600    the same for so many seconds, led by coverage (needs `atheris`)

A file is made from an intact one. Bytes are changed anywhere; or a value is put in the place of another one with all
checksums right, as somebody would who knows the format. The process may take a gigabyte more memory than it has at the
beginning: a file of some kilobytes that makes it ask for more is found so.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.forging import forge

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests/report/data"
#: Memory that the reading of a hostile file may take beyond what the process has at the beginning.
ROOM = 1 << 30

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
