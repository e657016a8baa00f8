"""A KV connector of the tests: where tokens "come from" is played, everything else is vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base


class PlayedConnector(base.KVConnectorBase_V1):  # type: ignore[misc, unused-ignore]
    """The scheduler's side. A test sets what it says."""

    #: request and tokens found in the local cache -> tokens that the connector has beyond these, and whether they come
    #: later
    has: Callable[[Any, int], tuple[int, bool]]
    #: whether the blocks of a request that has ended are still being sent
    sends: Callable[[Any], bool]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self.has(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return base.KVConnectorMetadata()

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.sends(request), None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise AssertionError("there is no worker")

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise AssertionError("there is no worker")

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        raise AssertionError("there is no worker")

    def wait_for_save(self) -> None:
        raise AssertionError("there is no worker")
