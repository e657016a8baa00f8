"""Every verb with odd runs and files: it works, or says in one line what is wrong. Nothing else happens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from tests.ring.synthetic import Recording

HOSTILE = "</script><img src=x onerror=alert(2)>&amp;\"'\N{RIGHT-TO-LEFT OVERRIDE}\x1b[31m"


def empty(folder: Path) -> Path:
    return Recording(folder).path


def one_step(folder: Path) -> Path:
    recording = Recording(folder)
    recording.step(0.5)
    return recording.path


def no_stats(folder: Path) -> Path:
    recording = Recording(folder)
    for _ in range(30):
        recording.step(math.nan, has_scheduler_stats=0, num_running_reqs=-1, num_waiting_reqs=-1, num_kv_blocks=-1)
    return recording.path


def nothing_finished(folder: Path) -> Path:
    recording = Recording(folder)
    for _ in range(200):
        recording.step(0.4, num_added_reqs=1)
    return recording.path


def html_everywhere(folder: Path) -> Path:
    recording = Recording(folder, model=HOSTILE, kv_cache_dtype=HOSTILE, vllm=HOSTILE, program=HOSTILE)
    recording.finish(1, label=0, lora_name=0, num_prompt_tokens=32, num_generation_tokens=2, num_cached_tokens=16)
    recording.step(0.5)
    trace = kvhook.open(recording.path)
    trace.engines.events.take(
        [
            ["name", "label", 0, HOSTILE],
            ["name", "lora_name", 0, HOSTILE],
            ["scope", 0, HOSTILE, "scope", -1, 0, False, [], 3, HOSTILE],
            ["end", 0, 1 << 61],
        ]
    )
    (path,) = trace.dump(folder / "hostile.kvh")
    return path


def killed_in_a_scope(folder: Path) -> Path:
    recording = Recording(folder)
    recording.step()
    trace = kvhook.open(recording.path)
    trace.engines.events.take([["scope", 0, "warm-up", "scope", -1, 0, True, [], -1, ""]])
    (path,) = trace.dump(folder / "killed.kvh")
    return path


RUNS = (empty, one_step, no_stats, nothing_finished, html_everywhere, killed_in_a_scope)


def picture(folder: Path) -> Path:
    path = folder / "picture.png"
    path.write_bytes(b"\x89PNG\r\n" * 900)
    return path


def nothing(folder: Path) -> Path:
    path = folder / "nothing.kvh"
    path.touch()
    return path


def not_there(folder: Path) -> Path:
    return folder / "not_there.kvh"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def words(folder: Path) -> Path:
    path = folder / "words.jsonl"
    path.write_text("hello\n")
    return path


FILES = (picture, nothing, not_there, empty_folder, words)

#: Verb -> its arguments for a run; ``OUT`` is a folder for what it writes.
VERBS: dict[str, list[str]] = {
    "summary": ["summary", "RUN"],
    "summary json": ["summary", "RUN", "--json"],
    "summary windows": ["summary", "RUN", "--windows", "5"],
    "summary twice": ["summary", "RUN", "RUN"],
    "compare": ["compare", "RUN", "RUN"],
    "compare json": ["compare", "RUN", "RUN,RUN", "--json"],
    "report": ["report", "RUN", "-o", "OUT/report.html"],
    "plot": ["plot", "RUN", "-o", "OUT/usage.svg"],
    "cache": ["cache", "RUN"],
    "whatif": ["whatif", "RUN"],
    **{f"export {s}": ["export", "RUN", f"OUT/run.{s}"] for s in ("csv", "jsonl", "parquet", "kvh")},
    "export perfetto": ["export", "RUN", "OUT/run.perfetto.json.gz"],
    "export folder": ["export", "RUN", "OUT/fleet/", "--run", HOSTILE],
    "export mooncake": ["export", "RUN", "OUT/requests.jsonl", "--format", "mooncake"],
}
#: Verbs that need what inside an engine core was recorded: without it they say so.
NEED_CORES = {"cache", "whatif", "export mooncake"}


def call(verb: str, path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    out.mkdir(exist_ok=True)
    code = main([part.replace("RUN", str(path)).replace("OUT", str(out)) for part in VERBS[verb]])
    shown, said = capsys.readouterr()
    return code, shown, said


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_shows_an_odd_run_or_says_in_one_line_why_not(
    verb: str, run: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if verb.startswith("export"):
        pytest.importorskip("pyarrow")
    if verb == "plot":
        pytest.importorskip("matplotlib")
    folder = tmp_path / "in"
    code, shown, said = call(verb, run(folder), tmp_path / "out", capsys)
    assert code in (0, 1)
    nothing_to_draw = verb == "plot" and run is empty
    assert (code == 1) == (verb in NEED_CORES or nothing_to_draw), said
    assert (said.count("\n") == 1) == (code == 1), said
    assert "\x1b" not in shown + said
    if "json" in verb and verb.startswith(("summary", "compare")):
        json.loads(shown, parse_constant=pytest.fail)
    for page in (tmp_path / "out").glob("*.html"):
        assert "<img" not in page.read_text(encoding="utf-8")
        assert len(re.findall("</script>", page.read_text(encoding="utf-8"))) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_in_one_line_that_a_file_is_no_run(
    verb: str, file: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = file(tmp_path)
    code, shown, said = call(verb, path, tmp_path / "out", capsys)
    assert (code, shown, said.count("\n")) == (1, "", 1), said
    assert path.name in said
    assert list((tmp_path / "out").rglob("*.*")) == []
