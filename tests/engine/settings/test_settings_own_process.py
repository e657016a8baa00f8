"""Cases of the settings test with the engine core in a process of its own: against what came back.

Which steps the core makes of a workload is up to its process, so that sums are compared.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine.settings import cases, release
from tests.engine.settings.bench import leave_out
from tests.processes import Ended, ended

#: Chunked prefill and asynchronous scheduling: here stats come without outputs.
ENGINES = (1, 8)
#: With KVHOOK_SETTINGS_CASES: these too.
MORE = (3, 5, 11, 15, 18)
NUMBERS = ENGINES + (MORE if "KVHOOK_SETTINGS_CASES" in os.environ else ())
SEEDS = release.run(number * cases.PER_ENGINE + i for number in NUMBERS for i in range(cases.PER_ENGINE))


#: With asynchronous scheduling on a CPU an engine can wait for ever, with kvhook or without.
SECONDS = 200


class Engines:
    """Runs the cases of an engine in a process of its own, when the first of them is asked for."""

    def __init__(self, model: str, environment: dict[str, str], folder: Path) -> None:
        self.model, self.folder = model, folder
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        more = {"PYTHONPATH": path, "KVHOOK_DIR": str(folder / "rings"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.environment = environment | more
        #: number of an engine -> its results by seed, with what it fails in vLLM itself, or what is wrong
        self.done: dict[int, dict[int, Any] | str | AssertionError] = {}

    def result(self, seed: int) -> dict[str, Any]:
        number = seed // cases.PER_ENGINE
        if number not in self.done:
            self.done[number] = self._run(number)
        found = self.done[number]
        if isinstance(found, AssertionError):
            raise found
        if isinstance(found, str):
            leave_out(seed, found)
        result: dict[str, Any] = found[seed]
        return result

    def _run(self, number: int) -> dict[int, Any] | str | AssertionError:
        code, log = self._ended(number, {})
        if code == 0:
            return {one["seed"]: one for one in json.loads(self._results(number).read_text())}
        without, its_log = self._ended(number, {"KVHOOK_ALONE": "1"})
        # whether the front end sees that its core has died, or waits for it, is chance
        if without != 0 and cause(log) == cause(its_log):
            return cause(log)
        return AssertionError(f"exit code {code}:\n{log[-8000:]}\nwithout kvhook {without}:\n{its_log[-8000:]}")

    def _ended(self, number: int, more: dict[str, str]) -> Ended:
        script = Path(__file__).with_name("own_process.py")
        command: list[str | Path] = [sys.executable, script, self.model, self._results(number), str(number)]
        return ended(command, self.folder, self.environment | more, SECONDS)

    def _results(self, number: int) -> Path:
        return self.folder / f"engine-{number}.json"


def cause(log: str) -> str:
    """The exception that a log is about: the first that a core or a worker logged, else the last that was printed."""
    exception = r"([\w.]*(?:Error|Exception): .*)"
    logged = re.findall(r"ERROR .*\] " + exception, log)
    return str(logged[0] if logged else [*re.findall(exception, log), "no exception was printed"][-1])


@pytest.fixture(scope="module")
def engines(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(model, engine_environment, tmp_path_factory.mktemp("own"))


class Own:
    """A case, what came back, and what kvhook recorded."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.case = cases.case(found["seed"], release.can())
        self.found = found
        self.full = self.case.settings.level == "full"
        self.asked = [asked for asked in found["asked"] if asked["id"]]
        self.any_aborted = any(asked["aborted"] for asked in self.asked)

    def n(self, asked: dict[str, Any]) -> int:
        return int(asked["ask"][1].get("n", 1))

    def samples(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Request and output of all that came to their end by themselves."""
        return [(a, s) for a in self.asked for s in a["samples"].values() if s["reason"] and not a["aborted"]]

    def same(self, what: str, recorded: Any, expected: Any) -> None:
        assert recorded == expected, f"{what}: {recorded!r} instead of {expected!r}\n  {self.case.text}"


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"seed-{seed}")
def own(request: pytest.FixtureRequest, engines: Engines) -> Own:
    return Own(engines.result(request.param))


def test_each_call_of_step_has_one_record_and_nothing_failed(own: Own):
    own.same("steps", own.found["steps"], own.found["calls"])
    own.same("faults", own.found["faults"], {})


def test_finished_and_aborted_requests_are_counted(own: Own):
    own.same("num_finished_reqs", own.found["counts"]["num_finished_reqs"], sum(map(own.n, own.asked)))


def test_tokens_are_those_that_came_back(own: Own):
    if own.any_aborted:
        return  # how far an aborted request came is known to its own process
    counts = own.found["counts"]
    drafts_dropped = own.case.settings.kind == "drafts" and any(sample["by_string"] for _, sample in own.samples())
    if not drafts_dropped:
        own.same("generated", counts["num_generation_tokens"], sum(len(s["tokens"]) for _, s in own.samples()))
    own.same("prompt", counts["num_prompt_tokens"], sum(s["prompt"] for _, s in own.samples()))
    if own.full:
        own.same("ttft_count", counts["ttft_count"], len(own.samples()))


def test_every_prompt_is_looked_up(own: Own):
    """Once, where none is aborted, all have blocks enough, and nothing is sent back to the queue."""
    if own.any_aborted or not own.case.settings.options["enable_prefix_caching"]:
        return
    acts = {act.what for batch in own.case.batches for act in batch.acts}
    if own.case.settings.kind in ("pressed", "pressed and chunked", "priority", "pooling"):
        return
    looked_up = [(a, s) for a, s in own.samples() if "prompt_logprobs" not in a["ask"][1]]
    queries, hits = own.found["counts"]["prefix_cache_queries"], own.found["counts"]["prefix_cache_hits"]
    if "reset with the running" not in acts:
        own.same("prefix_cache_queries", queries, sum(s["prompt"] for _, s in looked_up))
        if all(own.n(a) == 1 for a, _ in looked_up):
            own.same("prefix_cache_hits", hits, sum(s["cached"] for _, s in looked_up))


def test_each_request_has_a_row_that_says_what_came_back(own: Own):
    if not own.full:
        return
    rows = own.found["rows"]
    reasons = [s["reason"] for _, s in own.samples()]
    aborted = Counter(rows["finish_reason"])["abort"]
    if not any(own.n(a) > 1 and a["aborted"] for a in own.asked):
        own.same("aborted", aborted, sum(a["aborted"] for a in own.asked))
        done = sorted(reason for reason in rows["finish_reason"] if reason != "abort")
        own.same("finish_reason", done, sorted(reasons))
    if own.any_aborted or "request_id" not in rows:
        return
    columns = ["request_id", "num_prompt_tokens", "num_generation_tokens"]
    recorded = sorted(zip(*(rows[name] for name in columns), strict=True))
    drafts = own.case.settings.kind == "drafts"
    if not (drafts and any(s["by_string"] for _, s in own.samples())):
        own.same("rows", recorded, sorted((int(a["id"]), s["prompt"], len(s["tokens"])) for a, s in own.samples()))


def test_cached_tokens_of_rows_are_those_of_outputs(own: Own):
    if not own.full or own.any_aborted:
        return
    rows = own.found["rows"]
    if {"request_id", "num_cached_tokens"} <= rows.keys() and own.case.settings.kind != "pooling":
        single = {int(a["id"]): s["cached"] for a, s in own.samples() if own.n(a) == 1}
        recorded = dict(zip(rows["request_id"], rows["num_cached_tokens"], strict=True))
        own.same("num_cached_tokens", {number: recorded[number] for number in single}, single)
