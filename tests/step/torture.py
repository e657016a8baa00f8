"""The extension under three sanitizers, its reference counts, and its ring: ``make torture``.

    python tests/step/torture.py                   everything; some minutes
    python tests/step/torture.py refcounts 10e6    ten million steps in this process, without a sanitizer
    python tests/step/torture.py steps 100e6       so many steps of the front end only
    python tests/step/torture.py differences 3000  so many scenarios of the differential test in this process
    python tests/step/torture.py attacks 3000      so many scenarios with attributes that do harm
    python tests/step/torture.py suite 1           tests/step and tests/ring under ASan and UBSan, so many times
    python tests/step/torture.py races 1           the same under ThreadSanitizer
    python tests/step/torture.py ring 1e9          so many reads of a ring by one C process that another one writes

With the sanitizers the extension is built anew, into a folder of its own, and loaded in the place of the usual one.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def differences(scenarios: int) -> int:
    """Scenarios of the differential test; 1 if one of them was not alike on both paths."""
    from tests.core.two_counts import differences as play_core
    from tests.step.two_paths import differences as play

    warnings.simplefilter("ignore")  # numpy's, of numbers that overflow
    first = int(os.environ.get("KVHOOK_FIRST_SEED", "1000000"))
    for seed in range(first, first + scenarios):
        found = play(seed) + play_core(seed)
        if found:
            print(*found, sep="\n")
            return 1
    print(f"{scenarios} scenarios, alike on both paths")
    return 0


def attacks(scenarios: int) -> int:
    """Attributes that do harm; 1 if the publisher did not go on recording."""
    from tests.step import attacks as module

    problems = module.attacks(scenarios)
    print(*problems, f"{scenarios} scenarios with attributes that do harm", sep="\n")
    return 1 if problems else 0


def steps(count: int) -> int:
    """Steps of both levels: no object that was there before is referred to more often afterwards, no memory is lost."""
    from kvhook.adapters.step_functions import Counters
    from tests.step import two_paths

    problems: list[Any] = []
    for where in (("0.32.0", "full", "v1"), ("0.32.0", "light", "v1-light")):
        with two_paths.table(*where) as adapter:
            r = random.Random(1)
            compiled = two_paths.compile_one(adapter, r)
            made = two_paths.Made(compiled, 0.0)
            stats = [{a: made.stats(a, r) for a in compiled.plan.arguments if a != "engine_idx"} for _ in range(16)]
            records = [0]

            def publish_record(n: int, record: bytes, records: list[int] = records) -> int:
                records[0] += 1
                return n + 1

            functions = compiled._bind_native(
                publish_record, 0, time.monotonic_ns, lambda *_: -1, Counters(), lambda _: None
            )
            watched = [None, 0, 1, 257, publish_record, *_every_object(stats)]

            def play(times: int, functions: Any = functions, stats: Any = stats) -> None:
                for i in range(times):
                    functions.record(**stats[i & 15])
                    functions.publish(1, 2)

            play(1000)
            gc.collect()
            before, memory = [sys.getrefcount(each) for each in watched], _memory()
            start = time.monotonic()
            play(count)
            seconds = time.monotonic() - start
            gc.collect()
            # a reference lost or kept at each step would show as some millions; a handful are the interpreter's own
            moved = Counter(
                type(each).__name__
                for each, count in zip(watched, before, strict=True)
                if abs(sys.getrefcount(each) - count) > 50
            )
            grown = _memory() - memory
            print(f"{where}: {count:,} steps, {records[0]:,} records, {seconds:.0f} s, memory {grown:+,} KiB")
            print(*(f"references to {kind} have moved, {count} objects" for kind, count in moved.items()), sep="\n")
            # a sanitizer keeps what is freed for a while
            if moved or (grown > 4096 and "ASAN_OPTIONS" not in os.environ):
                problems.append(where)
    return 1 if problems else 0


def refcounts(count: int) -> int:
    """The same, and inside the engine core."""
    problems: list[Any] = [1] * steps(count)
    from tests.core.test_both_counts import moved_references

    with tempfile.TemporaryDirectory() as folder:
        for batch in (1, 64):
            wrong = moved_references(batch, Path(folder), count // (10 * batch))
            print(f"inside the engine core, batch {batch}: {count // (10 * batch):,} steps", *wrong, sep="\n")
            problems += wrong
    return 1 if problems else 0


def _every_object(start: Any) -> list[Any]:
    """Everything that can be reached from vLLM's objects here."""
    found: dict[int, Any] = {}
    todo = [start]
    while todo:
        each = todo.pop()
        if id(each) not in found and not isinstance(each, type):
            found[id(each)] = each
            todo += gc.get_referents(each)
    return [each for each in found.values() if not isinstance(each, (type(sys), type(_memory), dict))]


