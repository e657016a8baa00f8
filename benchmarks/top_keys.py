"""How long ``kvhook top`` takes to answer a key, in a terminal of 80 x 24, while engines work.

    python benchmarks/top_keys.py --engines 16 --keys 100

A key is written into the terminal; its answer is there when the screen says so (``last 30 s``, ``PAUSED``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import select
import statistics
import struct
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: Key -> what the screen shows afterwards, in turn.
KEYS = ((b"+", b"30 s"), (b"p", b"PAUSED"), (b"-", b"10 s"), (b"p", b""))
#: Seconds in which an answer must come.
PATIENCE = 10.0


def play(rings: Path, engines: int, rate: float, stop: threading.Event) -> None:
    """Engines that play steps, so many a second each."""
    import kvhook
    from tests.standin import fake_vllm, step_stats

    with fake_vllm() as vllm, kvhook.install(ring_dir=rings, core="off"):
        running = [vllm.engine() for _ in range(engines)]
        n = 0
        while not stop.wait(1 / rate):
            n += 1
            for engine in running:
                engine.plan.append(step_stats(kv_cache_usage=n % 100 / 100, num_running_reqs=n % 9, generated=8))
                engine.step()


class Terminal:
    """``kvhook top`` in a terminal of its own."""

    def __init__(self, rings: Path, columns: int = 80, lines: int = 24) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
            os.execve(
                sys.executable, [sys.executable, "-m", "kvhook", "top", "--ascii", "--dir", str(rings)], environment
            )
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, text: bytes, patience: float = PATIENCE) -> float:
        """Seconds until the terminal shows a text; of an empty text, until it shows anything."""
        begin, seen = time.perf_counter(), b""
        while time.perf_counter() - begin < patience:
            if select.select([self.fd], [], [], 0.005)[0]:
                seen += os.read(self.fd, 1 << 16)
                if text in seen:
                    return time.perf_counter() - begin
        raise TimeoutError(f"{text!r} did not come: {seen[-500:]!r}")

    def drain(self) -> None:
        """Wait until it is between two of its own redraws."""
        while select.select([self.fd], [], [], 0.02)[0]:
            os.read(self.fd, 1 << 16)

    def press(self, key: bytes, text: bytes) -> float:
        """Seconds from a key to its answer."""
        self.drain()
        os.write(self.fd, key)
        return self.until(text)


def main() -> None:
    """Run it, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--rate", type=float, default=100.0, help="steps per second of each engine")
    parser.add_argument("--keys", type=int, default=100)
    options = parser.parse_args()
    took: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rings, stop = Path(folder) / "rings", threading.Event()
        rings.mkdir(mode=0o700)
        thread = threading.Thread(target=play, args=(rings, options.engines, options.rate, stop))
        thread.start()
        terminal = Terminal(rings)
        try:
            terminal.until(f"{options.engines} engine".encode(), 60)
            for n in range(options.keys):
                took.append(terminal.press(*KEYS[n % len(KEYS)]))
        finally:
            with contextlib.suppress(OSError):
                os.write(terminal.fd, b"q")
                terminal.drain()
            stop.set()
            thread.join()
            os.close(terminal.fd)
            os.waitpid(terminal.pid, 0)
    took.sort()
    p50, p99 = statistics.median(took), took[int(0.99 * (len(took) - 1))]
    late = sum(t > 0.2 for t in took)
    print(
        f"{options.engines} engines at {options.rate:g} steps/s, {len(took)} keys: p50 {p50 * 1e3:.0f} ms,"
        f" p99 {p99 * 1e3:.0f} ms, longest {took[-1] * 1e3:.0f} ms; later than 200 ms: {late}"
    )


if __name__ == "__main__":
    main()
