"""KV connectors: tokens that come from outside, at once or later, or fail to come; blocks that are still being sent."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.core.books import Books
from tests.core.conftest import Recording
from tests.core.test_kinds import COUNTS

Make = Callable[..., Recording]
SIZE = 16
SETTINGS = {"max_num_seqs": 8, "max_num_batched_tokens": 96, "max_model_len": 512}
SPLIT = ("num_prefill_tokens", "num_recomputed_tokens", "num_decode_tokens")


class Played:
    """A recorded scheduler with the tests' connector.

    Args:
        driver: makes the recording.
        later: whether what the connector has comes some steps later.
        sends: whether blocks are still being sent when their request has ended.
    """

    def __init__(self, driver: Make, seed: int, *, later: bool = False, sends: bool = False, blocks: int = 60) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs

        from tests.core.played_connector import PlayedConnector

        self.random = random.Random(seed)
        self.later, self.sends = later, sends
        #: request -> tokens from outside, as last told to the scheduler
        self.loaded: dict[str, int] = {}
        self.loading: dict[str, int] = {}
        self.sending: dict[str, int] = {}
        PlayedConnector.has, PlayedConnector.sends = self._has, self._sends  # bound already: they stay as they are
        fields = {"kv_load_failure_policy": "recompute"} if hasattr(KVTransferConfig, "kv_load_failure_policy") else {}
        transfer = KVTransferConfig(
            kv_connector="PlayedConnector",
            kv_connector_module_path="tests.core.played_connector",
            kv_role="kv_both",
            **fields,
        )
        more = (
            {"disable_hybrid_kv_cache_manager": True} if hasattr(EngineArgs, "disable_hybrid_kv_cache_manager") else {}
        )
        self.recording = driver(blocks=blocks, seed=seed, kv_transfer_config=transfer, **more, **SETTINGS)
        self.driver = self.recording.driver
        self.books = Books(self.driver, plain=False)

    def _has(self, request: Any, found: int) -> tuple[int, bool]:
        rng = random.Random(int(request.request_id))  # the same each time it is asked
        most = (len(request.prompt_token_ids) - 1) // SIZE * SIZE - found
        if most <= 0 or rng.random() < 0.4:
            self.loaded[request.request_id] = 0
            return 0, False
        tokens = rng.randrange(1, most // SIZE + 1) * SIZE
        self.loaded[request.request_id] = tokens
        if self.later:
            self.loading[request.request_id] = 3
        return tokens, self.later

    def _sends(self, request: Any) -> bool:
        if self.sends and int(request.request_id) % 2:
            self.sending[request.request_id] = 4
            return True
        return False

    def add(self, requests: int) -> None:
        """Prompts of which half have a beginning in common."""
        rng = self.random
        stem = [rng.randrange(2, 500) for _ in range(70)]
        for _ in range(requests):
            tail = [rng.randrange(2, 500) for _ in range(rng.randrange(5, 120))]
            self.driver.add(stem + tail if rng.random() < 0.5 else tail, max_tokens=rng.randrange(1, 30))

    def run(self) -> None:
        """Steps until nothing is left to be done."""
        for _ in range(5000):
            if not (self.driver.scheduler.has_unfinished_requests() or self.sending):
                return
            for kind, under_way in (("finished_recving", self.loading), ("finished_sending", self.sending)):
                for name in [n for n, steps in under_way.items() if not steps and self._waits(kind, n)]:
                    self.driver.transfers.setdefault(kind, set()).add(name)
                    del under_way[name]
                for name, steps in under_way.items():
                    under_way[name] = max(steps - 1, 0)
            self.books.step()
        raise AssertionError("the scheduler does not come to an end")

    def _waits(self, kind: str, name: str) -> bool:
        request = self.driver.scheduler.requests.get(name)
        return request is not None and (kind == "finished_sending" or request.status.name == "WAITING_FOR_REMOTE_KVS")


@pytest.fixture
def played(driver: Make) -> Callable[..., Played]:
    def make(seed: int, **how: Any) -> Played:
        import vllm

        if vllm.__version__.startswith("0.8."):
            pytest.skip("0.8 takes connectors of its own only")
        return Played(driver, seed, **how)

    return make


@pytest.mark.parametrize("sends", [False, True], ids=["", "sends"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_what_comes_from_outside_is_neither_computed_nor_found_in_the_cache(
    played: Callable[..., Played], later: bool, sends: bool
):
    play = played(1, later=later, sends=sends)
    play.add(25)
    play.run()
    cores, books = play.recording.read(), play.books
    steps, requests, lookups = cores.steps(), cores.requests(), cores.lookups()
    assert len(steps) == len(books.rows)
    for column in (*COUNTS, *SPLIT, "num_waiting_reqs"):
        assert steps[column].tolist() == [row[column] for row in books.rows], column
    assert len(requests) == 25
    for column in SPLIT[:2]:
        assert requests[column].sum() == steps[column].sum(), column
    found = dict(zip(lookups["request"].tolist(), lookups["num_found_tokens"].tolist(), strict=True))
    calm = requests[requests["num_preemptions"] == 0]
    assert len(calm) > 10
    for one in calm:
        outside = play.loaded[str(one["request_id"])]
        assert one["num_cached_tokens"] == found[int(one["request"])] + outside
        assert one["num_prefill_tokens"] == one["num_prompt_tokens"] - one["num_cached_tokens"]
    assert sum(play.loaded.values()) > 200
    assert steps["num_decode_tokens"].sum() + steps["num_recomputed_tokens"].sum() >= sum(
        one["num_generation_tokens"] - 1 for one in requests
    )
    taken = steps["num_kv_blocks_allocated"] + steps["num_kv_blocks_revived"] - steps["num_kv_blocks_freed"]
    assert (taken.cumsum() == steps["num_kv_blocks_used"]).all()
    assert ("remote_kv" in steps["limited_by"].tolist()) == later
    assert "KV connector" in cores.absent["num_kv_tokens"]
    assert "num_kv_tokens" not in (steps.dtype.names or ())
    assert cores.facts[0]["connector"] == "PlayedConnector"


def test_tokens_that_fail_to_come_are_computed_again_and_not_counted_as_generated(played: Callable[..., Played]):
    from vllm.v1 import outputs

    if "invalid_block_ids" not in getattr(getattr(outputs, "KVConnectorOutput", None), "__dataclass_fields__", {}):
        pytest.skip("this vLLM is not told of transfers that fail")
    play = played(2, blocks=200)
    play.add(12)
    failed = set[str]()
    original = play.driver.result_of

    def result_of(output: Any) -> Any:
        """The first block from outside of some new requests turns out not to be there."""
        invalid = set()
        for new in output.scheduled_new_reqs:
            outside = play.loaded.get(new.req_id, 0)
            if outside and int(new.req_id) % 3 == 0:
                blocks = play.driver.scheduler.kv_cache_manager.get_block_ids(new.req_id)[0]
                first = (new.num_computed_tokens - outside) // SIZE
                invalid.add(blocks[first])
                failed.add(new.req_id)
        if invalid:
            play.driver.transfers["invalid_block_ids"] = invalid
        return original(output)

    play.driver.result_of = result_of
    play.run()
    assert len(failed) > 1
    cores = play.recording.read()
    steps, requests = cores.steps(), cores.requests()
    assert steps["num_preempted_reqs"].sum() == 0
    assert steps["num_recomputed_tokens"].sum() > 0
    assert steps["num_decode_tokens"].sum() == (requests["num_generation_tokens"] - 1).sum()
    for column in SPLIT[:2]:
        assert requests[column].sum() == steps[column].sum(), column
    lost = {str(one["request_id"]) for one in requests if one["num_recomputed_tokens"]}
    assert lost == failed
    for one in requests:
        assert one["num_prefill_tokens"] == one["num_prompt_tokens"] - one["num_cached_tokens"]
