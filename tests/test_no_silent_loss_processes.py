"""Whoever installed kvhook gets records in every process: ranks of one job, forks, spawned children."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvhook
from kvhook.errors import KvhookError
from tests.conftest import ROOT, Python

#: what every script of these tests begins with: an engine whose steps generate the numbers that are asked for
COMMON = """
import json, multiprocessing, os, sys, threading
import kvhook
from tests.standin import fake_vllm, step_stats

def generate(vllm, *tokens):
    engine = vllm.engine()
    engine.plan += [step_stats(generated=n, num_running_reqs=1) for n in tokens]
    for _ in tokens:
        engine.step()
    return engine

def generated(session):
    return session.steps()["num_generation_tokens"].tolist()
"""


def tokens_of(path: Path) -> list[int]:
    tokens: list[int] = kvhook.open(path).steps()["num_generation_tokens"].tolist()
    return tokens


# Ranks of one job, all with the same trace="run.kvh"

RANK = (
    COMMON
    + """
with fake_vllm() as vllm:
    session = kvhook.install(trace="run.kvh")
    print("installed", flush=True)
    sys.stdin.readline()
    generate(vllm, *map(int, sys.argv[1:]))
    print("stepped", flush=True)
    sys.stdin.readline()
    assert generated(session) == list(map(int, sys.argv[1:])), session.steps()
    assert session.faults == {}, session.faults
    print(json.dumps([str(path) for path in session.files]), flush=True)
"""
)


class Process:
    """A script that goes on when it is told to."""

    def __init__(self, code: str, *arguments: object, cwd: Path, **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**clean, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(cwd / "rings"), **environment},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> str:
        _, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return errors


def together(tmp_path: Path, environments: list[dict[str, str]]) -> tuple[list[list[str]], list[str]]:
    """Processes that install, step and read at the same time. Their files, and what they wrote to stderr."""
    ranks = [Process(RANK, 10 + i, 20 + i, cwd=tmp_path, **env) for i, env in enumerate(environments)]
    for expected in ("installed", "stepped"):
        assert [rank.line() for rank in ranks] == [expected] * len(ranks)
        for rank in ranks:
            rank.go_on()
    files = [[Path(name).name for name in json.loads(rank.line())] for rank in ranks]
    return files, [rank.end() for rank in ranks]


def one_after_the_other(tmp_path: Path, environments: list[dict[str, str]]) -> tuple[list[list[str]], list[str]]:
    done = [together(tmp_path, [env]) for env in environments]
    return [files for each, _ in done for files in each], [text for _, errors in done for text in errors]


RANKS = [{"RANK": str(i), "WORLD_SIZE": "2"} for i in range(2)]


@pytest.mark.parametrize("order", ["together", "one after the other"])
def test_ranks_have_files_of_their_own(tmp_path: Path, order: str):
    files, errors = (together if order == "together" else one_after_the_other)(tmp_path, RANKS)
    assert files == [["run-rank0.kvh"], ["run-rank1.kvh"]]
    assert errors == ["", ""]
    assert tokens_of(tmp_path / "run-rank0.kvh") == [10, 20]
    # one after the other, each is the first of its call
    assert tokens_of(tmp_path / "run-rank1.kvh") == ([11, 21] if order == "together" else [10, 20])
    assert [e["rank"] for e in kvhook.open(tmp_path / "run*.kvh").meta["engines"]] == [0, 1]


@pytest.mark.parametrize("order", ["together", "one after the other"])
def test_processes_that_do_not_know_their_rank_have_files_of_their_own_too(tmp_path: Path, order: str):
    files, errors = (together if order == "together" else one_after_the_other)(tmp_path, [{}, {}])
    flat = sorted(name for each in files for name in each)
    assert flat[1] == "run.kvh"
    assert re.fullmatch(r"run-pid\d+\.kvh", flat[0])
    (told,) = [text for text in errors if text]
    assert "is there already" in told
    assert flat[0] in told
    assert sorted(tokens_of(tmp_path / name) for name in flat) == (
        [[10, 20], [11, 21]] if order == "together" else [[10, 20], [10, 20]]
    )


def test_a_rank_whose_file_is_there_from_an_earlier_job_takes_another_name(tmp_path: Path):
    for _ in range(2):
        one_after_the_other(tmp_path, RANKS)
    names = sorted(path.name for path in tmp_path.glob("run*.kvh"))
    assert len(names) == 4
    assert [re.sub(r"\d+\.kvh", "N.kvh", name) for name in names] == [
        "run-rank0-pidN.kvh",
        "run-rankN.kvh",
        "run-rank1-pidN.kvh",
        "run-rankN.kvh",
    ]


def test_what_ranks_wrote_opens_as_pattern_and_as_folder_and_ls_lists_them(tmp_path: Path, python: Python):
    together(tmp_path, RANKS)
    for place in (tmp_path / "run*.kvh", tmp_path):
        trace = kvhook.open(place)
        assert sorted(trace.steps()["num_generation_tokens"].tolist()) == [10, 11, 20, 21]
        assert trace.summary().engines == 2
    listed = json.loads(
        python("import sys; from kvhook.cli import main; sys.exit(main(['ls', '--json', '--dir', 'rings']))").stdout
    )
    assert len(listed) == 2
    assert {ring["state"] for ring in listed} == {"closed"}


def test_a_name_that_is_not_there_tells_those_that_are(tmp_path: Path):
    together(tmp_path, RANKS)
    with pytest.raises(KvhookError, match=r"run-rank0\.kvh, run-rank1\.kvh beside it.*run-\*\.kvh"):
        kvhook.open(tmp_path / "run.kvh")
    with pytest.raises(KvhookError, match="holds no"):
        kvhook.open(tmp_path / "other*.kvh")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KvhookError, match="holds no"):
        kvhook.open(tmp_path / "empty")


# Forks and spawned processes

FORK = (
    COMMON
    + """
