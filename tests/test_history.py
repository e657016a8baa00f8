"""The whole run on disk: nothing is missing, memory stays flat, what falls out of the bound is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from tests.conftest import Python
from tests.standin import fake_vllm, step_stats

LONG_RUN = """
import json, os, time
import numpy as np
import kvhook
from tests.standin import fake_vllm, step_stats

STEPS = 300_000

def rss():
    # anonymous memory: what is kept; the page cache of the files and the ring are not kvhook's to keep
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

with fake_vllm() as vllm:
    session = kvhook.install(trace="run.kvh")
    engine = vllm.engine()
    stats = step_stats(num_running_reqs=2, itl=[0.25, 0.5])
    (ring,) = session.rings
    reader = session._spool._engines[0].reader
    memory = {}
    for n in range(STEPS):
        stats[1].num_generation_tokens = n
        engine.plan.append(stats)
        engine.step()
        if not n % 1024:
            # a real step takes a thousand times longer than this one: let the spool's thread have its turn
            while n - reader.cursor > 6144:
                time.sleep(0.001)
        if n in (50_000, STEPS - 1):
            memory[n] = rss()
    before_dump = rss()
    session.dump("copy.kvh")
    after_dump = rss()
    kvhook.uninstall()

copy = kvhook.open("copy.kvh")
steps = copy.steps()
print(json.dumps({
    "growth": memory[STEPS - 1] - memory[50_000],
    "dump": after_dump - before_dump,
    "steps": len(steps),
    "in order": bool((steps["num_generation_tokens"] == np.arange(STEPS)).all()),
    "itl": int(steps["itl_count"].sum()),
    "lost": copy.meta["records_lost"] + copy.meta["records_dropped"],
    "size": os.path.getsize("copy.kvh"),
    "faults": session.faults,
}))
os.unlink("run.kvh"), os.unlink("copy.kvh")
"""


def test_a_long_run_is_kept_whole_while_memory_stays_flat(python: Python):
    run = json.loads(python(LONG_RUN).stdout)
    assert run["steps"] == 300_000
    assert run["in order"]
    assert run["itl"] == 600_000
    assert (run["lost"], run["faults"]) == (0, {})
    # 250,000 more steps are some 100 MB of records, of which nothing stays; nor does a dump gather them
    assert run["growth"] < 4096, f"{run['growth']} KiB"
    assert run["size"] > 300_000 * 300
    assert run["dump"] < 40_960, f"{run['dump']} KiB"


@pytest.fixture
def bounded(fresh: Path) -> Any:
    """Plays so many steps into a session whose history is bounded; drains as often as a thread would."""

    def play(history: int, count: int) -> kvhook.Session:
        with fake_vllm() as vllm, kvhook.install(history=history) as session:
            engine = vllm.engine()
            for n in range(count):
                engine.plan.append(step_stats(generated=n, finished=[{"num_prompt_tokens": n}] if n % 2 else []))
                engine.step()
                if not n % 100:
                    session.trace()
            session.trace()
            return session

    return play


def test_what_falls_out_of_the_bound_is_counted_and_the_rest_is_right(bounded: Any, fresh: Path):
    count, limit = 3000, 400_000
    session = bounded(limit, count)
    steps, requests, summary = session.steps(), session.requests(), session.summary()
    assert 0 < len(steps) < count
    # it is the newest part, without a gap
    assert steps["step"].tolist() == list(range(count - len(steps), count))
    assert steps["num_generation_tokens"].tolist() == steps["step"].tolist()
    assert requests["num_prompt_tokens"].tolist() == [n for n in range(count) if n % 2][-len(requests) :]
    records = count + count // 2
    assert len(steps) + len(requests) + summary.records_dropped == records
    assert summary.records_lost == 0
    assert f"{summary.records_dropped:,} dropped from the bounded history" in str(summary)


def test_the_bound_is_kept_on_disk_and_most_of_it_used(bounded: Any, fresh: Path):
    limit = 400_000
    bounded(limit, 3000)
    sizes = [f.stat().st_size for f in (fresh / "disk").rglob("*.kvh")]
    # one batch may go beyond
    assert 0.6 * limit < sum(sizes) < 1.3 * limit


def test_facts_about_the_engine_survive_the_bound(bounded: Any):
    session = bounded(400_000, 3000)
    (engine,) = session.meta["engines"]
    assert engine["model"] == "stand-in"
    assert session.summary().num_kv_blocks == 60


def test_a_history_that_is_large_enough_drops_nothing(bounded: Any):
    session = bounded(50_000_000, 3000)
    assert len(session.steps()) == 3000
    assert session.summary().records_dropped == 0


def test_a_dump_of_a_bounded_history_opens_as_what_it_was(bounded: Any, fresh: Path):
    session = bounded(400_000, 3000)
    session.dump(fresh / "out.kvh")
    trace = kvhook.open(fresh / "out.kvh")
    assert (trace.steps() == session.steps()).all() or np.array_equal(trace.steps()["step"], session.steps()["step"])
    assert trace.summary().records_dropped == session.summary().records_dropped


def test_an_overrun_ring_is_counted_as_lost(fresh: Path):
    # No thread gets a turn here between the steps of one burst, and the burst is three rings long.
    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        engine = vllm.engine()
        session._spool._lock.acquire()
        try:
            engine.plan += [step_stats(generated=n) for n in range(200)]
            for _ in range(200):
                engine.step()
        finally:
            session._spool._lock.release()
        engine.plan.append(step_stats(generated=200))
        engine.step()
        steps, summary = session.steps(), session.summary()
    assert steps["num_generation_tokens"].tolist() == list(range(201 - len(steps), 201))
    assert summary.records_lost + summary.records_dropped == 201 - len(steps) > 0
    assert summary.records_dropped == 0, "nothing fell out of the history: the ring was overrun"


DISK_FULL = """
import json, resource, sys
import kvhook
from tests.standin import fake_vllm, step_stats

def play(engine, first, count):
    for n in range(first, first + count):
        engine.plan.append(step_stats(generated=n))
        assert engine.step() == ["output of the step"]
        if not n % 50:
            session.trace()
    session.trace()

with fake_vllm() as vllm:
    session = kvhook.install(ring_slots=256)
    engine = vllm.engine()
    play(engine, 0, 100)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    play(engine, 100, 1000)
    full = session.summary()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    play(engine, 1100, 100)
    again = session.summary()
    tokens = session.steps()["num_generation_tokens"].tolist()
    print(json.dumps({
        "full": [full.steps, full.records_lost], "again": [again.steps, again.records_lost], "faults": again.faults,
        "first": tokens[:100], "last": tokens[-100:],
    }))
"""


def test_a_full_disk_costs_records_that_are_counted_and_no_more(python: Python):
    done = python(DISK_FULL)
    run = json.loads(done.stdout)
    assert run["first"] == list(range(100))
    assert run["last"] == list(range(1100, 1200))
    steps, lost = run["again"]
    assert steps + lost == 1200
    assert lost > 0
    assert list(run["faults"]) == ["writing the trace"]
    assert done.stderr.count("writing the trace failed") == 1
    # and it is seen while the disk is still full
    steps, lost = run["full"]
    assert steps + lost == 1100
