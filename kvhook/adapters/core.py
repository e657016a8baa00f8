"""vLLM's engine core from 0.8.3: where the scheduler, the KV cache manager and the block pool keep each number.

Everything is looked up on the scheduler that has just been built, so that a subclass of it (vLLM's AsyncScheduler,
a user's own) is read as it is. What drifted:

==========================  =====================================================================================
what                        where it is, by release
==========================  =====================================================================================
waiting requests            ``waiting``; from 0.18 also ``skipped_waiting``; from 0.31 also ``kv_holding_waiting``
the deferred part of them   from 0.18 ``skipped_waiting``, from 0.31 ``deferred_waiting`` (they stay in the queues)
a preemption                up to 0.11 inside ``schedule``, seen where the blocks are freed; from 0.12
                            ``_preempt_request``
hashes of a request         up to 0.10.0 ``KVCacheManager.req_to_block_hashes``; from 0.10.1 ``Request.block_hashes``
hash of a cached block      up to 0.9.0 a tuple; 0.9.1 to 0.10.1 a tuple in a tuple; from 0.10.2 bytes with the group's
                            number behind them
blocks of a scheduled       up to 0.8 a list; from 0.9.0 a list or tuple of lists, one for each group
request
blocks that are touched     up to 0.9.0 a list; 0.9.1 to 0.13 a tuple of lists, one for each group; from 0.14 a list
most running requests       ``max_num_running_reqs``; from 0.31 ``max_num_active_reqs``
``is_null``                 from 0.9.1; before, the one ``null_block``
computed tokens             from 0.8.3 counted in ``schedule``; before, in ``update_from_output``
data-parallel rank          up to 0.13 ``parallel_config.data_parallel_rank``; from 0.14 ``data_parallel_index``
look-up with a connector    from 0.27 ``get_computed_blocks_for_connector``, which calls the other one in most cases
==========================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from kvhook.adapters.core_facts import absent_in, facts_of
from kvhook.adapters.table import Read, Target, attributes, has_field, lookup, read_path, release, vllm_version

#: The first vLLM whose engine core can be recorded.
OLDEST = (0, 8, 3)
_TOO_OLD = (
    "engine cores are recorded from vLLM 0.8.3 on: before, the scheduler counted the computed tokens of a step only "
    "when the step was over, so that no step could be taken apart"
)

SCHEDULER = "vllm.v1.core.sched.scheduler"
CORE = "vllm.v1.engine.core"
_UTILS = "vllm.v1.core.kv_cache_utils"

#: The modules whose import is waited for, and what is patched in each: all schedulers pass here, and all ends of cores.
INIT = Target("scheduler_init", f"{SCHEDULER}:Scheduler.__init__")
SHUTDOWN = Target("core_shutdown", f"{CORE}:EngineCore.shutdown", required=False)

#: What is put in front of methods of the scheduler's objects: object -> its methods. They are called as before.
METHODS: Mapping[str, tuple[str, ...]] = {
    "sched": ("schedule", "update_from_output", "make_stats", "add_request", "_free_request"),
    "manager": ("get_computed_blocks",),
    "pool": ("get_new_blocks", "_maybe_evict_cached_block", "touch", "free_blocks", "reset_prefix_cache"),
}
#: The first of these that is there tells of preemptions.
PREEMPTS: tuple[tuple[str, str], ...] = (("sched", "_preempt_request"), ("manager", "free"))
#: Methods that only some releases have.
OPTIONAL: Mapping[str, tuple[str, ...]] = {"pool": ("unpin_blocks",)}

#: The objects that everything hangs on, as paths from the scheduler.
OBJECTS: Mapping[str, str] = {
    "manager": "kv_cache_manager",
    "pool": "kv_cache_manager.block_pool",
    "queue": "kv_cache_manager.block_pool.free_block_queue",
}

#: The classes that these are of, or subclasses of: what can be asked without a scheduler.
OWNERS: Mapping[str, str] = {
    "sched": f"{SCHEDULER}:Scheduler",
    "manager": "vllm.v1.core.kv_cache_manager:KVCacheManager",
    "pool": "vllm.v1.core.block_pool:BlockPool",
}

#: The modules that all this is in.
MODULES = (SCHEDULER, CORE)

#: Classes of what comes and goes: what their instances have is asked of the class.
CLASSES: Mapping[str, str] = {
    "out": "vllm.v1.core.sched.output:SchedulerOutput",
    "request": "vllm.v1.request:Request",
}

#: What is read in each step or for each request: name -> expressions, of which the first that this vLLM has is taken.
#: ``needs`` is not used here.
READS: tuple[Read, ...] = (
    Read(
        "waiting",
        (
            "len(sched.waiting) + len(sched.kv_holding_waiting)",
            "len(sched.waiting) + len(sched.skipped_waiting)",
            "len(sched.waiting)",
        ),
    ),
    Read(
        "skipped",
        ("len(sched.deferred_waiting)", "len(sched.skipped_waiting)"),
        "this vLLM does not tell the deferred requests from the others that wait",
    ),
    Read(
        "queues",
        ("(sched.kv_holding_waiting, sched.waiting)", "(sched.skipped_waiting, sched.waiting)", "(sched.waiting,)"),
    ),
    Read("budget", ("sched.max_num_scheduled_tokens",)),
    Read(
        "places",
        (
            "sched.max_num_active_reqs - sched.num_waiting_for_streaming_input",
            "sched.max_num_running_reqs - sched.num_waiting_for_streaming_input",
            "sched.max_num_running_reqs",
        ),
    ),
    Read("paused", ("sched.pause_state.value != 0",), "this vLLM cannot be paused"),
    Read("computed", ("request.num_computed_tokens",)),
    Read("prompt", ("request.prompt_token_ids",)),
    Read("client_index", ("request.client_index",), "this vLLM's engine core does not tell its front ends apart"),
    Read("hashes", ("request.block_hashes", "manager.req_to_block_hashes.get(request.request_id, ())")),
)

#: What all releases have, and every step asks for.
EXPRESSIONS: Mapping[str, str] = {
    "running": "len(sched.running)",
    "requests": "sched.running",
    "free": "queue.num_free_blocks",
    "tokens": "output.num_scheduled_tokens",
    "total": "output.total_num_scheduled_tokens",
    "drafts": "output.scheduled_spec_decode_tokens",
    "new_reqs": "output.scheduled_new_reqs",
}
#: Of all these, what ``reads["states"]`` gives.
STATES = ("budget", "waiting", "skipped", "running", "free")

#: The hash of a request's block, and that of a cached block, as something both can be compared by; and the KV cache
#: group of a cached block, which newer releases append to its hash.
_HASHES: tuple[tuple[str, str, str, str, str], ...] = (
    # a name that only these releases have, and the three expressions
    (f"{_UTILS}:get_block_hash", "", "hash", "get_block_hash(key)", "int.from_bytes(key[-4:], 'big')"),
    (
        f"{_UTILS}:BlockHashWithGroupId",
        "block_hash",
        "hash.hash_value",
        "key.block_hash.hash_value",
        "key.group_id",
    ),
    (f"{_UTILS}:BlockHashType", "hash_value", "hash.hash_value", "key.hash_value", "0"),
)
#: The names of these functions, and of what each is given.
_OF_HASHES = (("hash_of_request", "hash"), ("hash_of_block", "key"), ("group_of_block", "key"))


class Core(NamedTuple):
    """What was found on a scheduler: its objects, functions that read it, facts, and what is absent and why."""

    sched: Any
    manager: Any
    pool: Any
    queue: Any
    reads: Mapping[str, Callable[..., Any]]
    #: what is read in each step, as expressions over these objects, ``output`` and ``request``
    expressions: Mapping[str, str]
    facts: dict[str, Any]
    #: column of a core step -> why it is not known here
    absent: dict[str, str]
    #: object, method: what is to be wrapped
    methods: tuple[tuple[Any, str], ...]
    preempt: str


def read_core(sched: Any) -> Core:
    """Everything that kvhook needs of a scheduler.

    Raises:
        LookupError: this vLLM's engine core lacks something; the message says what. Nothing has been changed.
    """
    if why := too_old():
        raise LookupError(why)
    found: dict[str, Any] = {"sched": sched}
    for name, path in OBJECTS.items():
        found[name] = read_path(sched, path)
        if found[name] is None:
            raise LookupError(f"the scheduler has no {path}")
    methods = [(found[owner], name) for owner, names in METHODS.items() for name in names]
    for owner, name in methods:
        if not callable(getattr(owner, name, None)):
            raise LookupError(f"{type(owner).__name__} has no {name}")
    preempt = next((p for p in PREEMPTS if callable(getattr(found[p[0]], p[1], None))), None)
    if preempt is None:
        raise LookupError("the scheduler has nothing that tells of preemptions")
    methods.append((found[preempt[0]], preempt[1]))
    methods += [(found[o], n) for o, names in OPTIONAL.items() for n in names if callable(getattr(found[o], n, None))]
    reads, expressions, absent = _reads(found)
    facts = facts_of(sched, found)
    absent |= absent_in(facts)
    return Core(
        sched,
        found["manager"],
        found["pool"],
        found["queue"],
        reads,
        expressions,
        facts,
        absent,
        tuple(methods),
        preempt[1],
    )


def too_old() -> str:
    """Why the engine core of the loaded vLLM is not recorded because of its age; "" if it is not too old."""
    return _TOO_OLD if () < release(vllm_version()) < OLDEST else ""


def problems() -> list[str]:
    """What the engine core of the loaded vLLM lacks, as far as its classes tell; empty if it can be recorded."""
    if why := too_old():
        return [why]
    found: list[str] = []
    classes: dict[str, Any] = {}
    for name, path in {**OWNERS, **CLASSES}.items():
        try:
            classes[name] = lookup(path)
        except LookupError as error:
            found.append(str(error))
    for owner, names in METHODS.items():
        if owner in classes:
            cls = classes[owner]
            found += [f"{cls.__name__} has no {name}" for name in names if not callable(getattr(cls, name, None))]
    try:
        _hash_functions()
    except LookupError as error:
        found.append(str(error))
    return found


def _reads(found: dict[str, Any]) -> tuple[dict[str, Callable[..., Any]], dict[str, str], dict[str, str]]:
    """The functions that read numbers, each of ``(request)``; the expressions of what each step reads; and the columns
    that this vLLM has not."""
    absent: dict[str, str] = {}
    reads: dict[str, Callable[..., Any]] = {}
    chosen: dict[str, str] = {}
    classes = {name: lookup(path) for name, path in CLASSES.items()}
    for read in READS:
        expression = next((e for e in read.expressions if _resolves(e, found, classes)), "")
        if not expression:
            if not read.absent:
                raise LookupError(f"the engine core has no {' or '.join(read.expressions)}")
            absent[read.column] = read.absent
            continue
        chosen[read.column] = expression
        reads[read.column] = eval(f"lambda request=None: {expression}", dict(found))
    expressions = {name: chosen.get(name, "-1") for name in ("budget", "waiting", "skipped", "places", "computed")}
    expressions |= EXPRESSIONS
    # what every step asks for, in one call
    states = [expressions[name] for name in STATES]
    reads["states"] = eval(f"lambda: ({', '.join(states)})", dict(found))
    reads |= _hash_functions() | {"new_blocks": _new_blocks}
    return reads, expressions, absent


def _new_blocks(output: Any) -> Iterable[tuple[str, Any]]:
    """The blocks that requests got in a step: request id and, for each group, block numbers; or None."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, _groups_of(new.block_ids)
    cached = output.scheduled_cached_reqs
    if isinstance(cached, list):  # up to 0.9.1 an object for each request
        yield from ((one.req_id, _groups_of(one.new_block_ids)) for one in cached)
    else:
        yield from zip(cached.req_ids, cached.new_block_ids, strict=True)


def _groups_of(blocks: Any) -> Any:
    """Block numbers for each group; up to 0.8 there is one group, and its list stands alone."""
    return [blocks] if blocks and isinstance(blocks[0], int) else blocks


def _resolves(expression: str, found: dict[str, Any], classes: dict[str, type]) -> bool:
    for name, attribute in attributes(expression):
        if name in classes:
            cls = classes[name]
            made = getattr(vars(cls).get("__init__"), "__code__", None)
            if not has_field(cls, attribute) and attribute not in getattr(made, "co_names", ()):
                return False
        elif not hasattr(found[name], attribute):
            return False
    return True


def _hash_functions() -> dict[str, Callable[[Any], Any]]:
    for path, attribute, *expressions in _HASHES:
        try:
            there = lookup(path)
        except LookupError:
            continue
        if attribute and not hasattr(there, attribute):
            continue
        names = {path.rpartition(":")[2]: there}
        return {
            name: eval(f"lambda {argument}: {expression}", dict(names))
            for (name, argument), expression in zip(_OF_HASHES, expressions, strict=True)
        }
    raise LookupError("this vLLM's block hashes are of a kind that kvhook does not know")
