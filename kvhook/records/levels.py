"""What the level of a step (`kvhook.schema.LEVELS`) means for its columns. No other module decides this.

At level light the columns of `FULL_ONLY` are not recorded. At level sparse the columns of `COUNTED` are not recorded
either, except in every n-th step: there ``has_iteration_stats`` is 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table, has
from kvhook.schema import COUNTED, FULL_ONLY, LEVELS

_SPARSE = LEVELS.index("sparse")

#: Why a count, or a sum of counts, is not known.
NOT_COUNTED = "outputs were counted in some steps only, to stay within max_overhead"
NOBODY_COUNTED = "outputs came that nobody counted, neither vLLM's stats nor kvhook"


def level_codes(steps: Table) -> npt.NDArray[np.int64]:
    """The level of each step as an index into `LEVELS`. Traces from before there were levels are full."""
    return steps["level"] if has(steps, "level") else np.zeros(len(steps), np.int64)


def steps_by_level(steps: Table) -> dict[str, int]:
    """Level -> steps that were recorded at it, without levels that do not occur."""
    codes = level_codes(steps)
    found = {name: int((codes == code).sum()) for code, name in enumerate(LEVELS)}
    return {name: count for name, count in found.items() if count}


def tokens_are_known(levels: dict[str, int]) -> bool:
    """Whether the columns of `COUNTED` can be summed over all steps: not if some are sparse.

    Args:
        levels: as `steps_by_level` gives them.
    """
    return not levels.get("sparse")


def not_counted(steps: Table) -> npt.NDArray[np.bool_]:
    """In which steps the columns of `COUNTED` are not known."""
    mask: npt.NDArray[np.bool_] = level_codes(steps) == _SPARSE
    if has(steps, "has_iteration_stats"):
        mask &= steps["has_iteration_stats"] == 0
    return mask


def not_recorded(steps: Table) -> dict[str, npt.NDArray[np.bool_]]:
    """Column -> in which steps it was not recorded because of their level."""
    if not level_codes(steps).any():
        return {}
    unknown = dict.fromkeys(FULL_ONLY, level_codes(steps) > 0) | dict.fromkeys(COUNTED, not_counted(steps))
    return {name: mask for name, mask in unknown.items() if has(steps, name)}
