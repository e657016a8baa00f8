"""Ray actors that each make an engine, recorded through variables alone: a trace each, and one account of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvhook
from tests.frameworks.conftest import Run
from tests.recipes import FRAMEWORKS, recipe

pytest.importorskip("ray")


def test_each_actor_has_a_trace_and_together_they_are_what_was_returned(project: Path, run_program: Run, run: Run):
    answers = run_program(recipe("Ray", FRAMEWORKS), "answers")
    paths = sorted(path for path in (project / "traces").glob("*.kvh") if ".core" not in path.name)
    assert len(paths) == len(answers) == 2
    each = sorted(sorted(kvhook.open(path).requests()["num_generation_tokens"].tolist()) for path in paths)
    assert each == sorted(sorted(generated for _, generated in actor) for actor in answers)
    trace = kvhook.open(*paths)
    assert trace.meta["records_lost"] == 0
    steps = trace.steps()
    assert steps["num_prompt_tokens"].sum() == sum(prompt for actor in answers for prompt, _ in actor)
    assert set(steps["engine"].tolist()) == {0, 1}
    summary = trace.summary()
    assert summary.num_finished_reqs == sum(map(len, answers))
    run(["kvhook", "report", *map(str, paths), "-o", "fleet.html"])
    page = (project / "fleet.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") or "<html" in page[:200]
