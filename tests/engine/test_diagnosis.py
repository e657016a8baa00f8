"""A diagnosis of real engines: those that are made to suffer are told what from, and healthy ones are left in peace.

There are two healthy engines; `KVHOOK_SEEDS=8` makes eight more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests.engine.conftest import MakeLLM
from tests.engine.diseases import Case, diseases, healthy

CASES = diseases()
SEEDS = 2 + min(int(os.environ.get("KVHOOK_SEEDS", "0")), 98)


def diagnosed(make_llm: MakeLLM, case: Case, trace: Path) -> tuple[set[str], str]:
    """The names of what is found, and the summary as it is printed."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    kvhook.uninstall()
    with kvhook.install(trace=trace) as session:
        llm = make_llm(**case.options)
        for prompts, sampling in case.calls:
            each: Any = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
            llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [
                    SamplingParams(temperature=0.0, **one) if "temperature" not in one else SamplingParams(**one)
                    for one in each
                ],
                use_tqdm=False,
            )
        assert session.faults == {}
        assert session.cores().why_none == ""
    summary = kvhook.open(trace).summary()
    return {finding.name for finding in summary.findings}, str(summary)


@pytest.mark.parametrize("name", CASES)
def test_a_disease_that_was_brought_about_is_found(name: str, make_llm: MakeLLM, tmp_path: Path):
    case = CASES[name]
    found, shown = diagnosed(make_llm, case, tmp_path / "run.kvh")
    assert case.found <= found, shown
    assert found <= case.found | case.beside, shown


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_healthy_engine_has_no_finding(seed: int, make_llm: MakeLLM, tmp_path: Path):
    found, shown = diagnosed(make_llm, healthy(seed), tmp_path / "run.kvh")
    assert found == set(), shown
