"""Engine cores without a model: vLLM's scheduler and block pool are real, what the model would say is played."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvhook.core.recorder import CoreRecorder
from kvhook.records.core import CoreRecords


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if here in item.path.parents and "driver" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.engine)
            if missing:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed here; `make test` installs its CPU build")
                )


class Recording:
    """A `Driver` whose core is recorded."""

    def __init__(self, driver: Any, directory: Path, *, ledger: bool = False) -> None:
        from kvhook.adapters.core import read_core
        from kvhook.core.ledger import LedgerRing

        self.driver, self.faults = driver, list[BaseException]()
        self.core = read_core(driver.scheduler)
        level = "blocks" if ledger else "steps"
        self.recorder = CoreRecorder(0, self.core, directory, 1 << 16, {"core_level": level})
        self.ledger = LedgerRing(0, directory, 1 << 14, {"serial": 0}) if ledger else None
        self.recorder.follow(self.core, self.faults.append, self.ledger)

    def read(self) -> CoreRecords:
        """What was recorded, out of the ring."""
        from kvhook.records.sources import ArraySlots
        from kvhook.ring.reader import RingReader

        assert self.faults == []
        sources = []
        for recorded in (self.recorder, self.ledger):
            if recorded is not None:
                with RingReader(recorded.ring.path) as reader:
                    sources.append([ArraySlots(reader.now(), reader.header)])
        return CoreRecords(sources[:1], "test", ledgers=sources[1:])


@pytest.fixture(scope="session")
def core_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from kvhook.demo.model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def driver(core_model: str, tmp_path: Path) -> Iterator[Callable[..., Recording]]:
    """Makes a driver whose core is recorded, ``driver(blocks=..., **settings)``."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from tests.core.scheduler_here import Driver

    made: list[Recording] = []

    def make(*, ledger: bool = False, **settings: Any) -> Recording:
        rings = tmp_path / f"rings{len(made)}"
        rings.mkdir()
        made.append(Recording(Driver(core_model, **settings), rings, ledger=ledger))
        return made[-1]

    yield make
    for recording in made:
        recording.recorder.stop()
        recording.recorder.close()
