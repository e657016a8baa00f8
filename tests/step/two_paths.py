"""The same calls to the two publishers, in Python and in C, and what each of them made of it."""

from __future__ import annotations

import contextlib
import functools
import random
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kvhook import _step
from kvhook.adapters import BY_LEVEL
from kvhook.adapters.config import engine_facts
from kvhook.adapters.publisher import Compiled, compile_publisher
from kvhook.adapters.requests import AbortedRequest
from kvhook.adapters.shape import Shape
from kvhook.adapters.step_functions import Counters, StepFunctions
from kvhook.adapters.table import Adapter, attributes
from tests.contracts.behaviour import config_of
from tests.contracts.loader import build_stub_modules, load, stubs
from tests.step import odd_objects

#: Releases and adapters whose tables differ from each other.
TABLES = (
    ("0.32.0", "full", "v1"),
    ("0.32.0", "light", "v1-light"),
    ("0.20.2", "full", "v1-async"),
    ("0.16.0", "light", "v1-async-light"),
    ("0.11.0", "full", "v1"),
    ("0.8.5", "full", "v1-0.8"),
    ("0.8.5", "light", "v1-light-0.8"),
    ("0.7.3", "full", "v0"),
    ("0.6.1", "full", "v0"),
)


class Path(NamedTuple):
    """One publisher, and everything that came out of it."""

    functions: StepFunctions
    records: list[tuple[int, bytes]]
    samples: list[tuple[int, ...]]
    orphans: list[int]


@contextlib.contextmanager
def table(release: str, level: str, name: str) -> Iterator[Adapter]:
    """An adapter, with its vLLM in place."""
    with stubs(_modules(release)):
        yield next(a for a in BY_LEVEL[level] if a.name == name)


@functools.cache
def _modules(release: str) -> dict[str, types.ModuleType]:
    return build_stub_modules(load(release))


def compile_one(adapter: Adapter, r: random.Random) -> Compiled:
    """A publisher for an engine of one kind or another."""
    engine = types.SimpleNamespace(vllm_config=config_of(num_gpu_blocks=r.choice((11, 1000)), kv_cache_metrics=True))
    facts = engine_facts(adapter, engine) | {
        "finished_hook": r.random() < 0.5,
        "stats_from_core": r.random() < 0.5,
        "sees_requests": r.random() < 0.5,
        "sees_schedule": r.random() < 0.5,
        "stats_for_kvhook": r.random() < 0.5,
        "splits_prompt_tokens": r.random() < 0.5,
    }
    if r.random() < 0.2:
        facts |= {"num_kv_blocks": 0}
    if r.random() < 0.3:
        facts |= {"kv_usage_of": 1001, "kv_usage_reserved": 1}
    return compile_publisher(adapter, facts)


def paths(compiled: Compiled, start: Counters) -> tuple[Path, Path]:
    """Both publishers, each with its own clock and its own ring: a list."""
    return _path(compiled._bind_source, start), _path(compiled._bind_native, start)


def _path(bind: Callable[..., StepFunctions], start: Counters) -> Path:
    records: list[tuple[int, bytes]] = []
    samples: list[tuple[int, ...]] = []
    orphans: list[int] = []
    ticks = iter(range(10**9, 10**10, 7))

    def publish_record(n: int, record: bytes) -> int:
        records.append((n, bytes(record)))
        return n + 1

    def on_sample(*given: int) -> int:
        samples.append(given)
        return len(samples) * 1000

    functions = bind(publish_record, 3, lambda: next(ticks), on_sample, start, lambda lost: orphans.append(1 + lost))
    return Path(functions, records, samples, orphans)


