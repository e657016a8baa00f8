"""One engine after the other, and the cases that are run on it under kvhook."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest

import kvhook
from kvhook.window import Window, position
from tests.engine import vllm_here
from tests.engine.settings import cases, release
from tests.engine.settings.cases import Case, Settings
from tests.engine.settings.core_view import Batch, Request, Step, View
from tests.engine.settings.drive import Asked, Driver
from tests.engine.settings.prefix_model import Model, Prediction, Rules

#: The same for all engines.
COMMON: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "seed": 0,
    "use_tqdm_on_load": False,
}
ON_GPU = os.environ.get("KVHOOK_ENGINE") == "gpu"
if ON_GPU:
    # an engine takes nearly all of a GPU's memory otherwise, and the next one finds none
    COMMON["gpu_memory_utilization"] = 0.15


#: kind of engine -> [cases run, those that the reference model predicted to the end], for the last lines of a run
_counted: dict[str, list[int]] = {}
_engines = 0


def told() -> list[str]:
    if not _counted:
        return []
    cases_run, exact = (sum(one[i] for one in _counted.values()) for i in (0, 1))
    kinds = ", ".join(f"{count[0]} {kind} ({count[1]})" for kind, count in sorted(_counted.items()))
    return [f"{cases_run} cases on {_engines} engines, {exact} predicted to the end by the reference model: {kinds}"]


@dataclasses.dataclass
class Ran:
    """A case as it was run: what was asked and came back, what the core did, what kvhook recorded of it."""

    case: Case
    asked: list[Asked]
    core: list[Step]
    requests: list[Request]
    steps: Any
    rows: Any
    first_step: int
    absent: dict[str, dict[str, str]]
    faults: dict[str, int]
    latencies: dict[str, int]
    #: by how much the numbers of the session's summary rose
    summed: dict[str, int]
    #: the summary of this case alone
    summary: Any
    #: of the whole session up to here
    accounts: list[Any]
    prediction: Prediction
    asynchronous: bool
    #: the engine has a prefix cache
    caching: bool
    #: what the scheduler and its pool held after each `schedule`, and what kvhook recorded inside the core
    batches: list[Batch]
    core_steps: Any
    core_requests: Any

    @property
    def full(self) -> bool:
        return self.case.settings.level == "full"

    def has(self, *columns: str, kind: str = "step") -> bool:
        """Whether all are recorded; one that is not must have its reason."""
        names = (self.steps if kind == "step" else self.rows).dtype.names or ()
        lacking = [column for column in columns if column not in names]
        for column in lacking:
            assert column in self.absent[kind], self.say(f"{column} is neither recorded nor absent with a reason")
        return not lacking

    def say(self, text: str) -> str:
        return f"{text}\n  {self.case.text}"

    def same(self, what: str, recorded: Any, expected: Any) -> None:
        """Both are lists, one entry per step or request, or plain values."""
        if recorded == expected:
            return
        text = f"{what}: {recorded!r} instead of {expected!r}"
        if isinstance(recorded, list) and isinstance(expected, list):
            text = f"{what}: {_difference(recorded, expected)}"
        raise AssertionError(self.say(text))


def _difference(recorded: list[Any], expected: list[Any]) -> str:
    if len(recorded) != len(expected):
        extra = [one for one in recorded if one not in expected]
        lacking = [one for one in expected if one not in recorded]
        return f"{len(recorded)} instead of {len(expected)}; only recorded: {extra}; lacking: {lacking}"
    wrong = [(i, r, e) for i, (r, e) in enumerate(zip(recorded, expected, strict=True)) if r != e]
    told = ", ".join(f"[{i}] {r!r} instead of {e!r}" for i, r, e in wrong[:6])
    text = f"{len(wrong)} of {len(recorded)} differ: {told}"
    if all(isinstance(one, (int, float)) for one in recorded + expected):
        text += f"; in all {sum(recorded)} instead of {sum(expected)}"
    return text


class Opened(NamedTuple):
    """An engine, kvhook's session over it, and what watches and drives it."""

    settings: Settings
    session: kvhook.Session
    llm: Any
    view: View
    driver: Driver

    def latencies(self) -> dict[str, int]:
        series = ("time_to_first_token", "inter_token_latency")
        return {name: int(np.sum(self.session.latencies(name)[1])) for name in series}

    def summed(self) -> dict[str, int]:
        return {name: value for name, value in self.session.summary().as_dict().items() if type(value) is int}


