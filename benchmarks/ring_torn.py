"""Torn reads: how many records a hostile reader takes that are not whole.

    python benchmarks/ring_torn.py                      10 million reads with each eye, then the broken writers
    python benchmarks/ring_torn.py --reads 100000

A writer at full speed over a ring of 8 slots of 4 KiB; tests/ring/torn.py says how the two eyes look, and what is
broken about the broken writers, which show that a torn record would be noticed. Exit code 1 if one was accepted from
the good writer, or none found of a broken one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ring import torn

BROKEN = (("late_stamp", "stamps"), ("pack_into", "stamps"), ("careless", "poll"))


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no longer than this for each line")
    args = parser.parse_args()
    failed = False
    print(f"{'writer':<11} {'eye':<7}{'reads':>12}{'accepted':>12}{'torn':>7}{'time':>9}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for writer, eye in (("good", "poll"), ("good", "stamps"), *BROKEN):
            start = time.monotonic()
            seen = torn.run(Path(folder), writer, eye, args.reads, seconds=args.seconds)
            took = time.monotonic() - start
            failed |= (seen.torn > 0) == (writer == "good") or (writer == "good" and seen.reads < args.reads)
            print(
                f"{writer:<11} {eye:<7}{seen.reads:>12,}{seen.accepted:>12,}{seen.torn:>7,}{took:>7.0f} s", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
