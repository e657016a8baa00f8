"""Real engines: the CPU build of vLLM over a tiny model. One process, one import of vLLM, an engine per fixture."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine import vllm_here
from tests.workloads import Seen, observe, workload

# Before vLLM is imported: quick to start, nothing fetched, nothing reported, the core in this process. The log's
# interval is short, so that a line that should not be there has its chance to appear.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # one thread, on any core: two would wait for each other ten times as long as they work if others use the machine
    "OMP_NUM_THREADS": "1",
    # numba's first parallel loop (the n-gram drafter) would otherwise set the number of OpenMP's threads for torch, too
    "NUMBA_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_LOG_STATS_INTERVAL": "0.05",
}

MakeLLM = Callable[..., Any]

#: V0 is another engine, with truths of its own.
_V1 = (
    "test_truth.py",
    "test_faults.py",
    "test_seams.py",
    "test_others.py",
    "test_many.py",
    "test_harmless.py",
    "test_light.py",
    "test_light_over_budget.py",
    "test_own_process.py",
    "test_light_own_process.py",
    "test_collector.py",
    "test_check.py",
    "test_core.py",
    "test_tensor_parallel.py",
    "test_whatif.py",
    "test_diagnosis.py",
    "test_shown.py",
    "settings",
    "test_scripts.py",
    "test_server.py",
)
collect_ignore = list(_V1) if vllm_here.V0 else ["test_v0.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            # vLLM's own, once per engine
            item.add_marker(pytest.mark.filterwarnings("ignore:.*reduce_op.*:FutureWarning"))
            if missing:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed here; `make test` installs its CPU build")
                )


@pytest.fixture(scope="session")
def engine_environment() -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", vllm_here.no_binding())
        yield {**os.environ}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from kvhook.demo.model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def make_llm(engine_environment: dict[str, str], model: str) -> MakeLLM:
    """Makes an engine in this process: some ten seconds for the first, a quarter of a second for each more.

    When vLLM deletes an engine it takes down what the others in the process need: several may live together, but
    once one of them is gone the others can run no more.
    """
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    vllm_here.stand_numba()

    def make(**options: Any) -> Any:
        vllm_here.collect_engines()
        llm = LLM(model=model, **vllm_here.options() | options)
        vllm_here.end_workers_with(llm.llm_engine)
        return llm

    return make


class Recorded(NamedTuple):
    """A workload as vLLM shows it (`seen`) and as kvhook recorded it."""

    seen: Seen
    session: Any
    steps: Any
    requests: Any
    summary: Any

    def total(self, column: str) -> int:
        return int(self.steps[column].sum())

    def lacks(self, *columns: str, kind: str = "step") -> bool:
        """Whether this vLLM's code has no such number; then kvhook must not have it either, and say why."""
        missing = vllm_here.absent(kind) & set(columns)
        (engine,) = self.session.meta["engines"]
        assert missing <= engine["absent"][kind].keys()
        assert not missing & set((self.requests if kind == "request" else self.steps).dtype.names)
        return bool(missing)

    def per_request(self, column: str, of_output: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
        """A column of the finished requests, and what their outputs say. In the order of the outputs; where vLLM does
        not say which request finished, as a whole."""
        said = [of_output(one) for one in self.seen.outputs]
        if self.lacks("request_id", kind="request"):
            return sorted(self.requests[column].tolist()), sorted(said)
        by_id = dict(zip(self.requests["request_id"].tolist(), self.requests[column].tolist(), strict=True))
        return [by_id[int(one.request_id)] for one in self.seen.outputs], said


def record(make_llm: MakeLLM, install: dict[str, Any] | None = None, **options: Any) -> Recorded:
    """The workload on an engine with these options, under a kvhook that was installed with those arguments."""
    import kvhook

    kvhook.uninstall()
    # vLLM has long been imported: install() comes after the import here, before it in test_own_process.py
    with kvhook.install(**(install or {})) as session:
        llm = make_llm(**options)
        seen = observe(llm, workload())
        return Recorded(seen, session, session.steps(), session.requests(), session.summary())


@pytest.fixture
def nothing_installed() -> Iterator[None]:
    """Neither before a test nor after it."""
    import kvhook

    kvhook.uninstall()
    yield
    kvhook.uninstall()


@pytest.fixture(scope="session")
def bare(make_llm: MakeLLM) -> Seen:
    """The workload without kvhook, vLLM's stats on."""
    import kvhook

    kvhook.uninstall()
    llm = make_llm(disable_log_stats=False)
    return observe(llm, workload())


@pytest.fixture(scope="session")
def bare_default(make_llm: MakeLLM) -> Seen:
    """The workload without kvhook, vLLM's stats off, as LLM has them by default."""
    import kvhook

    kvhook.uninstall()
    llm = make_llm()
    return observe(llm, workload())


@pytest.fixture(scope="session")
def stats_on(make_llm: MakeLLM) -> Recorded:
    """The workload with kvhook; the user has vLLM's stats on."""
    return record(make_llm, disable_log_stats=False)


@pytest.fixture(scope="session")
def stats_off(make_llm: MakeLLM) -> Recorded:
    """The workload with kvhook; the user has left vLLM's stats off."""
    return record(make_llm)


@pytest.fixture(params=["stats_on", "stats_off"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    """Both."""
    both: Recorded = request.getfixturevalue(request.param)
    return both
