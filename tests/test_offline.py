"""kvhook needs no network: a whole run, from `install` to the report, in a process that may open no socket."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Python

WHOLE_RUN = """
import sys

def refuse(event, arguments):
    if event.startswith("socket.") or event in ("urllib.Request", "http.client.connect", "ftplib.connect"):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
import socket
try:
    socket.socket()
except RuntimeError:
    pass
else:
    sys.exit("sockets are not forbidden")

import json
import kvhook
from kvhook.cli import main
from tests.standin import fake_vllm, step_stats

with fake_vllm() as vllm:
    session = kvhook.install(trace="run.kvh")
    engine = vllm.engine()
    done = [{"request_id": "0", "e2e_latency": 0.5, "num_generation_tokens": 3}]
    engine.plan += [step_stats(kv_cache_usage=0.5, generated=1, ttft=[0.1], finished=done) for _ in range(5)]
    for _ in range(5):
        engine.step()
    codes = {"top": main(["top", "--once"]), "ls": main(["ls"])}
    str(session.summary())
    kvhook.uninstall()
for verb in ("summary", "autopsy", "report"):
    codes[verb] = main([verb, "run.kvh"])
codes["compare"] = main(["compare", "run.kvh", "run.kvh"])
for out in ("run.jsonl", "run.csv", "run.parquet", "run.arrow", "run.perfetto.json.gz"):
    codes[out] = main(["export", "run.kvh", out])
print(json.dumps(codes))
"""


def test_a_whole_run_opens_no_socket(python: Python, tmp_path: Path):
    codes = json.loads(python(WHOLE_RUN).stdout.splitlines()[-1])
    assert set(codes.values()) == {0}
    assert (tmp_path / "report.html").stat().st_size > 10_000