def _memory() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ring(reads: int) -> int:
    """The ring's protocol between two C processes; and that the reader finds a writer out that is broken."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ring_torture"
        compiler = [os.environ.get("CC", "cc"), "-std=c11", "-O2", "-o", str(program)]
        subprocess.run([*compiler, str(ROOT / "tests/step/ring_torture.c")], check=True)
        for more in ([str(reads)], [str(reads), "4096"], [str(reads), "4096", "break"]):
            done = subprocess.run([str(program), *more], capture_output=True, text=True, check=False)
            print(*more, ":", done.stdout.strip())
            if done.returncode:
                return 1
    return 0


#: Sanitizer -> flags, its library, its environment.
SANITIZERS = {
    "address": (
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1",
        "libasan.so",
        # CPython itself keeps what it has at the end; each object has a block of its own, so that none hides another
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONMALLOC": "malloc"},
    ),
    # it does not know fences, so that the ring's own order is tested by `ring` and `test_memory_model.py`
    "thread": (
        "-fsanitize=thread -Wno-tsan -fno-omit-frame-pointer -g -O1",
        "libtsan.so",
        # a report is an error; a child that was forked off beside other threads may start threads of its own
        {"TSAN_OPTIONS": "halt_on_error=1 die_after_fork=0"},
    ),
}
#: ThreadSanitizer wants memory at the addresses that it knows.
STILL = ["setarch", "-R"]


def sanitized(scenarios: int) -> int:
    """The differential test, and a short count of references, with the extension under ASan and UBSan."""
    more = ["refcounts", "2000"]
    return _under("address", [["differences", str(scenarios)], ["attacks", str(scenarios)], more])


def tests(times: int) -> int:
    """The tests of the step path and of the ring, in this process, with the extension that it has loaded."""
    import pytest

    from kvhook import _step

    assert _step.native is not None, _step.why_not
    print("the extension is", _step.native.__file__)
    for _ in range(times):
        code = pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests/step"), str(ROOT / "tests/ring")])
        if code:
            return int(code)
    return 0


def suite(times: int) -> int:
    """The same under ASan and UBSan."""
    return _under("address", [["tests", str(times)]])


def threads(scenarios: int) -> int:
    """Attributes that do harm while another thread runs, with the extension under ThreadSanitizer."""
    return _under("thread", [["attacks", str(scenarios)]], STILL)


def races(times: int) -> int:
    """The tests of the step path and of the ring under ThreadSanitizer."""
    return _under("thread", [["tests", str(times)]], STILL)


def _under(sanitizer: str, parts: list[list[str]], launcher: list[str] | None = None) -> int:
    """Parts of this program with an extension that was built with a sanitizer."""
    flags, library, settings = SANITIZERS[sanitizer]
    found = subprocess.run(["cc", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    built = {
        **os.environ,
        **settings,
        "KVHOOK_CFLAGS": flags,
        "KVHOOK_LDFLAGS": flags.split()[0],
    }
    environment = {**built, "LD_PRELOAD": str(Path(found.stdout.strip()).resolve())}
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hatch_build import *; "
        code += f"print(build(Path({str(ROOT)!r}), Path({folder!r})))"
        done = subprocess.run([sys.executable, "-c", code], env=built, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if done.returncode:
            return done.returncode
        module = done.stdout.split()[-1]
        for what in parts:
            code = f"import runpy, sys; sys.argv = ['torture', *{what!r}]; sys.path.insert(0, {str(ROOT)!r}); "
            code += f"import tests.step.torture as t; t.load({module!r}); sys.exit(t.main())"
            command = [*(launcher or []), sys.executable, "-c", code]
            ended = subprocess.run(command, env=environment, cwd=ROOT, check=False)
            if ended.returncode:
                return ended.returncode
    return 0


def load(path: str) -> None:
    """Load an extension from another file than the usual one, before anything imports it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("kvhook._step.native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["kvhook._step.native"] = module
    print("loaded", path)


def main() -> int:
    """See the head of this file."""
    parts = {
        "differences": differences,
        "attacks": attacks,
        "refcounts": refcounts,
        "steps": steps,
        "ring": ring,
        "sanitized": sanitized,
        "tests": tests,
        "suite": suite,
        "threads": threads,
        "races": races,
    }
    if len(sys.argv) == 3 and sys.argv[1] in parts:
        return parts[sys.argv[1]](int(float(sys.argv[2])))
    if len(sys.argv) > 1:
        print(__doc__)
        return 2
    return (
        sanitized(300)
        or threads(100)
        or suite(1)
        or races(1)
        or differences(2000)
        or attacks(3000)
        or refcounts(10_000_000)
        or ring(1_000_000_000)
    )


if __name__ == "__main__":
    sys.exit(main())
