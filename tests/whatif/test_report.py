"""What is told of a run: sizes, losses, advice, engines, and how it is printed."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from kvhook.cli import main
from kvhook.export.mooncake import write
from kvhook.text.whatif import as_text
from kvhook.text.whatif_plot import plot
from kvhook.whatif import distances, report
from kvhook.whatif.advice import findings
from kvhook.whatif.distances import lru_curve
from kvhook.whatif.fleet import fleet
from kvhook.whatif.replay import Rules, replay
from kvhook.whatif.report import Run, WhatIf, what_if
from kvhook.whatif.requests import BlockRequests, join, make_requests
from tests.whatif.workloads import Sent, lru

RULES = Rules(token_budget=64, max_num_seqs=4)


def recorded(blocks: int, *, seed: int = 4, waves: int = 6) -> tuple[BlockRequests, Run]:
    """Requests as they would have been recorded with so many blocks."""
    requests = Sent(seed, 90, 4, waves=waves).requests()
    was = replay(requests, blocks, RULES)
    run = Run(
        blocks=blocks,
        bytes_per_block=1 << 20,
        rules=RULES,
        prefill_tokens_per_second=1000.0,
        num_preemptions=was.num_preemptions,
        num_recomputed_tokens=was.num_recomputed_tokens,
        name="run.kvh",
    )
    return dataclasses.replace(requests, found=was.found), run


def test_the_run_itself_is_reproduced_and_sizes_are_told_in_blocks_tokens_and_bytes():
    requests, run = recorded(150)
    found = what_if(requests, run, blocks=[150, 300])
    assert found.reproduced
    here, twice = found.sizes
    assert here.hit_tokens == found.hit_tokens == int(requests.found.sum())
    assert here.query_tokens == int(requests.num_prompt_tokens.sum())
    assert (twice.tokens, twice.bytes) == (1200, 300 << 20)
    assert here.seconds_saved == 0
    assert twice.seconds_saved == pytest.approx(
        (twice.hit_tokens - here.hit_tokens + run.num_recomputed_tokens - (twice.num_recomputed_tokens or 0)) / 1000
    )
    assert here.exact == (here.num_preemptions == 0)


def test_a_run_that_is_not_reproduced_is_an_estimate():
    requests, run = recorded(150)
    wrong = requests.found.copy()
    wrong[5] += 4
    found = what_if(dataclasses.replace(requests, found=wrong), run, blocks=[300])
    assert found.reproduced is False
    assert not found.sizes[0].exact
    assert "1 of 90 requests find more or less than they did" in " ".join(found.why_estimated)


def test_what_is_lost_adds_up():
    requests, run = recorded(100, waves=1)
    found = what_if(requests, run)
    losses = found.losses
    assert found.endless_hit_tokens is not None
    assert found.hit_tokens is not None
    assert losses.evictions == found.endless_hit_tokens - found.hit_tokens
    assert losses.evictions is not None
    assert losses.evictions > 0
    assert losses.running_together == found.ceiling_hit_tokens - found.endless_hit_tokens
    assert found.hit_tokens <= found.endless_hit_tokens <= found.ceiling_hit_tokens < found.query_tokens


def test_without_sizes_some_are_chosen_from_the_longest_request_to_everything():
    requests, run = recorded(150)
    found = what_if(requests, run)
    sizes = [size.blocks for size in found.sizes]
    assert sizes == sorted(set(sizes))
    assert 150 in sizes
    assert sizes[0] == requests.longest
    assert found.sizes[-1].hit_tokens == found.endless_hit_tokens


def test_the_smallest_cache_that_is_large_enough():
    requests, run = recorded(60)
    found = what_if(requests, run)
    assert found.enough is not None
    assert found.endless_hit_tokens is not None
    wanted = 0.99 * found.endless_hit_tokens
    assert found.enough.hit_tokens >= wanted
    fewer = round(found.enough.blocks * 0.93)
    assert replay(requests, fewer, RULES).num_found_tokens < wanted


def test_a_small_cache_a_large_one_and_one_that_will_do():
    codes = {}
    for blocks in (60, 5000):
        told = what_if(*recorded(blocks))
        codes[blocks] = {finding.code: finding for finding in findings(told)}
    small = codes[60]["cache_too_small"]
    assert small.tokens > 0
    assert small.seconds == small.tokens / 1000
    assert "gpu_memory_utilization" in small.settings
    assert "cache_too_large" in codes[5000]
    enough = what_if(*recorded(60)).enough
    assert enough is not None
    fits = {finding.code for finding in findings(what_if(*recorded(enough.blocks)))}
    assert not fits & {"cache_too_small", "cache_too_large"}


def table(*, in_order: bool) -> BlockRequests:
    """Rows whose first columns hold few values: 6 x 5 different beginnings, sent together."""
    rng = random.Random(3)
    rows = [(rng.randrange(6), rng.randrange(5), number) for number in range(120)]
    rows = sorted(rows) if in_order else rows
    known: dict[tuple[object, ...], int] = {}
    chains = []
    for region, product, number in rows:
        path = [("r", region, i) for i in range(4)] + [("p", region, product, i) for i in range(4)] + [("n", number)]
        chains.append([known.setdefault(step, len(known)) for step in path])
    return make_requests(4, chains, [37] * 120, [2] * 120, wave=[0] * 120)


def test_the_longest_prefix_first_order_finds_what_sorted_rows_find():
    mixed, ordered = table(in_order=False), table(in_order=True)
    run = Run(blocks=60, rules=RULES)
    told = what_if(mixed, run, blocks=[60], reorder=True)
    best = what_if(ordered, run, blocks=[60]).sizes[0]
    assert told.sizes[0].hit_tokens < told.reordered[0].hit_tokens
    assert told.reordered[0].hit_tokens >= best.hit_tokens
    assert told.losses.order == told.reordered[0].hit_tokens - told.sizes[0].hit_tokens
    assert "order" in {finding.code for finding in findings(told)}
    assert sorted(mixed.reordered().num_prompt_tokens.tolist()) == sorted(mixed.num_prompt_tokens.tolist())


def test_requests_of_a_later_call_do_not_go_before_those_of_an_earlier_one():
    requests = Sent(2, 40, 4, waves=4).requests()
    ordered = requests.reordered()
    assert (ordered.wave[1:] >= ordered.wave[:-1]).all()
    across = requests.reordered(across=True)
    assert across.wave.max() == 0


def test_longer_blocks_find_what_lists_of_tokens_say():
    sent = Sent(3, 60, 4, waves=60)
    longer = sent.requests().with_block_size(8)
    eight = Sent(3, 60, 8, waves=60).requests()
    assert longer.num_blocks.tolist() == eight.num_blocks.tolist()
    for blocks in (30, 90):
        assert lru(longer, blocks) == lru(eight, blocks)
    told = what_if(sent.requests(), Run())
    assert told.longer_blocks[8] == round(lru_curve(eight).ceiling) * 8
    with pytest.raises(ValueError, match="multiples of 4"):
        longer.with_block_size(12) if longer.block_size == 4 else sent.requests().with_block_size(6)


def test_a_long_run_is_told_by_the_curve_alone(monkeypatch: pytest.MonkeyPatch):
    requests, run = recorded(150)
    monkeypatch.setattr(report, "REPLAY_UP_TO", 10)
    found = what_if(requests, run)
    assert all(not size.exact and size.num_preemptions is None for size in found.sizes)
    assert all(size.hit_tokens == size.lru_hit_tokens for size in found.sizes)
    asked = what_if(requests, run, blocks=[150]).sizes[0]
    assert asked.hit_tokens == found.hit_tokens


def test_a_sample_says_so(monkeypatch: pytest.MonkeyPatch):
    requests, run = recorded(150)
    monkeypatch.setattr(distances, "SAMPLE_FROM", 500)
    found = what_if(requests, run, blocks=[150]).sizes[0]
    assert found.lru_error > 0
    assert "% of the blocks were looked at" in " ".join(found.why_estimated)


def test_engines_that_know_nothing_of_each_other_find_less():
    requests = table(in_order=False)
    found = {(size.replicas, size.routing): size for size in fleet(requests, 60, [1, 4])}
    whole = round(lru_curve(requests).at(60)) * 4
    assert {found[1, name].hit_tokens for name in ("round robin", "least load", "prefix")} == {whole}
    assert found[4, "prefix"].hit_tokens > found[4, "round robin"].hit_tokens
    assert found[4, "prefix"].busiest < 1.6
    assert found[4, "round robin"].one_cache_hit_tokens == round(lru_curve(requests).at(240)) * 4
    parts = [sum(lru(requests.select(range(engine, 120, 4)), 60)) for engine in range(4)]
    assert found[4, "round robin"].hit_tokens == sum(parts) * 4


def test_runs_are_joined_by_the_clock_and_share_nothing():
    one, other = Sent(1, 20, 4).requests(), Sent(1, 20, 4).requests()
    both = join([(one, 0), (other, 5)])
    assert (both.t_ns[1:] >= both.t_ns[:-1]).all()
    assert lru_curve(both).ceiling == 2 * lru_curve(one).ceiling
    with pytest.raises(ValueError, match="different sizes"):
        join([(one, 0), (one.with_block_size(8), 0)])


def whole(requests: BlockRequests, run: Run) -> WhatIf:
    return what_if(requests, run, reorder=True, replicas=[1, 2])


def test_the_page_says_it_all_in_lines_of_a_terminal():
    text = as_text(whole(*recorded(100, waves=1)))
    for words in (
        "this run",
        "ceiling",
        "lost",
        "blocks",
        "plain LRU",
        "longest-prefix-first",
        "round robin",
        "advice",
    ):
        assert words in text
    table_lines = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert all(len(line) <= 100 for line in table_lines)


def test_the_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    plot(whole(*recorded(100)), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_reads_requests_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sent = Sent(5, 50, 16, longest=200)
    write(sent.requests(), tmp_path / "requests.jsonl")
    assert main(["whatif", str(tmp_path / "requests.jsonl"), "--blocks", "30,60", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [size["blocks"] for size in told["sizes"]] == [30, 60]
    assert all({"hit_tokens", "query_tokens", "exact"} <= size.keys() for size in told["sizes"])
    assert told["sizes"][0]["query_tokens"] == sum(map(len, sent.prompts))
    assert main(["whatif", str(tmp_path), "--replicas", "2"]) == 0
    assert "prefix" in capsys.readouterr().out
    assert main(["whatif", str(tmp_path / "requests.jsonl"), "--block-size", "24"]) == 1
    assert "does not go with blocks of 24 tokens" in capsys.readouterr().err


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["whatif", str(tmp_path / "nothing.kvh")]) == 1
    assert "cannot open" in capsys.readouterr().err
    assert main(["whatif", str(tmp_path)]) == 1
    assert "there is no trace" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["whatif", "run.kvh", "--blocks", "none"])