class Bench:
    """Keeps the engine of the last case, for the next one that wants the same."""

    def __init__(self, make_llm: Callable[..., Any]) -> None:
        self.make_llm = make_llm
        self.opened: Opened | None = None
        #: the cases that were run on it
        self.before: list[Case] = []
        #: numbers of settings with which this vLLM makes no engine -> why
        self.not_made: dict[int, str] = {}
        self.forced = contextlib.ExitStack()

    def close(self) -> None:
        self.opened = None
        kvhook.uninstall()
        gc.collect()
        self.forced.close()
        _freeze()

    def _open(self, settings: Settings) -> Opened:
        if self.opened is not None and self.opened.settings == settings:
            return self.opened
        self.close()
        session = kvhook.install(level=settings.level)
        self.forced.enter_context(forced(settings))
        options = COMMON | settings.options | of_kind(settings)
        llm = self.make_llm(**options, disable_log_stats=not settings.stats_on)
        view = View(llm.llm_engine)
        self.opened, self.before = Opened(settings, session, llm, view, Driver(llm, view.step)), []
        global _engines
        _engines += 1
        return self.opened

    def run(self, seed: int) -> Ran:
        case = cases.case(seed, release.can())
        why = self.not_made.get(case.settings.number)
        if why is None:
            try:
                ran = self._run(case, self._open(case.settings))
                self.before.append(case)
                return ran
            except Exception as error:
                self.close()  # what it left behind would be the next case's
                if "kvhook" in type(error).__module__ or not self._fails_alone(case, error):
                    raise
                why = repr(error)
        # pytest keeps what is raised here. Raised above, it would keep the engine in the traceback, and its worker
        leave_out(seed, why)

    def _fails_alone(self, case: Case, error: Exception) -> bool:
        """Whether an engine without kvhook raises the same: when it is made, or in this case. With asynchronous
        scheduling the last batch of a case is read in the next one, so that the cases before it are run there, too."""
        options = COMMON | case.settings.options | of_kind(case.settings)
        driver = None
        with forced(case.settings):
            try:
                llm = self.make_llm(**options, disable_log_stats=not case.settings.stats_on)
                driver = Driver(llm, View(llm.llm_engine).step)
                for one in (*self.before, case):
                    llm.llm_engine.reset_prefix_cache()
                    driver.run(one)
            except type(error) as again:
                if str(again) != str(error) or where(again) != where(error):
                    return False
                if driver is None:
                    self.not_made[case.settings.number] = repr(error)
                return True
            finally:
                driver = llm = None
                gc.collect()
        return False

    def _run(self, case: Case, on: Opened) -> Ran:
        session, view = on.session, on.view
        core_rows = len(session.core_requests())
        first, rows, before = len(session.steps()), len(session.requests()), position(session.trace())
        latencies, summary = on.latencies(), on.summed()
        # each case begins with an empty cache, and with nothing counted, so that it is the same whatever was run before
        if view.steps and not view.steps[-1].stats:
            view.scheduler.make_stats()
        on.llm.llm_engine.reset_prefix_cache()
        view.begin()
        with view.watching():
            asked = on.driver.run(case)
        (engine,) = session.meta["engines"]
        prediction = Model(rules(case.settings, view), view.requests).replay(view.timeline)
        count = _counted.setdefault(case.settings.kind, [0, 0])
        count[0] += 1
        count[1] += prediction.exact
        return Ran(
            case=case,
            asked=asked,
            core=view.steps,
            requests=view.requests,
            steps=session.steps()[first:],
            rows=session.requests()[rows:],
            first_step=first,
            absent=engine["absent"],
            faults=session.faults,
            latencies={name: count - latencies[name] for name, count in on.latencies().items()},
            accounts=session.summary().accounts,
            summed={name: count - summary.get(name, 0) for name, count in on.summed().items()},
            summary=Window(session.trace(), before).summary(),
            prediction=prediction,
            asynchronous=view.asynchronous,
            caching=view.caching,
            batches=view.batches,
            core_steps=session.core_steps(),
            core_requests=session.core_requests()[core_rows:],
        )


