"""lm-evaluation-harness with its vLLM backend, under ``kvhook run``."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests.frameworks.conftest import Run
from tests.recipes import FRAMEWORKS, recipe

pytest.importorskip("lm_eval")

GENERATED = 12
RIDDLES = [{"question": f"What has {n} keys and opens no door?", "answer": "A piano"} for n in range(5)]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "riddles": f"""
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{{{max_gen_toks: {GENERATED}, until: ["no such text"], do_sample: false}}}}
metric_list: [{{{{metric: exact_match}}}}]
""",
    "choices": """
output_type: multiple_choice
doc_to_choice: ["A piano", "A harp", "A map"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
""",
}


@pytest.fixture
def samples(project: Path, run: Run) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval wrote down of each task."""
    tasks = project / "tasks"
    tasks.mkdir()
    data = tasks / "riddles.jsonl"
    data.write_text("".join(f"{json.dumps(riddle)}\n" for riddle in RIDDLES))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n" + (COMMON + text).format(data=data))
    command = shlex.split(recipe("lm-evaluation-harness", FRAMEWORKS, "sh"))
    command[command.index("hellaswag")] = ",".join(TASKS)
    said = run([*command, "--include_path", str(tasks)])
    assert "recorded in eval.kvh" in said
    found = {}
    for name in TASKS:
        (path,) = (project / "results").rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_every_request_of_a_task_is_there_with_its_tokens(
    project: Path, samples: dict[str, list[dict[str, Any]]], tiny: str
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    asked: list[str] = []
    for name in TASKS:
        for sample in samples[name]:
            for arguments in sample["arguments"].values():
                continuation = arguments["arg_1"] if name == "choices" else ""
                asked.append(arguments["arg_0"] + continuation)
    assert len(asked) == len(RIDDLES) * (1 + 3)
    requests = kvhook.open(project / "eval.kvh").requests()
    lengths = Counter(len(tokenizer(text)["input_ids"]) for text in asked)
    assert Counter(requests["num_prompt_tokens"].tolist()) == lengths
    # a choice costs one token
    told = Counter(requests["num_generation_tokens"].tolist())
    assert told[1] >= 3 * len(RIDDLES)
    assert max(told) <= GENERATED