class Made:
    """Makes what vLLM hands over, for one plan: objects with the attributes that the plan reads, and some odd ones."""

    def __init__(self, compiled: Compiled, odd: float) -> None:
        self.shape = Shape(compiled.plan, compiled.layout)
        self.odd = odd
        expressions = [*compiled.plan.steps.values(), *compiled.plan.requests.values(), *compiled.plan.lists.values()]
        expressions += [compiled.plan.finished] if compiled.plan.finished else []
        expressions += [s.expression for s in compiled.plan.sources.values() if s.expression]
        self.reads: dict[str, set[str]] = {}
        for expression in expressions:
            for source, attribute in attributes(expression):
                self.reads.setdefault(source, set()).add(attribute)
        self.lists = {a for e in compiled.plan.lists.values() for _, a in attributes(e)}
        finished = attributes(compiled.plan.finished) if compiled.plan.finished else ()
        self.finished = {a for _, a in finished}
        self.of_v0 = compiled.plan.adapter.family == "v0"

    def source(self, name: str, r: random.Random) -> Any:
        """One of vLLM's objects."""
        members = {a: self.member(name, a, r) for a in sorted(self.reads.get(name, ()))}
        return odd_objects.holder(r, members, self.odd / 4)

    def member(self, source: str, attribute: str, r: random.Random) -> Any:
        child = next((s for s in self.shape.children_of(source) if s.expression == f"{source}.{attribute}"), None)
        if child is not None:
            return None if r.random() < (0.5 if child.optional else self.odd / 4) else self.source(child.name, r)
        if attribute in self.lists:
            return odd_objects.latencies(r, self.odd)
        item = self.shape.plan.adapter.finished.column
        if attribute in self.finished and item in self.shape.plan.sources:
            return odd_objects.many(r, lambda: self.source(item, r), self.odd)
        if attribute in ("kv_cache_eviction_events", "states"):
            return [] if r.random() > self.odd else odd_objects.odd_number(r)
        if self.of_v0 and attribute.endswith("_requests"):
            return [odd_objects.number(r, self.odd / 8) for _ in range(r.choice((0, 2, 2, 2, 3)))]
        if attribute in ("request_id", "max_tokens_param") and r.random() < 0.5:
            return r.choice(("7", "abc", "3-1"))
        odd = self.odd / 16
        if attribute == "kv_cache_usage" or attribute.endswith(("_time", "_latency", "_ttft", "_sys")):
            return odd_objects.odd_number(r) if r.random() < odd else odd_objects.plain_float(r)
        return odd_objects.odd_number(r) if r.random() < odd else odd_objects.plain_int(r)

    def stats(self, argument: str, r: random.Random) -> Any:
        """What is handed over as one argument."""
        root = next((name for name, s in self.shape.roots.items() if s.argument == argument), "")
        if not root or r.random() < 0.15:
            return None
        return odd_objects.odd_number(r) if r.random() < self.odd / 40 else self.source(root, r)


def aborted(r: random.Random, odd: float) -> Any:
    """A request that was aborted."""
    if r.random() < odd:
        return odd_objects.odd_number(r)
    return AbortedRequest(request_id=r.randrange(99), num_prompt_tokens=odd_objects.number(r, odd), e2e_latency=0.5)


def call(path: Path, made: Made, name: str, seed: int) -> tuple[Any, ...]:
    """Call one of the functions, with arguments that follow from the seed. Gives what it returned or raised."""
    r, odd = random.Random(seed), made.odd / 8
    function: Callable[..., Any] = getattr(path.functions, name)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if name == "record":
        kwargs = {a: made.stats(a, r) for a in made.shape.plan.arguments if a != "engine_idx" and r.random() < 0.95}
        if r.random() < 0.3:
            kwargs["engine_idx"] = odd_objects.number(r, odd)
        if r.random() < 0.1:
            kwargs["of_a_release_to_come"] = 1
        if r.random() < 0.2:
            args = [kwargs.pop(a) for a in [*kwargs][:1] if a == made.shape.plan.arguments[0]]
    elif name == "take":
        kwargs = {s.argument: made.stats(s.argument, r) for s in made.shape.taken()}
        kwargs |= {"engine_idx": odd_objects.number(r, odd), "num_free": odd_objects.number(r, odd)}
        kwargs |= {"outputs": r.choice((0, 0, 3)), "spent": r.choice((0, 500))}
    elif name == "publish":
        args = [1000, 2000] if r.random() > odd else [odd_objects.number(r, odd), odd_objects.number(r, odd)]
    elif name == "abort":
        args = [aborted(r, odd)]
    try:
        return "returned", function(*args, **kwargs)
    except BaseException as error:
        return "raised", type(error), str(error)


#: How often which function is called.
CALLS = ("record",) * 6 + ("take",) * 5 + ("publish",) * 8 + ("add", "abort", "flush", "left")


def differences(seed: int, where: tuple[str, str, str] | None = None) -> list[str]:
    """Play a scenario that follows from the seed on both paths. Returns what they did not do alike; [] if nothing."""
    r = random.Random(seed)
    chosen = where or r.choice(TABLES)
    with table(*chosen) as adapter:
        compiled = compile_one(adapter, r)
        made = Made(compiled, r.choice((0.0, 0.05, 0.4, 1.0)))
        python, c = paths(compiled, Counters(*(r.choice((0, 5, 2**40)) for _ in range(3))))
        for number in range(r.randrange(4, 24)):
            name, inner = r.choice(CALLS), r.getrandbits(40)
            outcomes = [call(path, made, name, inner) for path in (python, c)]
            left = [path.functions.left() for path in (python, c)]
            if same(*outcomes) and same(*left) and python[1:] == c[1:]:
                continue
            return [
                f"seed {seed}, {chosen}, call {number}: {name}",
                *map(str, outcomes),
                *map(str, left),
                *(f"{len(path.records)} records, {path.samples[-1:]}" for path in (python, c)),
            ]
    return []


def same(python: Any, c: Any) -> bool:
    """Whether both are the same, as far as can be seen from outside: a NaN is itself, another object is another."""
    one, other = (re.sub(r"0x[0-9a-f]+", "", repr(each)) for each in (python, c))
    return one == other


def have_native() -> bool:
    return _step.native is not None
