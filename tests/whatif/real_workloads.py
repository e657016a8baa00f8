"""Four workloads for a real engine, as calls of ``LLM.generate``: prompts as token ids, and how much to answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

#: Longest request, in tokens.
LONGEST = 512


class Ask(NamedTuple):
    """One call: prompts that are sent together."""

    prompts: list[list[int]]
    max_tokens: int


#: Sends a call, and gives what was generated for each prompt.
Send = Callable[[Ask], list[list[int]]]


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, 512) for _ in range(count)]


def shared_system_prompts(send: Send) -> None:
    """Questions to five assistants, each with a system prompt of its own."""
    rng = random.Random(1)
    systems = [tokens(rng, rng.randrange(150, 260)) for _ in range(5)]
    for _ in range(3):
        send(Ask([rng.choice(systems) + tokens(rng, rng.randrange(5, 60)) for _ in range(24)], 6))


def chats(send: Send) -> None:
    """Conversations: each turn holds all that was said, what the model has answered too."""
    rng = random.Random(2)
    said = [tokens(rng, rng.randrange(40, 100)) for _ in range(14)]
    for _ in range(4):
        answers = send(Ask(said, 18))
        said = [old + answer + tokens(rng, rng.randrange(10, 50)) for old, answer in zip(said, answers, strict=True)]


def agents(send: Send) -> None:
    """Agents that work in turn: each call adds the result of a tool to a context that grows."""
    rng = random.Random(3)
    tools = tokens(rng, 96)
    contexts = [tools + tokens(rng, 40) for _ in range(7)]
    for _ in range(5):
        for number in range(len(contexts)):
            (answer,) = send(Ask([contexts[number]], 9))
            contexts[number] = contexts[number] + answer + tokens(rng, 50)


def table_rows(send: Send) -> None:
    """Rows of a table whose first columns hold few values, as they come."""
    send(Ask(_rows(), 4))


def sorted_table_rows(send: Send) -> None:
    """The same rows in order."""
    send(Ask(sorted(_rows()), 4))


def _rows() -> list[list[int]]:
    rng = random.Random(4)
    question = tokens(rng, 50)
    regions, products = [[tokens(rng, count) for _ in range(n)] for n, count in ((6, 70), (8, 60))]
    rows = [question + rng.choice(regions) + rng.choice(products) + tokens(rng, 20) for _ in range(90)]
    rng.shuffle(rows)
    return rows


WORKLOADS: dict[str, Callable[[Send], None]] = {
    "shared system prompts": shared_system_prompts,
    "multi-turn chats": chats,
    "agents with a growing context": agents,
    "table rows as they come": table_rows,
    "table rows in order": sorted_table_rows,
}


class Asked:
    """Runs workloads on an engine, and counts what it says that it found.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.asks: list[Ask] = []
        self.answers: list[list[list[int]]] = []
        self.query_tokens = self.hit_tokens = 0

    def send(self, ask: Ask) -> list[list[int]]:
        from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=ask.max_tokens)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in ask.prompts], params, use_tqdm=False)
        self.query_tokens += sum(map(len, ask.prompts))
        self.hit_tokens += sum(output.num_cached_tokens for output in outputs)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        self.asks.append(ask)
        self.answers.append(answers)
        return answers

    def send_again(self, asks: list[Ask]) -> None:
        """The calls of another engine, whatever this one answers."""
        for ask in asks:
            self.send(ask)


def usable_sizes(block_size: int, sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Tokens and usable blocks of each size."""
    for size in sizes:
        yield size, size // block_size
