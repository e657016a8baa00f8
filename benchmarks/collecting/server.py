"""The ways to collect from the real API server: scraping its Prometheus endpoint, and its log line.

Two servers run, one with vLLM's stats, as it has them by default, and one without; each has its engine core in a
process of its own, and the work is sent to one at a time. The truth comes from a plug-in in the engine core (`truth`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from collecting import load, truth
from collecting.looks import Look, Run, against, interval_of, the_run
from collecting.offline import AGAIN, BASELINE, LINE_INTERVAL, LOG_LINE, look_of_line
from collecting.polling import Poller

#: How often the endpoint is scraped.
RATES_HZ = (1, 10)
HOST = "127.0.0.1"
#: Seconds that a server may take to come up.
START = 300

ON = "stats on, nobody looks"

_METRICS = (
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)
_SAMPLE = re.compile(rf"^({'|'.join(_METRICS)})\{{[^}}]*\}} (\S+)$", re.MULTILINE)


def scraped(hz: float) -> str:
    """The name of a way."""
    return f"scraping /metrics at {hz:g} Hz"


class Server:
    """An API server over the tiny model, its log lines with stats, and the truth about its engine core."""

    def __init__(self, folder: Path, *, stats: bool) -> None:
        from kvhook.demo.model import make_tiny_model, tiny_model_dir

        self.model = str(make_tiny_model(tiny_model_dir()))
        self.lines: list[Look] = []
        self._last_lines: list[str] = []
        self._truth = folder / "truth"
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        options = {"host": HOST, "port": self.port, "dtype": "bfloat16", "uvicorn_log_level": "warning"} | load.ENGINE
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--enforce-eager"]
        command += [] if stats else ["--disable-log-stats"]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*truth.make_plugin(folder / "plugin"), *filter(None, sys.path)]),
            truth.FILE: str(self._truth),
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_LOG_STATS_INTERVAL": str(LINE_INTERVAL),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # seconds; connections are kept while other ways have their turn
        }
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its engine core can be ended with it
        )
        self._ear = threading.Thread(target=self._listen, daemon=True)
        self._ear.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            look = look_of_line(time.monotonic_ns(), line)
            if look is not None:
                self.lines.append(look)
            self._last_lines = [*self._last_lines[-30:], line]

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or does not answer in time; with its last lines.
        """
        end = time.monotonic() + START
        while self._process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if self.get(self.connect(), "/health")[0] == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError("the API server did not come up. Its last lines:\n" + "".join(self._last_lines))

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is used again and again."""
        return http.client.HTTPConnection(HOST, self.port, timeout=120)

    @staticmethod
    def get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
        """Status and body."""
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    def scraper(self, *, parsed: bool = True) -> Callable[[], Look]:
        """A function that scrapes; the time of a look is that when the answer had come."""
        connection = self.connect()

        def look() -> Look:
            status, body = self.get(connection, "/metrics")
            now = time.monotonic_ns()
            if status != 200:
                raise RuntimeError(f"/metrics answered {status}")
            found = dict(_SAMPLE.findall(body.decode())) if parsed else {}
            return Look(now, *(float(found.get(name, "nan")) for name in _METRICS))

        return look

    def truth(self) -> list[truth.Row]:
        """The steps of its engine core so far."""
        return truth.read_rows(self._truth)

    def close(self) -> None:
        """End it and its engine core."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ear.join(10)


class Client:
    """Sends the work: the requests of a batch at once, a connection for each."""

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(load.ENGINE["max_num_seqs"])
        self._mine = threading.local()

    def drive(self, server: Server, work: Iterable[load.Batch]) -> float:
        """Seconds that the work took."""
        begin = time.perf_counter()
        for batch in work:
            sent = zip(batch.prompts, batch.tokens, strict=True)
            for done in [self._threads.submit(self._send, server, *one) for one in sent]:
                done.result()
        return time.perf_counter() - begin

    def _send(self, server: Server, prompt: list[int], tokens: int) -> None:
        connections = self._mine.__dict__.setdefault("connections", {})
        connection = connections.get(server.port)
        if connection is None:
            connection = connections[server.port] = server.connect()
        body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"the API server answered {response.status}: {answer[:500]!r}")


@contextlib.contextmanager
def two_servers(folder: Path) -> Iterator[tuple[Server, Server]]:
    """A server with stats and one without, both up."""
    servers = []
    try:
        for name in ("on", "off"):
            (folder / name).mkdir()
            servers.append(Server(folder / name, stats=name == "on"))
        for server in servers:
            server.wait()
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.close()


def see(server: Server, work: Iterable[load.Batch]) -> tuple[Run, dict[str, dict[str, Any]], dict[str, int]]:
    """One run, seen by all the ways: the truth, way -> figures, and vLLM's counters over the run."""
    look = server.scraper()
    pollers = {scraped(hz): Poller(server.scraper(), 1 / hz) for hz in RATES_HZ}
    before, rows_before = look(), server.truth()
    if not rows_before:
        raise RuntimeError("the engine core of the API server has written no truth: vLLM did not load the plug-in")
    lines_before = len(server.lines)
    for poller in pollers.values():
        poller.start()
    Client().drive(server, work)
    for poller in pollers.values():
        poller.finish()
    after = look()
    rows = server.truth()[len(rows_before) :]
    # with asynchronous scheduling a step more may have been run for nobody
    run = the_run(rows, rows_before[-1])
    figures = {
        name: against(run, [one._replace(**_less(one, before)) for one in poller.looks], interval=poller.interval)
        for name, poller in pollers.items()
    }
    figures[LOG_LINE] = against(run, server.lines[lines_before:], interval=LINE_INTERVAL)
    return run, figures, {name: int(value) for name, value in _less(after, before).items()}


def _less(look: Look, first: Look) -> dict[str, float]:
    return {name: getattr(look, name) - getattr(first, name) for name in ("tokens", "queries", "hits")}


def costs(on: Server, off: Server, rounds: int, count: int, said: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Way -> throughput of the server as a ratio to that of the one without stats, in interleaved rounds."""
    arms = {BASELINE: (off, 0.0), AGAIN: (off, 0.0), ON: (on, 0.0)} | {scraped(hz): (on, float(hz)) for hz in RATES_HZ}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    client = Client()
    for number in range(rounds + 1):
        # other prompts in each round and for each way: there is no cache to be reset from outside
        for name in random.sample(list(arms), len(arms)):
            server, hz = arms[name]
            poller = Poller(server.scraper(parsed=False), 1 / hz) if hz else None
            if poller is not None:
                poller.start()
            work = _of_its_own(load.batches(count, seed=1000 + number), number * len(arms) + list(arms).index(name))
            wall = client.drive(server, work)
            if poller is not None:
                poller.cancel()
            if number:  # the first round warms up
                seconds[name].append(wall)
        said(f"costs, API server: round {number} of {rounds}")
    return {
        name: {
            "against": BASELINE,
            "rounds": rounds,
            "seconds_a_round": float(np.median(seconds[name])),
            "throughput": interval_of(np.array(seconds[BASELINE]) / np.array(seconds[name])),
        }
        for name in arms
        if name != BASELINE
    }


def _of_its_own(work: Iterable[load.Batch], number: int) -> list[load.Batch]:
    """The same lengths and the same sharing, but no prompt that was sent before: the first two tokens tell."""
    mark = [2 + number % 500, 2 + number // 500]
    return [batch._replace(prompts=[mark + prompt[2:] for prompt in batch.prompts]) for batch in work]
