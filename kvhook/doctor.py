"""Would kvhook record here, and what? Everything is looked at, no engine is started."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import types
from typing import Any

from kvhook import _step
from kvhook.adapters import ADAPTERS, NEWEST, core
from kvhook.adapters.columns import FINISHED_HOOK
from kvhook.adapters.config import engine_facts
from kvhook.adapters.fit import check, choose, is_there
from kvhook.adapters.publisher import Compiled, compile_publisher
from kvhook.adapters.table import Adapter, release, vllm_version
from kvhook.errors import RingDirectoryError
from kvhook.recording.core_side import why_not_in_own_process
from kvhook.recording.installation import current_session
from kvhook.recording.recorder import process_facts
from kvhook.ring.place import ENV_DIR, find_directory
from kvhook.schema import REQUEST_FIELDS, STEP_FIELDS
from kvhook.trace import open_trace

#: Environment variables that change what kvhook meets or does.
ENVIRONMENT = (
    ENV_DIR,
    _step.ENV_PURE,
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "VLLM_USE_V1",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_PLUGINS",
    "PROMETHEUS_MULTIPROC_DIR",
    "WRAPT_DISABLE_EXTENSIONS",
)


@dataclasses.dataclass(frozen=True)
class TargetFound:
    """A place that kvhook patches: found, or missing and what that means."""

    role: str
    path: str
    found: bool
    required: bool
    says: str


@dataclasses.dataclass(frozen=True)
class EngineFound:
    """An engine class of this vLLM: the adapter that serves it, its targets, and its columns.

    ``absent`` holds a reason per column, for an engine with the default configuration.
    """

    engine: str
    adapter: str
    problems: list[str]
    targets: list[TargetFound]
    live: dict[str, list[str]]
    absent: dict[str, dict[str, str]]
    source: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `examine` found. ``problems`` is what keeps kvhook from recording, ``notes`` what is worth knowing."""

    kvhook: str
    python: str
    machine: str
    vllm: str
    newest_known: str
    engines: list[EngineFound]
    wrapt: str
    wrapt_c_extension: bool
    #: "c", or "python" where the extension is not there or not wanted
    step_path: str
    ring_directory: str
    ring_directory_free_bytes: int
    environment: dict[str, str]
    #: why the engine core of this vLLM is not recorded; empty if it is
    core_problems: list[str]
    #: why one in a process of its own is not; "" if it is
    own_process_problem: str
    problems: list[str]
    notes: list[str]
    #: how kvhook fares in this very process, where it is installed: `kvhook.recording.health.Health.as_dict`
    health: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, without the publishers' source."""
        found = dataclasses.asdict(self)
        for engine in found["engines"]:
            del engine["source"]
        return found


def examine(level: str = "full") -> Diagnosis:
    """Look at vLLM (its engine modules are imported, which takes some seconds), wrapt, the ring's place and the
    environment. Raises nothing.

    Args:
        level: of which level the hooks and columns are, see `kvhook.install`.
    """
    import wrapt

    problems: list[str] = []
    notes = [
        "vllm.LLM leaves vLLM's stats off unless disable_log_stats=False is given; kvhook.install() turns them on "
        "before the engine is built, without vLLM's own loggers"
    ]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    _import_vllm(problems)
    engines = [_engine(engine, level) for engine in dict.fromkeys(a.engine for a in ADAPTERS) if _is_there(engine)]
    problems += [f"{e.engine}: {problem}" for e in engines for problem in e.problems]
    if vllm_version() and not engines and not problems:
        problems.append(f"vLLM {vllm_version()} has no engine class that this kvhook knows")
    if release(vllm_version()) > release(NEWEST):
        notes.append(f"vLLM {vllm_version()} is newer than this kvhook knows ({NEWEST}); the nearest adapter serves it")
    directory, free = "", 0
    try:
        place = find_directory()
        directory, free = str(place), shutil.disk_usage(place).free
    except RingDirectoryError as error:
        problems.append(str(error))
    extension = wrapt.FunctionWrapper.__module__ != "wrapt.wrappers"
    if not extension:
        notes.append(
            "wrapt has no C extension here: each step costs some 2 us more. pip install --force-reinstall wrapt"
        )
    if _step.native is None:
        notes.append(
            f"the step path runs in Python ({_step.why_not}): the same records, at some 20 us more a step after a "
            f"forward pass. In C it needs a wheel for this Python or a C compiler, and {_step.ENV_PURE} not set: "
            "pip install --force-reinstall --no-deps kvhook"
        )
    return Diagnosis(
        kvhook=str(process_facts()["kvhook"]),
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        vllm=vllm_version(),
        newest_known=NEWEST,
        engines=engines,
        wrapt=importlib.metadata.version("wrapt"),
        wrapt_c_extension=extension,
        step_path="python" if _step.native is None else "c",
        ring_directory=directory,
        ring_directory_free_bytes=free,
        environment=environment,
        core_problems=core.problems() if any("v1" in e.adapter for e in engines) else ["vLLM's V1 engine is not here"],
        own_process_problem=why_not_in_own_process(),
        problems=problems,
        notes=notes,
        health=_health(notes),
    )


