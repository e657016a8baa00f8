"""What is recorded of request ids, and what an anonymous recording leaves out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.adapters.ids import id_number
from kvhook.errors import KvhookError
from kvhook.facts import without_names, without_paths
from kvhook.recording.installation import for_logger
from kvhook.recording.notebook import Notebook
from tests.conftest import ROOT
from tests.leaks import leaks, text_patterns
from tests.standin import fake_vllm, step_stats

#: Ids of three kinds: counted by LLM, somebody's telephone number, and text.
IDS = ["17", "4915112345678", "alice@example.com"]


def finished(request_id: str) -> dict[str, Any]:
    return {"request_id": request_id, "e2e_latency": 0.5, "num_generation_tokens": 3}


def recorded_ids(**options: Any) -> tuple[list[int], kvhook.Session]:
    with fake_vllm() as vllm:
        session = kvhook.install(**options)
        engine = vllm.engine()
        engine.plan.append(step_stats(kv_cache_usage=0.5, finished=[finished(each) for each in IDS]))
        engine.step()
        return session.requests()["request_id"].tolist(), session


@pytest.mark.usefixtures("fresh")
def test_only_a_short_number_is_recorded_as_it_is():
    ids, _ = recorded_ids()
    assert ids == [17, -1, -1]


@pytest.mark.usefixtures("fresh")
def test_hashed_ids_can_be_found_again_by_who_knows_them_and_are_no_numbers_of_the_user():
    ids, session = recorded_ids(request_ids="hashed")
    assert ids == [session.request_key(each) >> 11 for each in IDS]
    assert len(set(ids)) == 3
    assert all(17 != each < 1 << 52 for each in ids)  # floats hold it exactly, in JavaScript too
    kvhook.uninstall()
    again, _ = recorded_ids(request_ids="hashed")
    assert not set(again) & set(ids), "another run has another key"
    kvhook.uninstall()
    assert recorded_ids()[0] == [17, -1, -1], "the next session does as it was told"


@pytest.mark.parametrize("value", [None, 3.5, b"12", "-1", "1e3", "1" * 10, 10**9, "٣" * 10, "", " 1", -7])
def test_what_is_no_short_number_is_not_recorded(value: Any):
    assert id_number(value) == -1


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("request_ids", "plain", "'numbers', 'hashed'"), ("anonymous", "yes", "True or False")],
)
def test_an_unknown_choice_is_refused(option: str, value: Any, said: str):
    with pytest.raises(KvhookError, match=said):
        kvhook.install(**{option: value})


def anonymous_run(home: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> kvhook.Session:
    """A run in which everything that has a name says ``alice``."""
    monkeypatch.setattr(sys, "argv", [str(home / "alice_program.py"), "--user", "alice"])
    with fake_vllm() as vllm:
        session = kvhook.install(trace=home / "run.kvh", labels="/", **options)
        engine = vllm.engine()
        state = types.SimpleNamespace(request_id="alice/7", parent_req=None, lora_name="alice-adapter")
        session.label_request(engine, state.request_id, state.lora_name)
        engine.vllm_config.model_config.model = str(home / "alice-model")
        kvhook.uninstall()
        session = kvhook.install(trace=home / "again.kvh", labels="/", **options)
        other = type(engine)(engine.vllm_config, object, log_stats=False)
        session.label_request(other, "alice/7", "alice-adapter")
        other.plan.append(step_stats(kv_cache_usage=0.5, generated=1, finished=[finished(each) for each in IDS]))
        other.step()
        session.fault("a test", OSError(2, "no such file", str(home / "alice.txt")), "nothing")
        session.steps()
        out = home / "out"
        out.mkdir()
        for name in ("run.jsonl", "run.csv", "run.parquet", "run.arrow", "run.perfetto.json.gz", "run.kvh"):
            session.dump(out / name)
            kvhook.open(home / "again.kvh").dump(out / f"opened-{name}")
        both = kvhook.open(home / "run.kvh", home / "again.kvh")
        both.dump(out / "both.jsonl")
        from kvhook.cli import main

        assert main(["report", str(home / "again.kvh"), "-o", str(out / "report.html")]) == 0
        return session


def test_an_anonymous_recording_names_nobody_in_any_file(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    home = fresh / "alice-home"
    home.mkdir()
    session = anonymous_run(home, monkeypatch, anonymous=True)
    assert leaks([fresh], text_patterns("alice")) == []
    (facts,) = session.meta["engines"]
    assert facts["anonymous"] is True
    assert facts.get("model") is None
    assert sorted(session.meta["labels"]) == ["label-0"]
    assert session.meta["faults"]["a test"] == "FileNotFoundError"
    assert session.requests()["request_id"].tolist() == [session.request_key(each) >> 11 for each in IDS]


def test_the_same_recording_says_the_names_if_it_is_not_asked_to_hide_them(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
):
    home = fresh / "alice-home"
    home.mkdir()
    anonymous_run(home, monkeypatch)
    found = leaks([fresh], text_patterns("alice"))
    assert {each.partition(":")[0].partition(",")[0] for each in found} >= {"again.kvh", "run.jsonl", "report.html"}


@pytest.mark.parametrize("name", ["plain", "with spaces", "o'clock", 'a "b"', "both ' and \"", "back\\slash'"])
def test_a_path_is_cut_out_whatever_its_name_has_in_it(name: str):
    error = FileNotFoundError(2, "No such file", f"/srv/alice/{name}/alice.txt")
    assert re.fullmatch(r"\[Errno 2\] No such file: (['\"])\(path\)\1", without_paths(str(error)))


@pytest.mark.usefixtures("fresh")
def test_the_environment_makes_every_recording_anonymous(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVHOOK_ANONYMOUS", "1")
    assert kvhook.install().options.anonymous
    kvhook.uninstall()
    assert for_logger().options.anonymous
    kvhook.uninstall()
    monkeypatch.setenv("KVHOOK_ANONYMOUS", "0")
    assert not kvhook.install().options.anonymous


def test_kvhook_run_hands_it_on(tmp_path: Path):
    code = "import os; print(os.environ['KVHOOK_ANONYMOUS'], os.environ['KVHOOK_TRACE'])"
    run = [sys.executable, "-m", "kvhook", "run", "--anonymous", "--quiet", "--", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120)
    on, trace = done.stdout.rstrip("\n").split(" ", 1)
    assert on == "1"
    assert Path(trace).name.split("-")[0] == "kvhook"
    assert "python" not in Path(trace).name


def test_adapters_are_numbered_and_labels_that_the_program_chose_stay():
    book = Notebook(lambda: None, nameless=True)
    with kvhook.label("batch"):
        assert book.label_request(0, "1", "customer-a") == (0, 0)
        assert book.label_request(0, "2", "customer-b") == (0, 1)
        assert book.label_request(0, "3", "customer-a") == (0, 0)
    assert book.detail("lora_added", "customer-b") == "adapter-1"
    assert book.detail("weights", "from /home/alice/new, level 1") == "from (path), level 1"
    named = {event[3] for event in book.take() if event[0] == "name"}
    assert named == {"batch", "adapter-0", "adapter-1"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/alice/model is gone", "(path)"),
        ("OSError: [Errno 2] no such file: '/data/alice/run.kvh'", "OSError: [Errno 2] no such file: '(path)'"),
        ("~/models/llama and ~alice/x", "(path)"),
        ("see ~alice", "see (path)"),
        ("'/alice-model' and '/srv//alice' are gone", "'(path)' and '(path)' are gone"),
        ("gcc -I/home/alice/include", "gcc -I(path)"),
        ("path=/srv/run=1/alice, alice's", "path=(path)"),
        *((f"no /srv/a{odd}b/alice/x", "no (path)") for odd in " :,%#([{&*"),
        ("from //home/alice//x, level 2", "from (path), level 2"),
        ("hits/queries, 1/2, n/a, and/or", "hits/queries, 1/2, n/a, and/or"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_paths_are_cut_out_of_texts(text: str, left: str):
    assert without_paths(text) == left


def test_classes_of_the_user_are_not_named(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    class AliceExecutor: ...

    class AliceError(Exception): ...

    with fake_vllm() as vllm:
        session = kvhook.install(trace=fresh / "run.kvh", anonymous=True)
        engine = vllm.engine()
        engine.vllm_config.parallel_config = types.SimpleNamespace(
            distributed_executor_backend=AliceExecutor, tensor_parallel_size=1
        )
        alice = type("AliceEngine", (type(engine),), {})(engine.vllm_config, object, log_stats=False)
        alice.plan.append(step_stats(kv_cache_usage=0.5, generated=1))
        alice.step()
        session.fault("a test", RuntimeError("models/alice, alice@example.com"), "nothing")
        facts = session.meta["engines"][-1]
        assert (facts["engine_class"], facts["executor"]) == ("LLMEngine", "(class)")
        assert session.meta["faults"] == {"a test": "RuntimeError"}
        session.dump(fresh / "run.jsonl")
    kvhook.uninstall()
    assert leaks([fresh], text_patterns("alice")) == []


@pytest.mark.parametrize(
    ("value", "left"),
    [
        *((known, known) for known in ("uni", "mp", "ray", "external_launcher", None)),
        ("<class 'vllm.v1.executor.ray.RayExecutor'>", "<class 'vllm.v1.executor.ray.RayExecutor'>"),
        ("vllm.v1.executor.Executor", "vllm.v1.executor.Executor"),
        ("<class '__main__.AliceExecutor'>", "(class)"),
        ("alice.Executor", "(class)"),
    ],
)
def test_a_fact_that_names_a_class_names_only_those_of_vllm(value: str | None, left: str | None):
    for name in ("executor", "scheduler_class"):
        assert without_names({"anonymous": True, name: value})[name] == left


def test_what_an_engine_core_failed_with_is_said_by_its_kind():
    facts = without_names({"anonymous": True, "failed": "OSError: [Errno 2] No such file: 'alice.txt'"})
    assert facts["failed"] == "OSError"
    assert without_names({"failed": "OSError: alice"})["failed"] == "OSError: alice"
