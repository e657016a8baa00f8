"""Prompts with several samples: what a table and a summary tell of each, against a sum by hand."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import kvhook
from kvhook.analysis.prompt_groups import GroupsOfPrompts
from tests.ring.synthetic import Recording


def recorded(folder: Path, seed: int) -> tuple[Path, dict[int, list[tuple[int, int]]]]:
    """Prompts with one to four samples in a random order; prompt -> (prompt tokens, cached tokens) of its samples."""
    rng = random.Random(seed)
    recording = Recording(folder)
    samples = [(p, s, n) for p in range(30) for n in [rng.choice([1, 1, 2, 4])] for s in range(n)]
    rng.shuffle(samples)
    expected: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for prompt, sample, of in samples:
        length = 40 + prompt
        cached = rng.choice([-1, 0, 16, 32])
        recording.finish(
            7, prompt_number=prompt, sample_index=sample if of > 1 else rng.choice([-1, 0]), num_prompt_tokens=length,
            num_cached_tokens=cached, num_generation_tokens=3,
        )  # fmt: skip
        recording.step()
        if of > 1:
            expected[prompt].append((length, cached))
    return recording.path, expected


@pytest.mark.parametrize("seed", [1, 2])
def test_each_prompt_has_the_sums_of_its_samples(tmp_path: Path, seed: int):
    path, expected = recorded(tmp_path / "rings", seed)
    trace = kvhook.open(path)
    table = trace.prompt_groups()
    assert table["prompt_number"].tolist() == sorted(expected)
    for row in table:
        samples = expected[int(row["prompt_number"])]
        known = [(length, cached) for length, cached in samples if cached >= 0]
        assert row["num_samples"] == len(samples)
        assert row["num_prompt_tokens"] == sum(length for length, _ in samples)
        assert row["num_generation_tokens"] == 3 * len(samples)
        assert row["num_cached_tokens"] == (sum(c for _, c in known) if known else -1)
        rate = sum(c for _, c in known) / sum(n for n, _ in known) if known else np.nan
        np.testing.assert_allclose(row["hit_rate"], rate)
    found = trace.summary().by_prompt
    rates = table["hit_rate"][~np.isnan(table["hit_rate"])]
    assert found is not None
    assert (found.prompts, found.samples) == (len(expected), sum(map(len, expected.values())))
    assert found.hit_rate_median == pytest.approx(float(np.median(rates)))
    assert len(found.most) == min(20, len(expected))
    assert f"{found.prompts} prompts with {found.samples} samples: hit rate" in str(trace.summary())
    json.dumps(trace.summary().as_dict())


def test_engines_have_prompts_of_their_own(tmp_path: Path):
    paths = [recorded(tmp_path / f"rings{i}", i)[0] for i in range(2)]
    both = kvhook.open(*paths)
    alone = [kvhook.open(path).prompt_groups() for path in paths]
    assert len(both.prompt_groups()) == len(alone[0]) + len(alone[1])
    by_prompt = both.summary().by_prompt
    assert by_prompt is not None
    assert by_prompt.samples == sum(int(one["num_samples"].sum()) for one in alone)


def test_a_run_without_samples_tells_nothing_of_them(tmp_path: Path):
    recording = Recording(tmp_path / "rings")
    recording.finish(1, prompt_number=0, sample_index=-1, num_prompt_tokens=9)
    recording.step()
    trace = kvhook.open(recording.path)
    assert len(trace.prompt_groups()) == 0
    assert trace.summary().by_prompt is None


def test_the_oldest_prompts_are_forgotten_so_that_memory_is_bounded():
    groups = GroupsOfPrompts()
    groups.WINDOW = 10
    for number in range(25):
        one = np.array([number])
        for sample in (0, 1):
            groups.take(one, one * 0 + sample, one, one * 0, one)
    assert groups.table()["prompt_number"].tolist() == list(range(15, 25))
