"""Requests as JSON lines: what is written is what the readers of this form document, and is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.errors import ExportError, KvhookError, TraceFormatError
from kvhook.export.mooncake import write
from kvhook.whatif.mooncake import read
from kvhook.whatif.requests import make_requests
from tests.whatif.mooncake_like import WORKLOADS, rows
from tests.whatif.workloads import Sent


def written(tmp_path: Path, requests: Any, name: str = "requests.jsonl") -> list[dict[str, Any]]:
    write(requests, tmp_path / name)
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_each_request_has_a_number_for_every_block_and_one_for_the_rest(tmp_path: Path):
    sent = Sent(7, 50, 4)
    rows = written(tmp_path, sent.requests(t_ns=[5_000_000_000 + i * 2_500_000 for i in range(50)]))
    assert [row["input_length"] for row in rows] == [len(p) for p in sent.prompts]
    assert [row["output_length"] for row in rows] == [len(o) for o in sent.outputs]
    assert [row["timestamp"] for row in rows] == [i * 5 // 2 for i in range(50)]
    for row in rows:
        # AIPerf: the last block holds what the others leave of the prompt, at least one token and no more than a block
        last = row["input_length"] - (len(row["hash_ids"]) - 1) * 4
        assert 1 <= last <= 4
        assert all(type(number) is int and number >= 0 for number in row["hash_ids"])


def test_equal_numbers_are_equal_beginnings(tmp_path: Path):
    sent = Sent(8, 60, 4)
    rows = written(tmp_path, sent.requests())
    content: dict[int, tuple[int, ...]] = {}
    for row, prompt in zip(rows, sent.prompts, strict=True):
        for place, number in enumerate(row["hash_ids"]):
            beginning = tuple(prompt[: 4 * (place + 1)])
            assert content.setdefault(number, beginning) == beginning
    whole = [beginning for beginning in content.values() if len(beginning) % 4 == 0]
    assert len(set(whole)) == len(whole)


def test_it_is_read_again_as_it_was(tmp_path: Path):
    sent = Sent(9, 60, 16, longest=200)
    requests = sent.requests(t_ns=[i * 1_000_000 for i in range(60)])
    written(tmp_path, requests)
    trace = kvhook.open(tmp_path / "requests.jsonl")
    again = trace.block_requests()
    assert again.block_size == 16
    assert again.num_prompt_tokens.tolist() == requests.num_prompt_tokens.tolist()
    assert again.t_ns.tolist() == requests.t_ns.tolist()
    prompts = [requests.num_prompt_tokens[i] // 16 for i in range(60)]
    cut = make_requests(
        16, [requests.ids[requests.offsets[i] :][: prompts[i]] for i in range(60)], requests.num_prompt_tokens
    )
    assert [trace.what_if(blocks=[n]).sizes[0].hit_tokens for n in (20, 60)] == [
        s.hit_tokens for s in _plain(cut, (20, 60))
    ]
    assert len(trace.steps()) == 0


def _plain(requests: Any, blocks: tuple[int, ...]) -> Any:
    from kvhook.whatif.report import Run, what_if

    return what_if(requests, Run(), blocks=blocks).sizes


def test_the_example_of_the_format_is_read(tmp_path: Path):
    file = tmp_path / "example.jsonl"
    file.write_text(
        '{"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [46, 47]}\n'
        '{"timestamp": 10535, "input_length": 672, "output_length": 26, "hash_ids": [46, 47]}\n'
        '{"timestamp": 27482, "input_length": 655, "output_length": 52, "hash_ids": [46, 47]}\n'
    )
    requests = read(file)
    assert requests.block_size == 512
    found = kvhook.open(file).what_if(blocks=[1])
    assert (found.sizes[0].hit_tokens, found.sizes[0].query_tokens) == (1024, 1982)
    assert not found.sizes[0].exact


def test_other_names_of_the_fields_are_known(tmp_path: Path):
    file = tmp_path / "example.jsonl"
    file.write_text('{"created_time": 5, "input_tokens": 40, "output_tokens": 2, "hash_ids": [1, 2, 3]}\n')
    requests = read(file, block_size=16)
    assert (requests.t_ns[0], requests.num_prompt_tokens[0], requests.num_generation_tokens[0]) == (5_000_000, 40, 2)


def test_numbers_that_stand_for_a_block_alone_are_told_apart_by_what_is_before_them(tmp_path: Path):
    file = tmp_path / "example.jsonl"
    rows = [[1, 2], [3, 2], [1, 2]]
    file.write_text("".join(json.dumps({"input_length": 33, "hash_ids": [*row, 99]}) + "\n" for row in rows))
    found = kvhook.open(file).what_if(blocks=[100]).sizes[0]
    assert found.hit_tokens == 32


@pytest.mark.parametrize(
    "text",
    [
        '{"input_length": 40, "hash_ids": "no"}\n',
        '{"input_length": 40, "hash_ids": [1, 2]}\n{"input_length": 4000, "hash_ids": [1, 2]}\n',
        '{"input_length": 40, "hash_ids": [1, 2]}\nnonsense\n',
    ],
)
def test_what_is_none_is_refused_with_the_reason(tmp_path: Path, text: str):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(TraceFormatError, match=r"bad\.jsonl"):
        kvhook.open(file)


def test_other_json_lines_are_no_requests(tmp_path: Path):
    file = tmp_path / "steps.jsonl"
    file.write_text('{"kind": "meta"}\n')
    with pytest.raises(KvhookError):
        kvhook.open(file)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path):
    requests = Sent(1, 5, 4).requests()
    written(tmp_path, requests)
    with pytest.raises(ExportError, match="exists"):
        write(requests, tmp_path / "requests.jsonl")
    write(requests, tmp_path / "requests.jsonl", overwrite=True)


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_a_trace_as_published_is_read_and_shares_as_much_as_its_paper_says(tmp_path: Path, name: str):
    workload, file = WORKLOADS[name], tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
    requests = read(file)
    assert (len(requests), requests.block_size) == (workload.requests, 512)
    assert requests.num_prompt_tokens.mean() == pytest.approx(workload.input_length, rel=0.03)
    assert requests.num_generation_tokens.mean() == pytest.approx(workload.output_length, rel=0.03)
    found = kvhook.open(file).what_if(blocks=[1000, 10**7])
    sizes = [size.hit_tokens for size in found.sizes]
    assert 0 < sizes[0] < sizes[1] == found.ceiling_hit_tokens
    assert found.ceiling_hit_tokens / found.query_tokens == pytest.approx(workload.found, abs=0.03)


def test_what_is_known_of_single_requests_is_written_and_read_again(tmp_path: Path):
    sent = Sent(3, 4, 4)
    names = {"session": ["one"] * 4, "label": ["agent", None, "agent", "user"]}
    lines = written(tmp_path, sent.requests(names=names))
    assert [line.get("label") for line in lines] == names["label"]
    assert {line["session"] for line in lines} == {"one"}
    assert read(tmp_path / "requests.jsonl").names == names
