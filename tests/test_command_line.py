"""The command line without an engine: what it says to wrong input, and what ``summary`` and ``export`` give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import VERBS, main
from tests.conftest import Python
from tests.standin import fake_vllm, step_stats


@pytest.fixture
def trace(fresh: Path) -> Path:
    with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh"):
        engine = vllm.engine()
        engine.plan += [step_stats(generated=n, kv_cache_usage=0.5) for n in range(5)]
        for _ in range(5):
            engine.step()
    return fresh / "run.kvh"


def test_summary_prints_what_the_session_printed(trace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["summary", str(trace)]) == 0
    assert capsys.readouterr().out == f"{kvhook.open(trace).summary()}\n"


def test_summary_as_json(trace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["summary", str(trace), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == kvhook.open(trace).summary().as_dict()
    assert (shown["steps"], shown["num_generation_tokens"], shown["kv_cache_usage_peak"]) == (5, 10, 0.5)


def test_export_writes_and_does_not_overwrite(trace: Path, capsys: pytest.CaptureFixture[str]):
    out = trace.with_name("out.jsonl")
    assert main(["export", str(trace), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    before = out.read_bytes()
    assert main(["export", str(trace), str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["export", str(trace), str(out), "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "nowhere.kvh"], "cannot open nowhere.kvh: No such file"),
        (["summary", "/dev/null"], "/dev/null"),
        (["export", "RUN", "out.xlsx"], "one of .jsonl, .csv, .kvh"),
        (["export", "RUN", "nowhere/out.csv"], "no directory nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    trace: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([str(trace) if a == "RUN" else a for a in arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith(f"kvhook {arguments[0]}: ")
    assert "Traceback" not in said.err


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["summry"])
    assert end.value.code == 2
    assert "there is no command 'summry'; did you mean kvhook summary?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["zzz"])
    assert end.value.code == 2
    assert "there are demo, doctor" in capsys.readouterr().err


def test_a_trace_that_is_not_there_is_answered_with_the_nearest_name(trace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["summary", str(trace.with_name(trace.name[:-1]))]) == 1
    assert capsys.readouterr().err.endswith(f"No such file or directory; there is {trace}\n")


def test_a_folder_without_a_trace_says_what_it_could_hold(trace: Path, capsys: pytest.CaptureFixture[str]):
    folder = trace.parent / "nothing"
    folder.mkdir()
    assert main(["report", str(folder)]) == 1
    assert f"the folder {folder} holds no .kvh file and no exported run" in capsys.readouterr().err


def test_demo_without_vllm_says_what_to_install_and_leaves_nothing(tmp_path: Path, python: Python):
    code = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "vllm" else find_spec(name, *more)
sys.meta_path.insert(0, NotInstalled())
from kvhook.cli import main
code = main(["demo"])
print("exit code", code)
"""
    done = python(code)
    assert done.stdout == "exit code 1\n"
    assert "vLLM is not installed" in done.stderr
    assert "pip install vllm" in done.stderr
    assert "make demo" in done.stderr
    assert not list(tmp_path.glob("*.kvh"))


def test_the_help_has_an_example_and_every_verb_by_its_purpose(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "$ kvhook summary run.kvh" in shown
    for purpose, verbs in VERBS.items():
        lines = shown[shown.index(f"to {purpose}:") :].splitlines()[1 : len(verbs) + 1]
        assert [line.split()[0] for line in lines] == list(verbs)


@pytest.mark.parametrize("verb", [verb for verbs in VERBS.values() for verb in verbs])
def test_the_help_of_a_verb_has_an_example_and_what_it_prints(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    example = capsys.readouterr().out.partition("Example:")[2].partition("\n\npositional")[0].splitlines()
    assert example[1].startswith(f"  $ kvhook {verb}")
    assert example[2].strip()
