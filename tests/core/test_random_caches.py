"""Random settings and workloads: what is told as exact is what vLLM's scheduler does with that many blocks.

The long form is ``python -m tests.core.random_caches 0-200``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.core.random_caches import compare


@pytest.mark.parametrize("seed", [1, 37])
def test_what_is_told_as_exact_is_what_vllm_does(driver: Callable[..., Any], seed: int):
    """Seed 37 resets the prefix cache while requests run."""
    result = compare(driver, seed)
    assert result.wrong == []
    assert result.sizes == 4
