"""Requests whose prefill is under way: what kind the tokens are of that a step computes for them.

All other requests compute one token a step, and their drafts. One that computes more although its prefill was over has
lost what it had, as when a KV transfer failed: it is taken back into the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from kvhook.core.lives import Life

_NOBODY: list[Life] = []


class Prefilled(NamedTuple):
    """What a step computed for them.

    Args:
        prefill: tokens computed for the first time.
        recomputed: tokens computed once more.
        decoded: generated tokens computed for the first time: the last one of a request that was preempted.
        requests: how many requests these belong to.
        cut: how many of them have some of their prefill left.
        begun: those whose first token comes next.
    """

    prefill: int = 0
    recomputed: int = 0
    decoded: int = 0
    requests: int = 0
    cut: int = 0
    begun: list[Life] = _NOBODY


#: Nobody's prefill went on.
NOTHING = Prefilled()


class Prefills:
    """Follows the prefills of one scheduler.

    Args:
        computed: gives the computed tokens of a request.

    Attributes:
        lives: request id -> request, of those whose prefill is under way.
    """

    def __init__(self, computed: Callable[[Any], int]) -> None:
        self._computed = computed
        self.lives: dict[str, Life] = {}

    def go_on(self, output: Any, tokens: Mapping[str, int], step: int) -> Prefilled:
        """A step has been scheduled, of so many tokens for each request."""
        return self._take([r for r in self.lives if tokens.get(r)], output, tokens, step)

    def stalled(self, tokens: Mapping[str, int]) -> Any:
        """A request whose prefill is under way and that got no tokens in a step; None if there is none."""
        return next((life.request for name, life in self.lives.items() if name not in tokens), None)

    def fall_back(
        self, output: Any, tokens: Mapping[str, int], step: int, requests: Mapping[str, Any], life_of: Any
    ) -> Prefilled:
        """The same for requests whose prefill was over, and that compute more than one token all the same."""
        drafts = output.scheduled_spec_decode_tokens
        names = []
        for name, count in tokens.items():
            if name not in self.lives and count - len(drafts.get(name, ())) > 1:
                request = requests[name]
                life = self.lives[name] = life_of(request)
                if not getattr(request, "resumable", False):  # else its user has sent more of the prompt
                    life.high = max(life.high, life.reached, request.num_tokens - 1)
                names.append(name)
        return self._take(names, output, tokens, step)

    def _take(self, names: Iterable[str], output: Any, tokens: Mapping[str, int], step: int) -> Prefilled:
        prefill = recomputed = decoded = requests = cut = 0
        begun: list[Life] = []
        drafts = output.scheduled_spec_decode_tokens
        for name in names:
            life, count = self.lives[name], tokens[name]
            requests += 1
            request = life.request
            end = self._computed(request)
            begin = end - count
            if drafts:
                end -= len(drafts.get(name, ()))
            if begin < life.reached:  # some of it was lost before all of it was there
                life.high = max(life.high, life.reached)
            life.reached = end
            again = max(0, min(end, life.high) - begin)
            first = max(0, min(end, request.num_prompt_tokens) - max(begin, life.high))
            recomputed += again
            prefill += first
            decoded += end - begin - again - first
            life.recomputed += again
            life.prefilled += first
            if end < request.num_tokens:
                cut += 1
            else:
                del self.lives[name]
                if life.first_token_step < 0:
                    life.first_token_step = step
                    begun.append(life)
        return Prefilled(prefill, recomputed, decoded, requests, cut, begun)