def _health(notes: list[str]) -> dict[str, Any] | None:
    session = current_session()
    if session is None or session.belongs_to_parent:
        return None
    health = session.health()
    notes += [f"in this process, {line.strip()}" for line in str(health).splitlines()]
    return health.as_dict()


def examine_run(path: str) -> list[str]:
    """What went wrong while a run was recorded, in lines: what failed inside kvhook, and what is lost.

    Raises:
        KvhookError: it cannot be opened.
    """
    trace = open_trace(path)
    meta = trace.meta
    cores = trace.cores()
    lines = [f"{where} failed: {error}" for where, error in meta.get("faults", {}).items()]
    lines += [f"the engine core is not recorded to its end: {f['failed']}" for f in cores.facts if f.get("failed")]
    lost = {"lost": meta["records_lost"] + cores.lost, "damaged": meta["damaged"]}
    lines += [f"{count:,} records are {what}" for what, count in lost.items() if count]
    lines += [f"{engine['steps_without_times']}" for engine in meta["engines"] if engine.get("steps_without_times")]
    return lines


def _import_vllm(problems: list[str]) -> None:
    """Import the modules that kvhook patches, as far as this vLLM has them."""
    if importlib.util.find_spec("vllm") is None:
        problems.append("vLLM is not installed in this Python: pip install vllm, or run the Python that has it")
        return
    # vLLM says a good deal while it is imported; what matters here is said in the diagnosis
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for module in dict.fromkeys([*(a.trigger for a in ADAPTERS), *core.MODULES]):
        try:
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
        except ModuleNotFoundError:
            continue  # an engine that this vLLM does not have (any more, or yet)
        except Exception as error:
            problems.append(f"{module} cannot be imported: {type(error).__name__}: {error}")


def _is_there(engine: str) -> bool:
    return any(is_there(adapter) for adapter in ADAPTERS if adapter.engine == engine)


def _engine(engine: str, level: str) -> EngineFound:
    adapter, _, problems = choose(engine, level)
    compiled: Compiled | None = None
    try:
        compiled = compile_publisher(adapter, _default_facts(adapter))
    except LookupError as error:
        problems = problems or [str(error)]
    absent = compiled.absent if compiled else {"step": {}, "request": {}}
    live = {
        kind: [f.name for f in fields if compiled and f.name not in absent[kind]]
        for kind, fields in (("step", STEP_FIELDS), ("request", REQUEST_FIELDS))
    }
    targets = [_target(adapter, i) for i in range(len(adapter.targets))]
    return EngineFound(engine, adapter.name, problems, targets, live, absent, compiled.source if compiled else "")


def _target(adapter: Adapter, i: int) -> TargetFound:
    target = adapter.targets[i]
    path = f"{target.path}.{target.field[1]}" if target.field and target.path == target.field[0] else target.path
    try:
        check(target)
    except LookupError as error:
        loss = f"; without it: {target.loss}" if target.loss else ""
        return TargetFound(target.role, path, False, target.required, f"{error}{loss}")
    return TargetFound(target.role, path, True, target.required, "")


def _default_facts(adapter: Adapter) -> dict[str, Any]:
    """Facts of an engine as most people make it: on the loaded vLLM's defaults, with some KV blocks."""
    cache = types.SimpleNamespace(num_gpu_blocks=1000, block_size=16, enable_prefix_caching=True)
    config = types.SimpleNamespace(cache_config=cache)
    hooked = any(t.role == "finished" and _target(adapter, i).found for i, t in enumerate(adapter.targets))
    return engine_facts(adapter, types.SimpleNamespace(vllm_config=config)) | {FINISHED_HOOK: hooked}
