"""Let vLLM 0.6.6 call the CPU kernels of 0.8.5.

    float_scales.py SITE_PACKAGES

Between the two the attention kernels' `k_scale` and `v_scale` became tensors. This appends a few lines to the
installed `vllm/_custom_ops.py` that turn the floats of 0.6.6 into tensors on the way.
"""

from __future__ import annotations

import sys
from pathlib import Path

MARK = "# --- appended by kvhook's engine matrix, not part of vLLM ---"
SHIM = f"""

{MARK}
def _with_tensor_scales(operator):
    import functools
    import inspect

    signature = inspect.signature(operator)

    @functools.wraps(operator)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        for name in ("k_scale", "v_scale"):
            if isinstance(bound.arguments.get(name), float):
                bound.arguments[name] = torch.tensor(bound.arguments[name])
        return operator(*bound.args, **bound.kwargs)

    return call


paged_attention_v1 = _with_tensor_scales(paged_attention_v1)
paged_attention_v2 = _with_tensor_scales(paged_attention_v2)
reshape_and_cache = _with_tensor_scales(reshape_and_cache)
"""


def main(site_packages: Path) -> None:
    path = site_packages / "vllm" / "_custom_ops.py"
    text = path.read_text(encoding="utf-8")
    if MARK not in text:
        new = path.with_name(path.name + ".new")
        new.write_text(text + SHIM, encoding="utf-8")
        new.replace(path)
    print("float scales become tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
