"""Packs the records of an engine core."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvhook.adapters.ids import SHORTER, plain_number
from kvhook.core.lives import Life, read_id, request_key
from kvhook.core.state import CoreState
from kvhook.core_schema import CORE_KINDS, CORE_REQUEST, CORE_STEP, LOOKUP, PREEMPTION
from kvhook.ring.layout import Layout, make_layout

if TYPE_CHECKING:
    from kvhook.ring.writer import Publish


def core_layout() -> Layout:
    """The slots of an engine core. All have the same columns: what a vLLM cannot give is blank in them."""
    return make_layout({}, CORE_KINDS)


class Writer:
    """Packs records and publishes them; it knows their numbers and nothing of vLLM."""

    def __init__(
        self,
        layout: Layout,
        publish: Publish,
        engine: int,
        key: bytes,
        state: CoreState | None = None,
        client_of: Callable[[Any], int] = lambda request: -1,
        hash_ids: bool = False,
    ) -> None:
        self.state = state or CoreState()
        self._publish, self._engine, self._key, self._client_of = publish, engine, key, client_of
        self._hash_ids = hash_ids
        self._pack_step = layout.struct_of("core_step").pack
        self._pack_request = layout.struct_of("core_request").pack
        self._pack_preemption = layout.struct_of("preemption").pack
        self._pack_lookup = layout.struct_of("lookup").pack

    def step(self, columns: tuple[int, ...]) -> None:
        """A step: the columns of `CORE_STEP_FIELDS`, in order."""
        n = self.state.n
        self.state.n = self._publish(n, self._pack_step(n, CORE_STEP, self._engine, *columns))

    def request(self, life: Life, step: int, now: int, reason: int) -> None:
        """A request that has ended."""
        n, request = self.state.n, life.request
        answered = life.t_first_token >= 0 and request.num_output_tokens > 0  # a pooling request is not
        name, sample = read_id(request.request_id)
        record = self._pack_request(
            n,
            CORE_REQUEST,
            self._engine,
            life.number,
            self._number(name),
            sample,
            request_key(self._key, name),
            reason,
            life.arrived_step,
            life.first_scheduled_step,
            life.first_token_step if answered else -1,
            step,
            life.t_arrived,
            life.t_first_scheduled,
            life.t_first_token if answered else -1,
            now,
            request.num_prompt_tokens,
            request.num_output_tokens,
            max(life.cached, 0),
            life.prefilled,
            life.recomputed,
            life.preemptions,
            life.preempted_ns,
            self._client_of(request),
        )
        self.state.n = self._publish(n, record)

    def preemption(self, step: int, life: Life, lost: int, freed: int) -> None:
        """A request lost its blocks."""
        n = self.state.n
        name, _ = read_id(life.request.request_id)
        record = self._pack_preemption(
            n,
            PREEMPTION,
            self._engine,
            step,
            life.number,
            self._number(name),
            life.preempted_at,
            life.preemptions,
            lost,
            freed,
            life.request.num_output_tokens,
        )
        self.state.n = self._publish(n, record)

    def lookup(self, step: int, life: Life, resumed: int) -> None:
        """A request was scheduled with what it had found in the prefix cache."""
        n = self.state.n
        name, _ = read_id(life.request.request_id)
        record = self._pack_lookup(
            n,
            LOOKUP,
            self._engine,
            step,
            life.number,
            self._number(name),
            life.t_looked_up,
            resumed,
            life.tries,
            life.looked_up,
            life.found,
            life.shared,
            *life.miss,
        )
        self.state.n = self._publish(n, record)

    def _number(self, name: str) -> int:
        """What ``request_id`` holds for an id: as in the front end, see `kvhook.adapters.ids`."""
        return request_key(self._key, name) >> SHORTER if self._hash_ids else plain_number(name)
