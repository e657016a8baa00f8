"""A vLLM server as a child process, and clients of it: the openai package, streaming or not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: Seconds until a server must answer.
START = 600.0

OPTIONS = (
    *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"),
    *("--num-gpu-blocks-override", "400", "--max-num-seqs", "64", "--served-model-name", "tiny"),
)
#: Tokens of a request that its client leaves: so many that the server mostly sees it before it has made them.
LEFT_TOKENS = 1900
#: The two ways to start it: what stands before the options.
API_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
VLLM_SERVE = (str(Path(sys.executable).with_name("vllm")), "serve")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Server(NamedTuple):
    """A server that runs: where it is, its process, and what it writes."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metrics(self) -> dict[str, float]:
        """What /metrics says: name with labels -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = re.findall(r"^(\w[\w:]*(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def total(self, name: str) -> float:
        """The sum of a counter of vLLM's over all its labels."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def stop(self) -> int:
        """End it as a process manager does; gives its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextlib.contextmanager
def server(
    model: str,
    folder: Path,
    kvhook: Sequence[str] | None = None,
    more: Sequence[str] = (),
    program: Sequence[str] = API_SERVER,
    **environment: str,
) -> Iterator[Server]:
    """A server over a model, once it answers.

    Args:
        model: its folder.
        folder: where it works, and writes its log.
        kvhook: options of ``kvhook run``; None to run it without kvhook.
        more: further options of the server.
        program: what is started; the model comes after it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [] if kvhook is None else [sys.executable, "-m", "kvhook", "run", *kvhook, "--"]
    command = [
        *run,
        *(*program, model),
        *("--host", "127.0.0.1", "--port", str(port), *OPTIONS, *more),
    ]
    log = folder / "server.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    this = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _await(this)
        yield this
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                this.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes are in there
        process.wait()


def _await(this: Server) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if this.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{this.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{this.log.read_text(errors='replace')[-4000:]}")


class Answer(NamedTuple):
    """One request: seconds to the first token and to the end, tokens of prompt and answer, and whether it was left."""

    first: float
    whole: float
    prompt: int
    generated: int
    left: bool = False


async def ask(client: Any, prompt: str, tokens: int, *, stream: bool = True, leave_after: int = 0) -> Answer:
    """Send one request.

    Args:
        client: an ``openai.AsyncOpenAI``.
        leave_after: close the connection after so many pieces, as a user does who goes away.
    """
    begin = time.perf_counter()
    given = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    extra: dict[str, Any] = {"ignore_eos": True}
    if not stream:
        whole = await client.completions.create(**given, extra_body=extra)
        end = time.perf_counter() - begin
        return Answer(end, end, whole.usage.prompt_tokens, whole.usage.completion_tokens)
    first, pieces, usage = 0.0, 0, None
    options = {"include_usage": True}
    answer = await client.completions.create(**given, stream=True, stream_options=options, extra_body=extra)
    async for piece in answer:
        usage = piece.usage or usage
        pieces += bool(piece.choices)
        first = first or time.perf_counter() - begin
        if leave_after and pieces >= leave_after:
            await answer.close()
            return Answer(first, time.perf_counter() - begin, 0, pieces, left=True)
    assert usage is not None
    return Answer(first, time.perf_counter() - begin, usage.prompt_tokens, usage.completion_tokens)


def client_of(this: Server) -> Any:
    """A client that tries each request once."""
    import openai

    return openai.AsyncOpenAI(base_url=f"{this.url}/v1", api_key="none", max_retries=0, timeout=600)


async def load(this: Server, clients: int, seconds: float, tokens: int) -> list[Answer]:
    """So many clients, each with one streaming request after the other, for so long."""
    until = time.perf_counter() + seconds

    async def one(number: int, client: Any) -> list[Answer]:
        answers: list[Answer] = []
        while time.perf_counter() < until:
            prompt = f"You are the help desk of a library. Answer kindly. Customer {number}, question {len(answers)}."
            answers.append(await ask(client, prompt, tokens))
        return answers

    async with client_of(this) as client:
        return [a for answers in await asyncio.gather(*(one(n, client) for n in range(clients))) for a in answers]
