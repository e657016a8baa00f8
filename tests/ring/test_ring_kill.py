"""After SIGKILL at any moment every record whose publish had returned is there, and right.

The long run is ``python benchmarks/ring_kill.py``.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.ring.kill import kill_once

KILLS = 20


def test_what_was_published_survives_the_kill(tmp_path: Path):
    chance = random.Random(20)
    for _ in range(KILLS):
        left = kill_once(tmp_path, chance)
        assert left.published > 0
        assert left.missing == 0, left
        assert left.torn == 0, left
        assert left.more <= 1, left
