"""Forked and spawned children leave their parent's ring, trace and history alone; the parent goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvhook.ring.reader import RingReader
from kvhook.ring.slots import slot_head
from kvhook.trace import open_trace
from tests.conftest import ROOT, Python
from tests.ring.synthetic import LAYOUT, Recording

COMMON = """
import json, os, sys
import kvhook
from tests.standin import fake_vllm, step_stats

def wait(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
"""


def test_a_writer_does_nothing_in_a_forked_child(tmp_path: Path, python: Python):
    # not even where the child got hold of `publish` itself, as one does that is forked in the middle of a step
    code = """
import os, sys
from pathlib import Path
from tests.ring.synthetic import Recording
recording = Recording(Path(sys.argv[1])).run(3)
publish = recording.ring.publish
child = os.fork()
if not child:
    for _ in range(10):
        recording.step()
    assert recording.n == 13
    recording.ring.close()
    own = Recording(Path(sys.argv[1]) / "own").run(2)
    own.ring.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
recording.run(2)
print(recording.path)
"""
    path = Path(python(code, tmp_path / "r").stdout.strip())
    with RingReader(path) as reader:
        assert not reader.closed
        assert reader.head == 5
        assert slot_head(reader.remains())["n"].tolist() == [0, 1, 2, 3, 4]
    (own,) = (tmp_path / "r" / "own").iterdir()
    assert len(open_trace(own).steps()) == 2


def test_a_child_that_is_forked_in_the_middle_of_a_step_and_ends_it_writes_nothing(tmp_path: Path, python: Python):
    code = (
        COMMON
        + """
class Forks(list):
    def pop(self, i):
        self.child = os.fork()
        return super().pop(i)

with fake_vllm() as vllm:
    session = kvhook.install(trace="run.kvh")
    engine = vllm.engine()
    engine.plan = Forks([step_stats(generated=1), step_stats(generated=2)])
    engine.step()
    if not engine.plan.child:
        sys.exit(0)  # atexit and all
    assert wait(engine.plan.child) == 0
    engine.plan.pop = lambda i: list.pop(engine.plan, i)
    engine.step()
    print(json.dumps(session.steps()["num_generation_tokens"].tolist()))
    ring = session.rings[0]
    kvhook.uninstall()
    print(json.dumps(kvhook.open(ring).steps()["num_generation_tokens"].tolist()))
"""
    )
    lines = python(code).stdout.splitlines()
    assert [json.loads(line) for line in lines] == [[1, 2], [1, 2]]


def test_a_child_that_exits_normally_takes_nothing_down(tmp_path: Path, python: Python):
    code = (
        COMMON
        + """
with fake_vllm() as vllm:
    session = kvhook.install()
    engine = vllm.engine()
    engine.plan += [step_stats(generated=n) for n in range(6)]
    engine.step()
    session.steps()
    child = os.fork()
    if not child:
        engine.step()
        session.close()
        kvhook.uninstall()
        sys.exit(0)
    assert wait(child) == 0
    state = kvhook.open(session.rings[0]).sources[0].header.state
    engine.step()
    print(json.dumps([state, session.steps()["step"].tolist(), session._history_dir.is_dir(), session.faults]))
"""
    )
    state, steps, history, faults = json.loads(python(code).stdout)
    assert state == 1, "the child closed its parent's ring"
    assert (steps, history, faults) == ([0, 1], True, {})


def test_a_forked_child_records_an_engine_of_its_own_with_a_session_of_its_own(tmp_path: Path, python: Python):
    code = (
        COMMON
        + """
with fake_vllm() as vllm:
    session = kvhook.install(trace="parent.kvh")
    engine = vllm.engine()
    engine.plan += [step_stats(generated=n) for n in range(4)]
    engine.step()
    child = os.fork()
    if not child:
        own = kvhook.install(trace="child.kvh")
        mine = vllm.engine()
        mine.plan += [step_stats(generated=n) for n in range(100, 103)]
        for _ in range(3):
            mine.step()
        sys.exit(0)
    assert wait(child) == 0
    engine.step()
    kvhook.uninstall()
for name in ("parent", "child"):
    print(json.dumps(kvhook.open(name + ".kvh").steps()["num_generation_tokens"].tolist()))
"""
    )
    assert [json.loads(line) for line in python(code).stdout.splitlines()] == [[0, 1], [100, 101, 102]]


def test_a_spawned_child_knows_nothing_of_its_parents_session(tmp_path: Path, python: Python):
    (tmp_path / "child.py").write_text(
        "import os, kvhook.recording.installation, kvhook.hooks\n"
        "def look(queue):\n"
        "    rings = os.listdir(os.environ['KVHOOK_DIR'])\n"
        "    queue.put([kvhook.recording.installation.current_session() is None, not kvhook.hooks.armed(), rings])\n"
    )
    code = (
        COMMON
        + """
import multiprocessing
from child import look
if __name__ == "__main__":
    with fake_vllm() as vllm:
        session = kvhook.install()
        engine = vllm.engine()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=look, args=(queue,))
    child.start()
    nothing, unarmed, rings = queue.get(timeout=60)
    child.join()
    print(json.dumps([nothing, unarmed, len(rings), session.rings[0].name in rings]))
"""
    )
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    assert json.loads(python(code, PYTHONPATH=path).stdout) == [True, True, 1, True]


def test_the_stand_in_records_what_it_says(tmp_path: Path):
    recording = Recording(tmp_path / "r").run(3)
    recording.finish(7, num_prompt_tokens=12)
    recording.step(0.5, num_waiting_reqs=2)
    trace = open_trace(recording.path)
    assert trace.steps()["kv_cache_usage"].tolist() == [0.25, 0.25, 0.25, 0.5]
    assert trace.requests()["request_id"].tolist() == [7]
    assert LAYOUT.slot_bytes == trace.sources[0].layout.slot_bytes
