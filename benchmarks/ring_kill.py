"""SIGKILL at random moments: whether every record whose publish had returned is in the ring, and right.

    python benchmarks/ring_kill.py                1,000 kills
    python benchmarks/ring_kill.py --kills 50

A process publishes at full speed and reports each record that was published through a second map; it is killed at a
random moment within 20 ms; the ring is compared with what was reported. Exit code 1 if anything is missing or torn.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ring.kill import kill_once


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        left = [kill_once(Path(folder), chance) for _ in range(args.kills)]
    missing, torn = sum(x.missing for x in left), sum(x.torn for x in left)
    print(f"kills                              {len(left):>12,}   in {time.monotonic() - start:.0f} s")
    print(f"records published before the kill  {sum(x.published for x in left):>12,}")
    print(f"of these the rings could hold      {sum(x.expected for x in left):>12,}")
    print(f"missing                            {missing:>12,}")
    print(f"torn                               {torn:>12,}")
    print(f"one more, publish had not returned {sum(x.more > 0 for x in left):>12,}")
    print(f"whole behind an unmoved head       {sum(x.behind_head for x in left):>12,}")
    return int(bool(missing or torn or any(x.more > 1 for x in left)))


if __name__ == "__main__":
    sys.exit(main())