def leave_out(seed: int, error: str) -> NoReturn:
    """This vLLM fails by itself, with kvhook and without."""
    release.left_out[f"this vLLM fails in them, without kvhook as well: {error}"] += 1
    pytest.skip(f"this vLLM fails in seed {seed}, without kvhook as well: {error}")


def where(error: BaseException) -> str:
    """The place that raised an exception."""
    return "{0.filename}:{0.lineno}".format(traceback.extract_tb(error.__traceback__)[-1])


_freeze = gc.freeze


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """vLLM collects garbage nine times per engine, over all that torch and vLLM ever imported: six of the eight seconds
    that an engine takes. Here what lives without an engine is set aside, each time that there is none."""
    freeze, unfreeze = gc.freeze, gc.unfreeze
    gc.freeze = gc.unfreeze = lambda: None
    try:
        yield
    finally:
        gc.freeze, gc.unfreeze = freeze, unfreeze
        gc.unfreeze()


def rules(settings: Settings, view: View) -> Rules:
    options = settings.options
    return Rules(
        blocks=view.pool.num_gpu_blocks - 1,
        block_size=options["block_size"],
        chunk=options["max_num_batched_tokens"],
        seqs=options["max_num_seqs"],
        caching=view.caching,
        by_priority="scheduling_policy" in options,
        unhashed_first=release.unhashed_first(),
        last_look_up_told=release.last_look_up_told(),
    )


def of_kind(settings: Settings) -> dict[str, Any]:
    if settings.kind != "pooling":
        return {}
    return {"runner": "pooling"} if release.says("engine/arg_utils.py", "runner: ") else {"task": "embed"}


@contextlib.contextmanager
def forced(settings: Settings) -> Iterator[None]:
    """While an engine lives: what vLLM does not let one have on a CPU, although it works."""
    vllm_here.stand_numba()
    with contextlib.ExitStack() as stack:
        if settings.kind == "overlapped" and not ON_GPU:
            stack.enter_context(_asynchronous())
        yield


@contextlib.contextmanager
def _asynchronous() -> Iterator[None]:
    """The CPU's platform switches asynchronous scheduling off: it is switched on again. The model runner then copies
    its outputs on a stream of its own, which a CPU has not got; newer releases do without by themselves."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from vllm.platforms.cpu import CpuPlatform  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.worker import cpu_model_runner  # type: ignore[import-not-found, unused-ignore]

    original = CpuPlatform.__dict__["check_and_update_config"]

    def check(cls: Any, config: Any) -> None:
        original.__func__(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check))
        patch.setattr(cpu_model_runner, "_torch_cuda_wrapper", contextlib.nullcontext, raising=False)
        patch.setattr(torch.cuda, "current_stream", lambda *_: None)
        patch.setattr(torch.cuda, "stream", lambda *_: contextlib.nullcontext())
        for owner, name in ((torch.cuda, "Stream"), (torch.cuda, "Event"), (torch, "Event")):
            patch.setattr(owner, name, _NoStream)
        yield


class _NoStream:
    """A stream, or an event of one, where everything is done as soon as it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = None

    def wait_stream(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...
