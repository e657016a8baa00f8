"""Conditions of ``--fail-if``: what they mean, and what is refused."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvhook
from kvhook.analysis.conditions import MOST_CHARACTERS, read_condition
from kvhook.analysis.numbers import NAMES, full_name, numbers_of
from kvhook.cli import main
from kvhook.errors import KvhookError
from tests.ring.synthetic import Recording

DATA = Path(__file__).parent / "data"
RUN = str(DATA / "engine-0.32.0-full.kvh")
LIGHT = str(DATA / "engine-0.32.0-light.kvh")


def holds(text: str, **numbers: float) -> bool:
    return read_condition(text).holds(lambda side, name: numbers[f"{side}_{name}" if side else name])


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("1 < 2", True),
        ("2 <= 1", False),
        ("1 + 2 * 3 == 7", True),
        ("(1 + 2) * 3 == 9", True),
        ("8 / 4 / 2 == 1", True),
        ("8 - 4 - 2 == 2", True),
        ("-2 < -1", True),
        ("- -1 == 1", True),
        ("80% == 0.8", True),
        ("50ms == 0.05", True),
        ("20us < 1ms", True),
        ("1.5e3 == 1500", True),
        (".5 == 1/2", True),
        ("1 < 2 and 2 < 1", False),
        ("1 < 2 or 2 < 1", True),
        ("not 1 < 2", False),
        ("not (1 < 2 and 2 < 1)", True),
        # `and` binds more closely than `or`
        ("1 < 2 or 1 < 2 and 2 < 1", True),
        ("(1 < 2 or 1 < 2) and 2 < 1", False),
        ("((1)) != (((2)))", True),
        ("(1) < 2 and ((2) > (1))", True),
    ],
)
def test_a_condition_means_what_arithmetic_means(text: str, true: bool):
    assert holds(text) is true


def test_names_stand_for_numbers_of_sides():
    assert holds("B.itl_p99 > 1.1 * A.itl_p99", B_inter_token_latency_p99=0.12, A_inter_token_latency_p99=0.1)
    assert not holds("B.itl_p99 > 1.1 * A.itl_p99", B_inter_token_latency_p99=0.10, A_inter_token_latency_p99=0.1)
    assert read_condition("steps > 3 and B.steps > A.steps and steps < 9").names == (
        ("", "steps"),
        ("B", "steps"),
        ("A", "steps"),
    )


def test_what_decides_nothing_is_not_asked():
    asked = []

    def look(side: str, name: str) -> float:
        asked.append(name)
        return 1.0

    assert read_condition("steps > 0 or num_prompt_tokens > 0").holds(look)
    assert asked == ["steps"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__",
        "steps.__class__ > 1",
        "A.B.steps > 1",
        "open('/etc/passwd')",
        "steps > 1; steps > 2",
        "steps > 1 # no",
        "lambda: 1",
        "steps[0] > 1",
        "{steps} > {1}",
        "steps ** 99 ** 99 > 1",
        "9 ** 9 > 1",
        "steps := 1",
        "steps if 1 else 2",
        "1 < steps < 2",
        "steps > 0x10",
        "steps > 1_000",
        "steps > 1e999",
        "steps > 12parsecs",
        "steps > '1'",
        "steps > `id`",
        "steps > $(id)",
        "steps > \x00",
        "steps > 1\x1b[2J",
        "steps > ١",
        "ѕteps > 1",
        "steps",
        "",
        "   ",
        "steps >",
        "> 1",
        "(steps > 1",
        "steps > 1)",
        "steps > 1 and",
        "not",
        "and > 1",
        "nonsense > 1",
        "prefix_cache_hitrate < 0.8",
        "(" * 400 + "1" + ")" * 400 + " > 0",
        "not " * 200 + "1 > 0",
        "-" * 400 + "1 > 0",
        "1 > 0" + " or 1 > 0" * 1000,
    ],
)
def test_what_is_no_condition_is_refused_and_the_error_says_what_is_allowed(text: str):
    with pytest.raises(KvhookError) as refused:
        read_condition(text)
    said = str(refused.value)
    assert "is not a condition" in said
    assert "a condition may hold numbers" in said
    assert said.isprintable()
    assert len(said) < 700


def test_a_long_condition_that_is_allowed_is_reckoned():
    text = "+".join(["1"] * (MOST_CHARACTERS // 2 - 5))
    assert holds(f"{text} == {text.count('1')}")


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_no_text_does_anything_but_be_read_or_refused(text: str):
    with contextlib.suppress(KvhookError):
        read_condition(text)


def test_random_arithmetic_is_what_python_makes_of_it():
    rng = random.Random(7)

    def number(depth: int) -> str:
        if not depth:
            return str(rng.randrange(1, 9))
        left, right = number(depth - 1), number(rng.randrange(depth))
        return rng.choice(
            [f"{left} {rng.choice('+-*')} {right}", f"({left} {rng.choice('+-*/')} {right} )", f"-{left}"]
        )

    for _ in range(300):
        text = f"{number(rng.randrange(5))} {rng.choice(['<', '<=', '>', '>=', '==', '!='])} {number(3)}"
        try:
            expected = eval(text)
        except ZeroDivisionError:
            with pytest.raises(KvhookError, match="divided by 0"):
                holds(text)
            continue
        assert holds(text) is expected, text


def test_every_number_of_the_summary_has_a_name():
    summary = kvhook.open(RUN).summary()
    numbers = numbers_of(summary)
    plain = summary.as_dict()
    assert set(numbers) == set(NAMES)
    for name, value in plain.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert numbers[name] == value, name
        elif isinstance(value, dict) and "p99" in value:
            for part, number in value.items():
                assert numbers[f"{name}_{part}"] == number
    assert full_name("ttft_p99") == "time_to_first_token_p99"
    assert numbers["core_num_evicted_blocks"] is None  # nothing was recorded in the core


# The command line


@pytest.mark.parametrize("verb", ["summary", "compare"])
def test_the_exit_code_is_3_where_a_condition_holds(verb: str, capsys: pytest.CaptureFixture[str]):
    files = [RUN] if verb == "summary" else [RUN, LIGHT]
    assert main([verb, *files, "--fail-if", "prefix_cache_hit_rate < 80%"]) == 3
    said = capsys.readouterr()
    assert "prefix_cache_hit_rate < 80%: true" in said.err
    assert "prefix_cache_hit_rate is 0.39801" in said.err
    assert said.out
    assert main([verb, *files, "--fail-if", "prefix_cache_hit_rate < 10%"]) == 0
    assert main([verb, *files, "--fail-if", "steps < 1", "--fail-if", "steps > 1"]) == 3


def test_a_number_that_is_not_known_is_a_mistake_and_not_a_pass(capsys: pytest.CaptureFixture[str]):
    assert main(["compare", RUN, LIGHT, "--fail-if", "B.itl_p99 > 1.1 * A.itl_p99"]) == 1
    assert "inter_token_latency_p99 of B is not known: this run is recorded at level light" in capsys.readouterr().err
    assert main(["summary", RUN, "--fail-if", "core_num_evicted_blocks > 0"]) == 1
    assert "nothing was recorded inside the engine core" in capsys.readouterr().err
    assert main(["summary", RUN, "--fail-if", "1 / num_drafts > 0"]) == 1
    assert main(["compare", RUN, LIGHT, "--fail-if", "C.steps > 1"]) == 1
    assert "there is no C; there are A, B" in capsys.readouterr().err


def test_a_name_without_a_side_stands_for_each_side(capsys: pytest.CaptureFixture[str]):
    a, b = kvhook.open(RUN).summary(), kvhook.open(LIGHT).summary()
    assert a.step_time.p50 < 0.05 < b.step_time.p50
    assert main(["compare", RUN, LIGHT, "--fail-if", "step_time_p50 > 50ms"]) == 3
    assert "B.step_time_p50 is" in capsys.readouterr().err
    assert main(["compare", RUN, LIGHT, "--fail-if", "A.step_time_p50 > 50ms"]) == 0
    assert main(["compare", RUN, LIGHT, "--fail-if", "B.step_time_p50 > 3 * A.step_time_p50"]) == 3


def test_of_repeats_the_mean_counts(tmp_path: Path):
    paths = [str(Recording(tmp_path / str(n)).run(n).path) for n in (10, 20, 30)]
    sides = [f"{paths[0]},{paths[1]}", paths[2]]
    assert main(["compare", *sides, "--fail-if", "A.steps == 15 and B.steps == 30"]) == 3


def test_wrong_conditions_are_wrong_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["summary", RUN, "--fail-if", "__import__('os')"])
    assert end.value.code == 2
    assert "a condition may hold numbers (also 80%" in capsys.readouterr().err
