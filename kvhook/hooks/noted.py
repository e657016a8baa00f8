"""What is noted of a request when it is added: the number of its prompt, its label, its LoRA adapter."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from kvhook.adapters.requests import lora_name_of, users_id_of
from kvhook.faults import USERS
from kvhook.hooks.registry import registry

_LABEL = "noting a request's label"

#: ``codes_of(request_id, lora_name)`` gives the codes of a request's label and adapter, see `Owner.label_request`.
CodesOf = Callable[[Any, str], "tuple[int, int]"]


class Notes:
    """Leaves what is known of a request in vLLM's own object for it (``RequestState``), where its end finds it.

    Args:
        codes_of: gives the codes of its label and its adapter.
    """

    def __init__(self, codes_of: CodesOf) -> None:
        self._codes_of = codes_of
        self._next = 0

    def take(self, state: Any) -> None:
        """Note what is known of a request that has been added."""
        parent = getattr(state, "parent_req", None)
        number = self._next if parent is None else getattr(parent, "kvhook_prompt_number", self._next)
        if number == self._next:
            self._next += 1
            if parent is not None:
                parent.kvhook_prompt_number = number
        state.kvhook_prompt_number = number
        state.kvhook_label, state.kvhook_lora_name = self._codes_of(users_id_of(state), lora_name_of(state))


def note_of(engine: Any) -> Callable[[Any], None]:
    """What notes the label, the adapter and the prompt's number of each request that is added to an engine."""
    alive = weakref.ref(engine)

    def codes_of(request_id: Any, lora_name: str) -> tuple[int, int]:
        owner = registry.owner
        return (-1, -1) if owner is None else owner.label_request(alive(), request_id, lora_name)

    notes = Notes(codes_of)

    def note(states: Any) -> None:
        if registry.is_off(_LABEL):
            return
        try:
            notes.take(states[next(reversed(states))])  # a dictionary: the newest is the last
        except USERS:
            raise
        except BaseException as error:
            registry.fault(_LABEL, error, "this request has none")

    return note
