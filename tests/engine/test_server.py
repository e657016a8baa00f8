"""vLLM's OpenAI server under ``kvhook run``, and the openai package as its client: one complete account of it.

The long form, with 50 clients, readers that are killed and a server without kvhook beside it, is
`benchmarks/server_load.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, NamedTuple

import pytest

import kvhook
from benchmarks.serving import LEFT_TOKENS, Answer, Server, ask, client_of, server
from tests.engine import vllm_here

pytestmark = pytest.mark.skipif(not vllm_here.since(0, 22), reason="the options of the server are those of 0.22")

LEFT_AFTER = 3
#: So many requests are sent at most.
MOST_ANSWERS = 40


class Served(NamedTuple):
    """What clients, /metrics and the trace say."""

    answers: list[Answer]
    generated: float
    prompts: float
    finished: dict[str, float]
    left_alive: bool
    code: int
    log: str
    trace: Any


@pytest.fixture(scope="module")
def served(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("server")
    rings = folder / "rings"
    options = ["--trace", "run.kvh"]
    with server(model, folder, options, VLLM_ENABLE_V1_MULTIPROCESSING="1", KVHOOK_DIR=str(rings)) as this:
        answers = asyncio.run(conversation(this))
        for ring in rings.iterdir():
            ring.unlink()  # whoever cleans up does not disturb the server
        answers += asyncio.run(conversation(this))
        # where the machine is busy vLLM may see too late that a client has gone, and finish its request
        while (done := finished(this, len(answers)))["length"] >= len(answers):
            assert len(answers) < MOST_ANSWERS, "vLLM aborted no request of a client that had gone"
            answers += asyncio.run(leave(this))
        generated, prompts = this.total("vllm:generation_tokens_total"), this.total("vllm:prompt_tokens_total")
        alive = this.process.poll() is None
        code = this.stop()
    log = this.log.read_text(errors="replace")
    return Served(answers, generated, prompts, done, alive, code, log, kvhook.open(folder / "run.kvh"))


def finished(this: Server, requests: int) -> dict[str, float]:
    """What vLLM says, once so many requests have ended: how many finished, by reason. It does not count aborted ones.

    The engine core's file knows when all have ended. vLLM may kill a core that takes long to end, and without its ring
    what is not yet in the file is gone: so it has to be there before the server is told to end."""
    give_up = time.monotonic() + 60
    trace = this.log.with_name("run.kvh")
    while len(kvhook.open(trace).cores().requests()) < requests:
        assert time.monotonic() < give_up, "the engine core's file does not grow"
        time.sleep(0.05)
    found = {
        name.partition('finished_reason="')[2].partition('"')[0]: value
        for name, value in this.metrics().items()
        if name.startswith("vllm:request_success_total{")
    }
    return {reason: value for reason, value in found.items() if value}


async def conversation(this: Server) -> list[Answer]:
    """Eight clients at the same time, half of them streaming, and one that goes away."""
    async with client_of(this) as client:
        asked = [ask(client, f"Where is book {n}?", 10 + n, stream=n % 2 == 0) for n in range(8)]
        left = ask(client, "Tell me everything", LEFT_TOKENS, leave_after=LEFT_AFTER)
        return list(await asyncio.gather(*asked, left))


async def leave(this: Server) -> list[Answer]:
    """One client that goes away, alone."""
    async with client_of(this) as client:
        return [await ask(client, "Tell me everything", LEFT_TOKENS, leave_after=LEFT_AFTER)]


def test_tokens_are_those_that_clients_were_given_and_those_of_vllm_s_counters(served: Served):
    steps = served.trace.steps()
    whole = [answer for answer in served.answers if not answer.left]
    assert steps["num_generation_tokens"].sum() == served.generated
    assert steps["num_prompt_tokens"].sum() == served.prompts
    requests = served.trace.requests()
    ended = requests[requests["finish_reason"] == "length"]
    of_answers = Counter(answer.generated for answer in whole) + Counter({LEFT_TOKENS: finished_although_left(served)})
    assert Counter(ended["num_generation_tokens"].tolist()) == of_answers
    of_those_left = ended["num_generation_tokens"] == LEFT_TOKENS
    assert Counter(ended["num_prompt_tokens"][~of_those_left].tolist()) == Counter(answer.prompt for answer in whole)


def finished_although_left(served: Served) -> int:
    """How many requests of clients that had gone vLLM finished all the same, as vLLM counts."""
    return int(served.finished["length"]) - sum(not answer.left for answer in served.answers)


def test_requests_that_were_left_are_counted_as_aborted(served: Served):
    reasons = Counter(served.trace.requests()["finish_reason"].tolist())
    aborted = sum(answer.left for answer in served.answers) - finished_although_left(served)
    assert aborted > 0
    assert reasons == {"length": served.finished["length"], "abort": aborted}
    summary = served.trace.summary()
    assert (summary.num_finished_reqs, summary.num_aborted_reqs) == (len(served.answers), aborted)


def test_every_iteration_of_the_engine_is_there_with_its_times(served: Served):
    core = served.trace.cores().steps()
    assert (core["t_schedule_ns"] <= core["t_scheduled_ns"]).all()
    ran = core[core["t_update_ns"] > 0]
    assert (ran["t_scheduled_ns"] <= ran["t_update_ns"]).all()
    assert (ran["t_update_ns"] <= ran["t_end_ns"]).all()
    assert core["step"].tolist() == list(range(len(core)))
    assert ran["num_scheduled_tokens"].sum() >= served.prompts
    assert len(served.trace.steps()) <= len(core)


def test_nothing_is_lost_although_the_rings_were_removed(served: Served):
    assert served.left_alive
    assert served.trace.meta["records_lost"] == 0
    assert served.trace.cores().lost == 0
    assert all(account.ok for account in served.trace.summary().accounts)


def test_the_server_ends_as_it_does_without_kvhook_and_the_summary_follows(served: Served):
    assert served.code == 0
    assert "kvhook summary run.kvh" in served.log
