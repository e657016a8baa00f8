"""No text, no token id and no request id of the user's is in any file that kvhook writes of a real engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvhook
from kvhook.cli import main
from tests.engine.conftest import MakeLLM
from tests.leaks import leaks, text_patterns, token_patterns

#: Token ids of a prompt that no file may hold in this order.
MARKER = random.Random(17).sample(range(100, 500), 40)
USER = "alice@example.com-4915112345678"
EXPORTS = ("run.jsonl", "run.csv", "run.parquet", "run.arrow", "run.perfetto.json.gz", "run.kvh")


class Private(NamedTuple):
    """What a run wrote, and what was in its prompts and outputs."""

    folder: Path
    session: kvhook.Session
    outputs: list[Any]
    model: str


@pytest.fixture(scope="module")
def private(make_llm: MakeLLM, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    """A secret in text and in token ids, a user's own request id, everything recorded, everything written."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    folder = tmp_path_factory.mktemp("private")
    kvhook.uninstall()
    session = kvhook.install(
        trace=folder / "run.kvh", ring_dir=folder / "rings", core="blocks", request_ids="hashed", anonymous=True
    )
    llm = make_llm()
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with session.scope("asked"):
        outputs = llm.generate([{"prompt_token_ids": MARKER * 3}, "xyzzyplugh is the password"], sampling)
    llm.llm_engine.add_request(USER, {"prompt_token_ids": MARKER}, sampling)
    while llm.llm_engine.has_unfinished_requests():
        outputs += [each for each in llm.llm_engine.step() if each.finished]
    out = folder / "out"
    out.mkdir()
    for name in EXPORTS:
        session.dump(out / name)
    assert main(["report", str(folder / "run.kvh"), "-o", str(out / "report.html")]) == 0
    assert main(["autopsy", str(session.rings[0])]) == 0
    yield Private(folder, session, outputs, model)
    kvhook.uninstall()


def test_all_of_it_was_recorded_and_written(private: Private):
    names = {path.suffix for path in private.folder.rglob("*")}
    assert {".kvh", ".ring", ".core", ".blocks", ".jsonl", ".csv", ".parquet", ".arrow", ".html", ".gz"} <= names
    assert len(private.outputs) == 3
    assert len(private.session.requests()) == 3
    assert len(private.session.blocks()) > 0


def test_no_prompt_and_no_output_is_in_any_file(private: Private):
    wanted = {f"prompt as tokens: {how}": each for how, each in token_patterns(MARKER[:6]).items()}
    wanted |= {f"prompt: {how}": each for how, each in text_patterns("xyzzyplugh").items()}
    for number, output in enumerate(private.outputs):
        (one,) = output.outputs
        ids = list(one.token_ids)
        assert len(ids) == 12
        if len(set(ids)) > 3:  # a run of one number would be found by chance
            wanted |= {f"output {number} as tokens: {how}": each for how, each in token_patterns(ids[:6]).items()}
        if len(one.text.strip()) > 5:
            wanted |= {f"output {number}: {how}": each for how, each in text_patterns(one.text).items()}
    assert any(name.startswith("output") for name in wanted)
    assert leaks([private.folder], wanted) == []


def test_a_user_s_request_id_is_a_digest_that_only_the_user_can_find(private: Private):
    assert leaks([private.folder], text_patterns(USER) | text_patterns("4915112345678")) == []
    session = private.session
    own = [session.request_key(name) >> 11 for name in ("0", "1", USER)]
    assert sorted(session.requests()["request_id"].tolist()) == sorted(own)
    assert sorted(session.core_requests()["request_id"].tolist()) == sorted(own)
    assert session.request_key(USER) in session.core_requests()["request_key"].tolist()


def test_the_path_of_the_model_is_in_no_file(private: Private):
    assert leaks([private.folder], text_patterns(private.model) | text_patterns(str(private.folder))) == []
