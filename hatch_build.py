"""Builds the step path in C (`kvhook/_step`) along with the package, where that can be done.

Nothing depends on it. Without a C compiler, without Python's headers, or with ``KVHOOK_PURE=1`` in the environment the
package is built without it, and kvhook records on its Python path; `kvhook doctor` says which one it is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "kvhook._step.native"
FOLDER = Path("kvhook/_step")


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the extension to a wheel, or puts it beside its sources for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made; `version` is "standard" or "editable"."""
        if os.environ.get("KVHOOK_PURE", "0") not in ("", "0"):
            self.app.display_warning("kvhook: KVHOOK_PURE is set, so the step path in C is not built")
            return
        root = Path(self.root)
        self._folder = tempfile.TemporaryDirectory(prefix="kvhook-build-")
        try:
            built = build(root, Path(self._folder.name))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.app.display_warning(
                f"kvhook: the step path in C was not built ({type(error).__name__}: {error}). kvhook works without it; "
                "each step then takes some 20 us more"
            )
            return
        if version == "editable":
            # under another name first: a program may have the old one loaded
            target = root / FOLDER / built.name
            new = target.with_suffix(".new")
            new.write_bytes(built.read_bytes())
            new.replace(target)
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"][str(built)] = str(FOLDER / built.name)


def build(root: Path, folder: Path) -> Path:
    """Compile the extension into a folder; gives the file. Raises whatever the compiler's driver raises."""
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    sources = sorted(str(path) for path in (root / FOLDER).glob("*.c"))
    headers = sorted(str(path) for path in (root / FOLDER).glob("*.h"))
    arguments = ["-std=c11", "-fvisibility=hidden", *os.environ.get("KVHOOK_CFLAGS", "").split()]
    links = os.environ.get("KVHOOK_LDFLAGS", "").split()
    extension = Extension(MODULE, sources, depends=headers, extra_compile_args=arguments, extra_link_args=links)
    command = build_ext(Distribution({"name": "kvhook", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(MODULE))


if __name__ == "__main__":  # in a checkout that is used as it is: builds the extension beside its sources
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="kvhook-build-") as temporary:
        made = build(here, Path(temporary))
        (here / FOLDER / made.name).write_bytes(made.read_bytes())
        print(f"{FOLDER / made.name}")
