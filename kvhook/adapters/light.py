"""Level light: the scheduler's stats as the engine core sends them, and tokens counted from its outputs.

The engine core makes its stats, the front end none: no IterationStats, no Prometheus, no log lines. What
IterationStats would have counted of tokens is counted here from the same outputs, to the token; clocks of single
requests are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvhook import _step
from kvhook.adapters.table import Adapter, Read, Source, Target, attributes, has_field, lookup
from kvhook.adapters.v1 import ASYNC, ASYNC_LLM, CLIENT, ENGINE, LOGGERS, V1, V1_NO_LOGGER
from kvhook.adapters.v1 import PROCESSOR as MADE
from kvhook.schema import FULL_ONLY, REQUEST_FIELDS

OUTPUT = "vllm.v1.engine:EngineCoreOutput"
EVENT = "vllm.v1.engine:EngineCoreEventType"
PROCESSOR = "vllm.v1.engine.output_processor:OutputProcessor"
CLIENT_CLASS = "vllm.v1.engine.core_client:AsyncMPClient"
STATE = "vllm.v1.engine.output_processor:RequestState"

LIGHT = (
    "level='light' looks at no single request and at no clock of one; kvhook.install(level='full') does, as far as "
    "this vLLM has it"
)

#: ``count(outputs, states, counts)`` adds what came back from the engine core in a step to `Counts`.
Counter = Callable[[Iterable[Any], Mapping[str, Any], "Counts"], None]


class Counts:
    """What was counted in one step, in the names of the columns."""

    # values of the class: an object is made in 60 ns, and most steps set one of them
    num_generation_tokens = 0
    num_preempted_reqs = 0
    num_finished_reqs = 0
    num_prompt_tokens = 0
    num_prompt_tokens_computed = 0
    num_prompt_tokens_cached = 0
    num_prompt_tokens_external = 0
    #: the front end's requests, and how many there were before it came to this step's outputs
    states: Mapping[str, Any] = {}
    before = 0


def _know_all_names() -> None:
    """Let an object have every attribute once. The extension finds an attribute at the same place in all objects of a
    class once the interpreter knows all names that they may have, see place.c."""
    counts = Counts()
    for name in [n for n in vars(Counts) if not n.startswith("_")]:
        setattr(counts, name, getattr(Counts, name))


_know_all_names()


def make_counter() -> Counter:
    """The counter for the vLLM that is loaded. It counts what IterationStats.update_from_output does, output by output.

    Raises:
        LookupError: vLLM's classes are not where this kvhook knows them.
    """
    preempted = lookup(f"{EVENT}.PREEMPTED")
    add_prompt = _prompt_reader()
    if _step.native is not None:
        native: Counter = _step.native.Counter(preempted, add_prompt)
        return native

    def count(outputs: Iterable[Any], states: Mapping[str, Any], counts: Counts) -> None:
        generated = 0
        state_of = states.get
        for output in outputs:
            state = state_of(output.request_id)
            if state is None:  # aborted meanwhile: vLLM passes it over as well
                continue
            generated += len(output.new_token_ids)
            if state.is_prefilling:
                add_prompt(counts, output, state)
            if output.events is not None:
                for event in output.events:
                    if event.type == preempted:
                        counts.num_preempted_reqs += 1
        counts.num_generation_tokens += generated

    return count


def splits_prompt_tokens() -> bool:
    """Whether this vLLM says where prompt tokens came from, which it does since 0.16."""
    return _prompt_reader() is not _prompt_length


def _prompt_reader() -> Callable[[Counts, Any, Any], None]:
    output = lookup(OUTPUT)
    if has_field(output, "prefill_stats"):
        return _prefill_stats
    return _cached_tokens if has_field(output, "num_external_computed_tokens") else _prompt_length


def _prefill_stats(counts: Counts, output: Any, state: Any) -> None:
    """From 0.20."""
    prefill = output.prefill_stats
    if prefill is not None:
        counts.num_prompt_tokens += prefill.num_prompt_tokens
        counts.num_prompt_tokens_computed += prefill.num_computed_tokens
        counts.num_prompt_tokens_cached += prefill.num_cached_tokens
        counts.num_prompt_tokens_external += prefill.num_external_cached_tokens


def _cached_tokens(counts: Counts, output: Any, state: Any) -> None:
    """0.16 to 0.19."""
    counts.num_prompt_tokens += state.prompt_len
    counts.num_prompt_tokens_computed += state.prompt_len - output.num_cached_tokens
    counts.num_prompt_tokens_cached += output.num_cached_tokens
    counts.num_prompt_tokens_external += output.num_external_computed_tokens


def _prompt_length(counts: Counts, output: Any, state: Any) -> None:
    """Up to 0.15."""
    counts.num_prompt_tokens += state.prompt_len


#: What is handed over: everything below the scheduler's stats as at level full, and the counts.
_SCHEDULER = {"sched", "prefix", "connector", "spec"}
_SOURCES = (
    *(s for s in V1.sources if s.name in _SCHEDULER),
    Source(
        "counts",
        "kvhook.adapters.light:Counts",
        argument="iteration_stats",
        optional=True,
        flags=("has_iteration_stats",),
    ),
)
_SPLIT = "this vLLM does not split prompt tokens by where they came from"


def _light(read: Read) -> Read:
    """Where a column of level full comes from at level light."""
    if read.column in vars(Counts):
        split = read.column.startswith("num_prompt_tokens_")
        needs = "splits_prompt_tokens" if split else ""
        return Read(read.column, (f"counts.{read.column}",), needs=needs, unmet=_SPLIT)
    used = {source for expression in read.expressions for source, _ in attributes(expression)}
    return read if used and used <= _SCHEDULER else Read(read.column, (), LIGHT)


def _steps(full: Adapter) -> tuple[Read, ...]:
    lists = tuple(Read(name, (), LIGHT) for name in FULL_ONLY if name.startswith(("ttft_", "itl_")))
    finished = "counts.num_finished_reqs + counts.before - len(counts.states)"
    return (*map(_light, full.steps), Read("num_finished_reqs", (finished,)), *lists)


#: What is relied on: outputs, the states of requests, and how the output processor is called.
_RELIED_ON = (
    Target("", f"{PROCESSOR}.process_outputs", takes=("engine_core_outputs", "iteration_stats")),
    Target("", OUTPUT, field=(OUTPUT, "new_token_ids")),
    Target("", OUTPUT, field=(OUTPUT, "events")),
    Target("", f"{EVENT}.PREEMPTED"),
    Target("", STATE),
    MADE,
)
_SYNC = (
    Target("engine_init", f"{ENGINE}:LLMEngine.__init__", takes=("log_stats",)),
    Target("engine_step", f"{ENGINE}:LLMEngine.step"),
    Target("core", f"{CLIENT}.make_client", takes=("log_stats",)),
    Target("", f"{CLIENT}.get_output"),
    *_RELIED_ON,
)
_SINCE_0_9 = Target("", f"{LOGGERS}:StatLoggerBase.log_engine_initialized")

V1_LIGHT = V1._replace(
    name="v1-light",
    level="light",
    targets=(*_SYNC, _SINCE_0_9),
    tap="core",
    record=("scheduler_stats", "iteration_stats"),
    sources=_SOURCES,
    steps=_steps(V1),
    values=(),
    finished=Read("", ()),
    requests=tuple(Read(f.name, (), LIGHT) for f in REQUEST_FIELDS),
    unseen="vLLM's v1 engine has no such number",
    asks={"splits_prompt_tokens": splits_prompt_tokens},
    makes_stats_in=(),
    asserts_stats_until="",
    must_be_built=False,
)

#: 0.8, which counts its prefix cache in whole blocks.
V1_LIGHT_0_8 = V1_LIGHT._replace(
    name="v1-light-0.8",
    targets=_SYNC,
    must_be_built=True,
    steps=_steps(V1_NO_LOGGER),
    until="0.9.0",
    notes=V1_NO_LOGGER.notes,
)

_ON_EVENT_LOOP = (
    Target("engine_init", f"{ASYNC}:AsyncLLM.__init__", takes=("log_stats",)),
    Target("", f"{CLIENT}.get_output_async"),
    *_RELIED_ON,
)
#: AsyncLLM from 0.9.1.
ASYNC_LIGHT = V1_LIGHT._replace(
    name="v1-async-light",
    engine=ASYNC_LLM.engine,
    targets=(*_ON_EVENT_LOOP, _SINCE_0_9, Target("core", f"{CLIENT}.make_async_mp_client", takes=("log_stats",))),
    timed=False,
)
#: 0.8.5 to 0.9.0.1: AsyncLLM chooses the class of its client itself, and calls no ``make_client``.
_OWN_CHOICE = Target("core", f"{CLIENT_CLASS}.__init__", required=False, takes=("log_stats",))
#: AsyncLLM of 0.9.0.
ASYNC_LIGHT_0_9 = ASYNC_LIGHT._replace(
    name="v1-async-light-0.9",
    targets=(*_ON_EVENT_LOOP, _SINCE_0_9, Target("core", f"{CLIENT}.make_client", takes=("log_stats",)), _OWN_CHOICE),
    until="0.9.1",
)
#: AsyncLLM of 0.8.
ASYNC_LIGHT_0_8 = ASYNC_LIGHT._replace(
    name="v1-async-light-0.8",
    targets=(*_ON_EVENT_LOOP, Target("core", f"{CLIENT}.make_client", takes=("log_stats",)), _OWN_CHOICE),
    steps=V1_LIGHT_0_8.steps,
    until="0.9.0",
    notes=V1_LIGHT_0_8.notes,
)
