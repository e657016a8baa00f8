"""Several engines behind a router: what it costs in hits that their caches know nothing of each other.

Each engine has a cache of its own, which is asked for the requests that are sent to it, in the order in which they come
(`kvhook.whatif.distances`: a cache that holds blocks and nothing else).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvhook.whatif.distances import lru_curve
from kvhook.whatif.requests import BlockRequests, Ints

#: With "prefix", an engine that has more than its share of the tokens by so much gets no further request.
SLACK = 1.25


@dataclass(frozen=True)
class FleetSize:
    """So many engines under one router.

    Attributes:
        replicas: engines.
        routing: a name of `ROUTINGS`.
        blocks: of each engine.
        hit_tokens: found by all together.
        query_tokens: looked up by all together.
        one_cache_hit_tokens: found by one engine with the blocks of all.
        busiest: share of the prompt tokens that the busiest engine computes, times the number of engines.
    """

    replicas: int
    routing: str
    blocks: int
    hit_tokens: int
    query_tokens: int
    one_cache_hit_tokens: int
    busiest: float


def fleet(requests: BlockRequests, blocks: int, replicas: Sequence[int]) -> list[FleetSize]:
    """Each routing with each number of engines.

    Args:
        requests: of one or more runs, all of which come to the router.
        blocks: of the cache of each engine.
        replicas: numbers of engines.
    """
    everything = dataclasses.replace(requests, core=np.zeros(len(requests), np.int64))
    whole = lru_curve(everything)
    size, found = requests.block_size, []
    for count in replicas:
        for name, route in ROUTINGS.items():
            # engines that get no request find nothing
            sent = dataclasses.replace(everything, core=route(everything, count))
            hits = sum(
                round(lru_curve(sent.select(np.flatnonzero(sent.core == engine))).at(blocks))
                for engine in np.unique(sent.core)
            )
            load = np.bincount(sent.core, weights=requests.num_prompt_tokens)
            found.append(
                FleetSize(
                    count,
                    name,
                    blocks,
                    hits * size,
                    requests.query_tokens,
                    round(whole.at(blocks * count)) * size,
                    float(load.max() / max(load.sum() / count, 1)) if len(load) else 0.0,
                )
            )
    return found


def _of_use(requests: BlockRequests, replicas: int) -> int:
    """Engines that get a request at all: the first of those that have none is always chosen before the others."""
    return max(1, min(replicas, len(requests)))


def round_robin(requests: BlockRequests, replicas: int) -> Ints:
    """One after the other."""
    return np.arange(len(requests)) % replicas


def least_load(requests: BlockRequests, replicas: int) -> Ints:
    """To the engine that has been sent the fewest tokens so far."""
    load = [0] * _of_use(requests, replicas)
    chosen = []
    for tokens in (requests.num_prompt_tokens + requests.num_generation_tokens).tolist():
        engine = load.index(min(load))
        load[engine] += tokens
        chosen.append(engine)
    return np.array(chosen, np.int64)


def by_prefix(requests: BlockRequests, replicas: int) -> Ints:
    """To the engine that has seen most of the prompt, unless that one has much more to do than the others."""
    engines = _of_use(requests, replicas)
    seen: list[set[int]] = [set() for _ in range(engines)]
    load = [0] * engines
    chosen = []
    ids, offsets = requests.ids.tolist(), requests.offsets.tolist()
    asked, tokens = requests.num_looked_up_blocks.tolist(), requests.num_prompt_tokens.tolist()
    for number in range(len(requests)):
        mine = ids[offsets[number] : offsets[number + 1]]
        most = SLACK * (sum(load) + tokens[number]) / replicas
        best, engine = -1, load.index(min(load))
        for candidate in range(engines):
            if load[candidate] > most and candidate != engine:
                continue
            known = 0
            while known < min(asked[number], len(mine)) and mine[known] in seen[candidate]:
                known += 1
            if known > best or (known == best and load[candidate] < load[engine]):
                best, engine = known, candidate
        seen[engine].update(mine)
        load[engine] += tokens[number] - best * requests.block_size
        chosen.append(engine)
    return np.array(chosen, np.int64)


#: Name of a way to choose an engine for each request -> the function.
ROUTINGS: dict[str, Callable[[BlockRequests, int], Ints]] = {
    "round robin": round_robin,
    "least load": least_load,
    "prefix": by_prefix,
}
