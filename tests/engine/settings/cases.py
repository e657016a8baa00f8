"""The cases of the settings test: an engine's settings and a workload, both drawn from one seed.

A seed stands for the same case everywhere, as far as the release has what the case needs. Seeds that follow each other
share an engine, four to each. Nothing here knows vLLM or kvhook: what a release has is told by `Can`.
"""

from __future__ import annotations

import os
import re
from random import Random
from typing import Any, NamedTuple

#: So many cases run one after the other on one engine.
PER_ENGINE = 4
#: Cases of `make test`. KVHOOK_SETTINGS_CASES=300 runs more, KVHOOK_SETTINGS_SEEDS="17 40-43" runs these.
CASES = 48

#: The longest prompt and the longest output together; the model takes more.
MAX_MODEL_LEN = 512
VOCABULARY = 512

#: What an engine is for. Every one comes with each level, and with the user's stats on and off.
KINDS = (
    "roomy",  # everything fits: what hits can be predicted to the block
    "chunked",  # prompts take several steps
    "pressed",  # too few blocks: requests wait, and are preempted
    "pressed and chunked",
    "priority",  # priority scheduling, in few blocks
    "drafts",  # speculative decoding by n-grams
    "pooling",  # embeddings: nothing is generated
    "no cache",  # prefix caching is off
    "overlapped",  # asynchronous scheduling: a step brings the outputs of the batch before
)
LEVELS = (("full", True), ("full", False), ("light", False), ("light", True))


class Can(NamedTuple):
    """What a release has, as far as the cases differ by it."""

    block_sizes: tuple[int, ...] = (16, 32, 64, 128)
    #: `reset_prefix_cache(reset_running_requests=True)`
    reset_running: bool = True
    #: kind -> why it cannot be had
    lacks: dict[str, str] = {}  # noqa: RUF012 (never written to)


class Settings(NamedTuple):
    """The settings of one engine."""

    number: int
    kind: str
    level: str
    stats_on: bool
    options: dict[str, Any]

    @property
    def text(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        stats = "on" if self.stats_on else "off"
        return f"engine {self.number} ({self.kind}), level {self.level}, the user's stats {stats}\n    LLM({told})"


class Ask(NamedTuple):
    """One request. With `follows` its prompt begins with that earlier request's prompt and output."""

    prompt: list[int]
    sampling: dict[str, Any]
    arrives: int = 0
    priority: int = 0
    follows: tuple[int, int] | None = None


class Act(NamedTuple):
    """Something that happens before a step of a batch: an abort of its `ask`, or a reset of the prefix cache."""

    step: int
    what: str
    ask: int = -1


class Batch(NamedTuple):
    """Requests that are worked off together, through `LLM.generate` or step by step."""

    asks: list[Ask]
    acts: list[Act]
    through: str
    #: outputs come with every step, or at the end only
    cumulative: bool


class Case(NamedTuple):
    seed: int
    settings: Settings
    batches: list[Batch]

    @property
    def command(self) -> str:
        return f"KVHOOK_SETTINGS_SEEDS={self.seed} python -m pytest tests/engine/settings/test_settings.py"

    @property
    def text(self) -> str:
        lines = [f"seed {self.seed} on {self.settings.text}", f"    again: {self.command}"]
        for number, batch in enumerate(self.batches):
            kind = "cumulative" if batch.cumulative else "final only"
            lines.append(f"    batch {number} through {batch.through}, outputs {kind}")
            for i, ask in enumerate(batch.asks):
                more = f", follows {ask.follows}" if ask.follows else ""
                more += f", priority {ask.priority}" if ask.priority else ""
                more += f", arrives {ask.arrives}" if ask.arrives else ""
                lines.append(f"      {i}: {len(ask.prompt)} tokens{more}, {_short(ask.sampling)}")
            lines += [
                f"      before step {act.step}: {act.what} {act.ask if act.ask >= 0 else ''}" for act in batch.acts
            ]
        return "\n".join(lines)


def _short(sampling: dict[str, Any]) -> str:
    told = {n: f"{len(v)} ids" if n == "stop_token_ids" else v for n, v in sampling.items()}
    return ", ".join(f"{name}={value}" for name, value in told.items())


def seeds() -> list[int]:
    """The seeds to be run, in order."""
    named = os.environ.get("KVHOOK_SETTINGS_SEEDS", "")
    if not named:
        return list(range(int(os.environ.get("KVHOOK_SETTINGS_CASES", CASES))))
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", named):
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def settings(number: int, can: Can) -> Settings:
    """The settings of an engine."""
    rng = Random(f"settings {number}")
    kind = KINDS[number % len(KINDS)]
    level, stats_on = LEVELS[number % len(LEVELS)]
    block_size = rng.choice(can.block_sizes)
    pressed = kind in ("pressed", "pressed and chunked", "priority")
    # at least one request of full length has to fit, or vLLM does not start
    tokens = MAX_MODEL_LEN * rng.choice((1.1, 1.5, 2)) if pressed else 10 * MAX_MODEL_LEN
    seqs = rng.choice((4, 8, 16)) if pressed else rng.choice((1, 2, 4, 8, 16))
    chunked = kind in ("chunked", "pressed and chunked") or (not pressed and rng.random() < 0.3)
    options: dict[str, Any] = {
        "block_size": block_size,
        "num_gpu_blocks_override": int(tokens) // block_size + 2,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": rng.choice((32, 48, 64, 96, 160)) if chunked else 1024,
        "max_model_len": MAX_MODEL_LEN,
        "enable_prefix_caching": kind != "no cache",
    }
    if kind == "priority":
        options["scheduling_policy"] = "priority"
    elif kind == "drafts":
        most = rng.choice((2, 3, 4))
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": rng.choice((1, 3, 5)),
            "prompt_lookup_max": most,
            "prompt_lookup_min": most - 1,
        }
    elif kind == "overlapped":
        options["async_scheduling"] = True
    return Settings(number, kind, level, stats_on, options)


