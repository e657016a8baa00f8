"""Let a CPU build without AMX code run on a processor with AMX.

    no_amx.py SITE_PACKAGES

vLLM chooses the attention kernel in Python: "amx" where the processor has AMX tiles, the model is in bfloat16 and a
block has a multiple of 32 tokens. The CPU build of 0.16.0 was compiled for AVX2 and has no AMX kernels, so on such a
processor the first step ends with "Unsupported CPU attention configuration: head_dim=32 isa=0", for heads of any size.
The builds before it take the other kernels by themselves when they are asked for "amx"; those from 0.17 on have AMX
kernels.

No environment variable changes what vLLM sees of the processor. So this changes the question in vLLM's Python to its
answer: no. The engine then takes the kernels that it takes on a processor without AMX.
"""

from __future__ import annotations

import sys
from pathlib import Path

QUESTION = "torch._C._cpu._is_amx_tile_supported()"
ANSWER = "False"


def mend(path: Path) -> int:
    """How often the question stood in a file. Written under another name and renamed: it may be a hard link."""
    text = path.read_text(encoding="utf-8")
    count = text.count(QUESTION)
    if count:
        new = path.with_name(path.name + ".new")
        new.write_text(text.replace(QUESTION, ANSWER), encoding="utf-8")
        new.replace(path)
    return count


def main(site_packages: Path) -> None:
    counts = [mend(path) for path in sorted((site_packages / "vllm").rglob("*.py"))]
    if not any(counts):
        raise SystemExit(f"{QUESTION} stands nowhere in vLLM: this recipe is not for this release")
    print(f"{sum(counts)} times vLLM asks for AMX in {sum(map(bool, counts))} files: the answer is no")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
