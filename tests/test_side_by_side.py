"""Several runs in one call, also of different vLLM versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvhook
from kvhook.cli import main
from tests.standin import fake_vllm, step_stats


def record(path: Path, release: str, tokens: list[int]) -> Path:
    """A trace of one step per number, as this release would give it."""
    kvhook.uninstall()
    with fake_vllm(release) as vllm, kvhook.install(ring_dir=path.parent / "rings", trace=path):
        engine = vllm.engine()
        engine.plan += [step_stats(generated=n) for n in tokens]
        for _ in tokens:
            engine.step()
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same work on 0.32.0, and on 0.11.1, which does not split prompt tokens by where they came from."""
    folder = tmp_path_factory.mktemp("runs")
    return record(folder / "new.kvh", "0.32.0", [3, 4, 5]), record(folder / "old.kvh", "0.11.1", [10, 20])


def test_the_engines_of_all_files_are_told_apart(runs: tuple[Path, Path]):
    both = kvhook.open(*runs)
    assert [(e["engine"], e["vllm"]) for e in both.meta["engines"]] == [(0, "0.32.0"), (1, "0.11.1")]
    assert [e["trace"] for e in both.meta["engines"]] == [str(p) for p in runs]
    steps = both.steps()
    assert steps["engine"].tolist() == [0, 0, 0, 1, 1]
    assert steps["num_generation_tokens"].tolist() == [3, 4, 5, 10, 20]


def test_one_engine_of_many_is_what_its_own_file_says(runs: tuple[Path, Path]):
    both = kvhook.open(*runs)
    for engine, path in enumerate(runs):
        alone, beside = kvhook.open(path).steps(), both.steps(engine)
        for name in alone.dtype.names or ():
            if name != "engine":
                np.testing.assert_array_equal(alone[name], beside[name], err_msg=name)


def test_a_column_that_one_of_them_lacks_is_there_and_is_absent_only_where_all_lack_it(runs: tuple[Path, Path]):
    new, old, both = kvhook.open(runs[0]), kvhook.open(runs[1]), kvhook.open(*runs)
    only_new = set(new.steps().dtype.names or ()) - set(old.steps().dtype.names or ())
    assert "num_prompt_tokens_computed" in only_new
    assert only_new <= set(both.steps().dtype.names or ())
    assert "num_prompt_tokens_computed" not in both.meta["absent"]


def test_nothing_is_counted_as_lost(runs: tuple[Path, Path]):
    meta = kvhook.open(*runs).meta
    assert (meta["records_lost"], meta["records_dropped"], meta["damaged"]) == (0, 0, 0)


def test_the_summary_of_several_files_has_a_column_each(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    assert main(["summary", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["new", "old"]
    cells = {line[:28].strip(): line[28:].split() for line in lines[1:]}
    assert cells["vLLM"] == ["0.32.0", "0.11.1"]
    assert cells["generated tokens"] == ["12", "30"]
    assert cells["prompt tokens computed"] == ["0", "-"]


def test_what_was_put_side_by_side_can_be_dumped(runs: tuple[Path, Path], tmp_path: Path):
    kvhook.open(*runs).dump(tmp_path / "both.csv")
    assert (tmp_path / "both.csv").read_text().count("\n") == 1 + 5