def case(seed: int, can: Can) -> Case:
    """The case of a seed."""
    of = settings(seed // PER_ENGINE, can)
    drawn = _Workload(Random(f"case {seed}"), of, can)
    return Case(seed, of, [drawn.batch(i) for i in range(drawn.rng.choice((1, 2, 2, 3)))])


class _Workload:
    """Draws the batches of one case; later ones may come back to the prompts of earlier ones."""

    def __init__(self, rng: Random, of: Settings, can: Can) -> None:
        self.rng, self.of, self.can = rng, of, can
        self.block: int = of.options["block_size"]
        self.roots = [self.tokens(self.length(260)) for _ in range(rng.choice((1, 2, 3)))]
        self.earlier: list[tuple[int, int, Ask]] = []

    def tokens(self, count: int) -> list[int]:
        if self.of.kind == "drafts" and self.rng.random() < 0.8:  # n-grams that come again
            some = [self.rng.randrange(2, VOCABULARY) for _ in range(self.rng.randrange(3, 12))]
            return (some * (count // len(some) + 1))[:count]
        return [self.rng.randrange(2, VOCABULARY) for _ in range(count)]

    def length(self, most: int) -> int:
        """Often a whole number of blocks, or one token more or less."""
        if self.rng.random() < 0.4 and most > self.block:
            return self.block * self.rng.randrange(1, most // self.block + 1) + self.rng.choice((-1, 0, 0, 1))
        return self.rng.randrange(1, most)

    def batch(self, number: int) -> Batch:
        rng = self.rng
        count = rng.choice((1, 2, 4, 6, 10))
        staggered = rng.random() < 0.4
        asks = [self.ask(number, staggered) for _ in range(count)]
        acts = self.acts(asks)
        for i, ask in enumerate(asks):
            self.earlier.append((number, i, ask))
        aborted = {act.ask for act in acts if act.what == "abort"}
        fans_out = any(asks[i].sampling.get("n", 1) > 1 for i in aborted)
        can_generate = not staggered and not fans_out and self.of.kind != "pooling"
        through = "generate" if can_generate and rng.random() < 0.5 else "steps"
        # of an aborted request with several samples some may be done: only this kind of output tells of them
        cumulative = through == "steps" and (fans_out or rng.random() < 0.5)
        return Batch(asks, acts, through, cumulative)

    def ask(self, batch: int, staggered: bool) -> Ask:
        rng = self.rng
        arrives = rng.choice((0, 0, 1, 2, 3, 5, 9)) if staggered else 0
        priority = rng.randrange(-1, 3) if self.of.kind == "priority" else 0
        how, follows = rng.random(), None
        before = [one for one in self.earlier if one[0] < batch]
        if how < 0.2 and self.earlier:
            prompt = rng.choice(self.earlier)[2].prompt
        elif how < 0.35 and before and self.of.kind != "pooling":
            turn, index, ask = rng.choice(before)
            prompt, follows = ask.prompt[:250] + self.tokens(rng.randrange(1, 40)), None
            if len(ask.prompt) < 250 and not ask.follows:
                prompt, follows = self.tokens(rng.randrange(1, 60)), (turn, index)
        elif how < 0.45:
            prompt = self.tokens(self.length(400))
        else:
            prompt = rng.choice(self.roots) + self.tokens(self.length(120))
        return Ask(prompt, self.sampling(), arrives, priority, follows)

    def sampling(self) -> dict[str, Any]:
        """What is asked for: greedy, unless several samples are wanted."""
        rng = self.rng
        if self.of.kind == "pooling":
            return {}
        found: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 5, 9, 20, 48)), "temperature": 0, "ignore_eos": True}
        what = rng.random()
        if what < 0.12:
            # without a seed of its own: vLLM's CPU build cannot take one back when a prompt takes several steps
            found |= {"n": rng.randrange(2, 5), "temperature": 1.0}
        elif what < 0.24:
            found |= {"stop": rng.sample(["e", "a", "t", " ", "o", "n", "th"], 2)}
        elif what < 0.34:
            found |= {"stop_token_ids": sorted(rng.sample(range(2, VOCABULARY), 80))}
        elif what < 0.44 and self.of.kind != "drafts":
            found |= {"prompt_logprobs": rng.randrange(1, 4)}
        elif what < 0.5:
            found |= {"ignore_eos": False}
        return found

    def acts(self, asks: list[Ask]) -> list[Act]:
        rng = self.rng
        found = []
        if rng.random() < 0.25:
            found.append(Act(0, "reset"))
        if rng.random() < 0.15:
            found.append(Act(rng.randrange(1, 12), "reset"))
        if rng.random() < 0.12 and self.can.reset_running:
            found.append(Act(rng.randrange(1, 12), "reset with the running"))
        if rng.random() < 0.45:
            some = rng.sample(range(len(asks)), min(len(asks), rng.choice((1, 1, 2, 3))))
            found += [Act(asks[i].arrives + rng.choice((0, 1, 1, 2, 3, 6, 12)), "abort", i) for i in some]
        return sorted(found)
