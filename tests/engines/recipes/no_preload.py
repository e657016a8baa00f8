"""Let a CPU build start without libraries that only make it faster.

    no_preload.py SITE_PACKAGES

0.18's worker raises unless the names of tcmalloc and of Intel's OpenMP stand in LD_PRELOAD. Both come from the system's
packages, and no release before or after asks for them. This takes the two questions out of vLLM's Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

QUESTION = re.compile(r'(?m)^( +)check_preloaded_libs\("\w+"\)$')


def main(site_packages: Path) -> None:
    path = site_packages / "vllm" / "v1" / "worker" / "cpu_worker.py"
    text, count = QUESTION.subn(r"\1pass", path.read_text(encoding="utf-8"))
    if not count:
        raise SystemExit(f"{path} asks for no library: this recipe is not for this release")
    # written under another name and renamed: it may be a hard link
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    print(f"vLLM asks for {count} libraries no more")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