with fake_vllm() as vllm:
    session = kvhook.install(trace="run.kvh")
    {before}
    child = os.fork()
    if not child:
        generate(vllm, 5, 6)
        assert generated(session) == [5, 6], generated(session)
        assert session.summary().num_generation_tokens == 11
        assert session.faults == {{}}, session.faults
        assert kvhook.install() is session
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    {after}
    print(child)
    print(session.summary())
"""
)


def test_an_engine_in_a_forked_child_is_recorded_into_a_file_of_the_child(tmp_path: Path, python: Python):
    done = python(FORK.format(before="", after=""))
    child, summary = done.stdout.split("\n", 1)
    assert sorted(path.name for path in tmp_path.glob("*.kvh")) == [f"run-pid{child}.kvh"]
    assert tokens_of(tmp_path / f"run-pid{child}.kvh") == [5, 6]
    # the parent, which has nothing itself, says where it is
    assert "1 of its child processes recorded engines" in summary
    assert f"run-pid{child}.kvh" in summary
    assert "before LLM(" not in summary


def test_parent_and_child_each_have_their_own_steps(tmp_path: Path, python: Python):
    code = FORK.format(before="generate(vllm, 1, 2)", after="generate(vllm, 3)")
    child, _ = python(code).stdout.split("\n", 1)
    assert tokens_of(tmp_path / "run.kvh") == [1, 2, 3]
    assert tokens_of(tmp_path / f"run-pid{child}.kvh") == [5, 6]
    both = kvhook.open(tmp_path / "run*.kvh")
    assert both.meta["engines"][0]["parent_pid"] != both.meta["engines"][1]["parent_pid"]


def test_without_a_trace_a_forked_child_has_its_own_history_and_ring(tmp_path: Path, python: Python):
    done = python(FORK.format(before="generate(vllm, 1)", after="").replace('trace="run.kvh"', ""))
    assert "1 tokens" in done.stdout.split("generated")[1].splitlines()[0]
    assert len(list((tmp_path / "rings").glob("*.ring"))) == 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing_are_recorded(tmp_path: Path, python: Python, method: str):
    """They end without atexit. A spawned one begins with nothing: it installs kvhook itself."""
    (tmp_path / "work.py").write_text(
        COMMON
        + """
def work(vllm, *tokens):
    session = kvhook.install(trace="run.kvh")
    generate(vllm, *tokens)
    assert generated(session) == list(tokens)

def spawned(*tokens):
    with fake_vllm() as vllm:
        work(vllm, *tokens)

def run(children):
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[1] == "fork":
        with fake_vllm() as vllm:
            kvhook.install(trace="run.kvh")
            run([context.Process(target=work, args=(vllm, n, n + 1)) for n in (1, 5)])
    else:
        run([context.Process(target=spawned, args=(n, n + 1)) for n in (1, 5)])
""",
        encoding="utf-8",
    )
    python(
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        tmp_path / "work.py",
        method,
    )
    files = sorted(tmp_path.glob("run*.kvh"))
    assert len(files) == 2
    assert sorted(map(tokens_of, files)) == [[1, 2], [5, 6]]
    assert all(engine["records_published"] == 2 for engine in kvhook.open(*files).meta["engines"])


def test_a_lock_that_another_thread_holds_at_the_fork_does_not_hang_the_child(python: Python):
    code = (
        COMMON
        + """
from kvhook.recording.owner import lock
held, done = threading.Event(), threading.Event()

def hold():
    with lock:
        held.set()
        done.wait()

with fake_vllm() as vllm:
    session = kvhook.install()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        generate(vllm, 5, 6)
        kvhook.install()
        assert generated(session) == [5, 6]
        kvhook.uninstall()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
    generate(vllm, 7)
    assert generated(session) == [7]
"""
    )
    python(code)


def test_install_in_a_fork_may_choose_another_trace_as_long_as_nothing_is_recorded(tmp_path: Path, python: Python):
    code = (
        COMMON
        + """
with fake_vllm() as vllm:
    kvhook.install(trace="run.kvh")
    child = os.fork()
    if not child:
        session = kvhook.install(trace="mine.kvh", level="full")
        generate(vllm, 5)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )
    python(code)
    assert [path.name for path in tmp_path.glob("*.kvh")] == ["mine.kvh"]
    assert tokens_of(tmp_path / "mine.kvh") == [5]
