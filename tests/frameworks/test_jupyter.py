"""The cells of docs/howto/notebook.md in a real kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

PAGE = ROOT / "docs/howto/notebook.md"
#: Cells of the page that run: all but those in which the reader opens another recording.
CELLS = 5
LAST = """
import json
outputs = llm.generate(prompts, SamplingParams(max_tokens=7, ignore_eos=True), use_tqdm=False)
rows = session.requests()[-len(outputs):]
said = sorted((len(o.prompt_token_ids), len(o.outputs[0].token_ids)) for o in outputs)
seen = sorted(zip(rows["num_prompt_tokens"].tolist(), rows["num_generation_tokens"].tolist()))
print(json.dumps([said, seen, int(session.steps()["num_generation_tokens"].sum()), session.faults]))
"""


def test_the_page_s_cells_run_in_a_kernel_and_a_trace_shows_itself(
    project: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # as a notebook has it
    cells = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[:CELLS]
    cells += [LAST, "session.trace()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(project)}})
    done = client.execute()
    said, seen, generated, faults = json.loads(stdout_of(done.cells[-2]).splitlines()[-1])
    assert said == seen
    # 16 requests of 48 tokens, two of 8, two of 7
    assert generated == 16 * 48 + 2 * 8 + 2 * 7
    assert faults == {}
    (shown,) = (out["data"] for out in done.cells[-1]["outputs"] if out["output_type"] == "execute_result")
    assert "text/html" in shown


def stdout_of(cell: Any) -> str:
    return "".join(out["text"] for out in cell["outputs"] if out["output_type"] == "stream" and out["name"] == "stdout")
