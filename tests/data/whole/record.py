"""Records the run in tests/data/whole: in a folder with the demo's model as tiny-llama, python record.py FOLDER."""

import os
import sys
from pathlib import Path

from kvhook.demo.engine import ENVIRONMENT, load

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import kvhook  # noqa: E402
from kvhook.demo.workload import rounds  # noqa: E402

session = kvhook.install(trace=Path(sys.argv[1]) / "run.kvh", core="blocks")
llm = load(Path("tiny-llama"))
from vllm import SamplingParams  # noqa: E402  # type: ignore[import-not-found, unused-ignore]

cold, same, tales = rounds()


def ask(prompts: list[str], **params: object) -> None:
    llm.generate(prompts, SamplingParams(ignore_eos=True, **params), use_tqdm=False)


with session.scope("warm-up"):
    ask(cold.batches[0], max_tokens=4, temperature=0)
with session.scope("measured"):
    with kvhook.label("librarian, old & new"):
        ask(same.batches[0], max_tokens=16, temperature=0)
    with session.scope("samples"), kvhook.label("cook"):
        ask(same.batches[1][:2], max_tokens=12, n=3, temperature=1.0)
    ask(tales.batches[0][:12], max_tokens=150, temperature=0)
session.close()
print(session.summary())
