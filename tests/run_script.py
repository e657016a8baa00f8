"""Run by test_run.py under ``kvhook run``: vLLM loads its plug-ins, makes an engine, and the program goes on as told.

The engine is the one that plays a script (`tests.standin`). Arguments: what the program does, and how it ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kvhook.plugin import load
from tests.standin import fake_vllm, step_stats

#: What two processes of a program see of each other, so that nobody has to wait for a time.
READY = "ready"


VLLM = fake_vllm()


def work() -> Any:
    """Load the plug-ins, make an engine and step it."""
    vllm = VLLM.__enter__()
    atexit.register(VLLM.__exit__, None, None, None)
    load()
    step(vllm, 5)
    return vllm


def step(vllm: Any, steps: int) -> None:
    engine = vllm.engine()
    for n in range(steps):
        engine.plan.append(step_stats(kv_cache_usage=n / 10, num_running_reqs=n, generated=2))
        engine.step()
    ENGINES.append(engine)


#: None is deleted before the program ends.
ENGINES: list[Any] = []


def wait_for_signal(vllm: Any) -> None:
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, _: caught.append(number))
    open(READY, "w").close()
    while not caught:
        time.sleep(0.01)
    print("caught", signal.Signals(caught[0]).name)
    sys.exit(40 + len(caught))


def wait_for_ctrl_c(vllm: Any) -> None:
    open(READY, "w").close()
    while True:
        time.sleep(0.01)


def fork(vllm: Any) -> None:
    child = os.fork()
    if not child:
        step(vllm, 3)
        import kvhook.recording.installation as installation

        session = installation.current_session()
        assert session is not None
        session.close()
        os._exit(0)
    os.waitpid(child, 0)


def start_another(vllm: Any) -> None:
    subprocess.run([sys.executable, *sys.argv[:1], "nothing"], check=True)


def become_another(vllm: Any) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, sys.argv[0], "exit"])


def install_itself(vllm: Any) -> None:
    import kvhook

    session = kvhook.install()
    print("its own install:", session.options.trace_path is not None and session.options.trace_path.name)


def wait_for_file(vllm: Any) -> None:
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.01)


ACTS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda vllm: None,
    "exit": lambda vllm: sys.exit(3),
    "raise": lambda vllm: 1 / 0,
    "kill": lambda vllm: os.kill(os.getpid(), signal.SIGKILL),
    "crash": lambda vllm: os.kill(os.getpid(), signal.SIGSEGV),
    "_exit": lambda vllm: os._exit(7),
    "signal": wait_for_signal,
    "ctrl-c": wait_for_ctrl_c,
    "fork": fork,
    "subprocess": start_another,
    "exec": become_another,
    "install": install_itself,
    "file": wait_for_file,
}

if __name__ == "__main__":
    print("input:", sys.stdin.read(), flush=True)
    ACTS[sys.argv[1]](work() if "--no-engine" not in sys.argv else None)
