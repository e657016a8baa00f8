"""Reports without a browser: what is in the file, bad input, and that it asks no network for anything."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.cli import main
from kvhook.report.charts import PARTS
from kvhook.report.runs import read
from tests.conftest import ROOT
from tests.ring.synthetic import Recording
from tests.standin import fake_vllm, step_stats
from tests.test_labels import trace_with_labels

HERE = Path(__file__).parent
DATA = HERE / "data"
OLD = HERE.parent / "data"


class Page:
    """A report, taken apart again."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.model: dict[str, Any] = json.loads(self.script("model"))
        self._data = zlib.decompress(base64.b64decode(self.script("data")))

    def script(self, name: str) -> str:
        found = re.search(rf'id="{name}">(.*?)</script>', self.text, re.DOTALL)
        assert found
        return found[1]

    def array(self, place: list[Any]) -> np.ndarray:
        offset, count, kind = place
        return np.frombuffer(self._data, f"<{kind}", count, offset)

    def lines(self, source: str, run: int = 0) -> list[dict[str, Any]]:
        return [line for line in self.model["runs"][run]["lines"] if line["source"] == source]

    def curve(self, name: str, source: str = "steps") -> np.ndarray:
        (line,) = self.lines(source)
        return self.array(line["curves"][name][0])

    def why_empty(self, chart: str) -> list[str]:
        (found,) = (c for c in self.model["charts"] if c["id"] == chart)
        return list(found["empty"])


def report(folder: Path, *traces: Path | str) -> Page:
    out = folder / "report.html"
    assert main(["report", *map(str, traces), "-o", str(out), "--force"]) == 0
    return Page(out)


def test_the_curves_of_a_short_run_are_its_columns(tmp_path: Path):
    trace = kvhook.open(DATA / "baseline.kvh")
    page = report(tmp_path, DATA / "baseline.kvh")
    steps, core = trace.steps(), trace.cores().steps()
    for name in ("kv_cache_usage", "num_running_reqs", "num_waiting_reqs", "num_generation_tokens"):
        assert page.curve(name).tolist() == np.float32(steps[name]).tolist(), name
    for name in ("num_prefill_tokens", "num_recomputed_tokens", "num_decode_tokens"):
        assert page.curve(name, "core").tolist() == core[name].tolist(), name
    shares = sum(page.curve(name, "core") for name in ("used", "cached", "empty"))
    assert np.allclose(shares, 1, atol=1e-6)
    limits = {name: (core["limited_by"] == name).sum() for name in np.unique(core["limited_by"])}
    assert {name: page.curve(f"limit_{name}", "core").sum() for name in limits} == limits
    (line,) = page.lines("steps")
    begin = min(steps["t_start_ns"][0], core["t_schedule_ns"][0])
    assert np.allclose(page.array(line["begin"]), (steps["t_start_ns"] - begin) / 1e9, atol=1e-6)


def test_the_hit_rate_since_the_start_ends_at_the_summarys(tmp_path: Path):
    page = report(tmp_path, DATA / "baseline.kvh")
    rate = kvhook.open(DATA / "baseline.kvh").summary().prefix_cache_hit_rate
    assert page.curve("hit_rate_so_far")[-1] == pytest.approx(rate, rel=1e-6)


def test_the_distributions_are_those_of_the_single_values(tmp_path: Path):
    trace = kvhook.open(DATA / "baseline.kvh")
    page = report(tmp_path, DATA / "baseline.kvh")
    for key, series in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
        values = np.repeat(*trace.latencies(series))
        bounds, shares = (page.array(place) for place in page.model["runs"][0]["shares"][key])
        assert shares.tolist() == [np.float32((values <= bound).mean()) for bound in bounds]
        assert (bounds[0], bounds[-1], shares[-1]) == (values.min(), values.max(), 1)


def test_the_requests_are_those_of_the_engine_core(tmp_path: Path):
    core = kvhook.open(DATA / "baseline.kvh").cores()
    page = report(tmp_path, DATA / "baseline.kvh")
    drawn = page.model["runs"][0]["requests"]
    requests = np.sort(core.requests(), order="t_arrived_ns")
    assert drawn["core"] is True
    assert page.array(drawn["request"]).tolist() == requests["request"].tolist()
    assert page.array(drawn["num_cached_tokens"]).tolist() == requests["num_cached_tokens"].tolist()
    took = page.array(drawn["ended"]) - page.array(drawn["arrived"])
    assert np.allclose(took, (requests["t_finished_ns"] - requests["t_arrived_ns"]) / 1e9, atol=1e-6)
    known = set(requests["request"].tolist())
    assert len(page.array(drawn["spans"][0])) == sum(int(p) in known for p in core.preemptions()["request"])


def test_without_the_engine_core_requests_follow_from_their_durations(tmp_path: Path):
    trace = kvhook.open(OLD / "engine-0.32.0-full.kvh")
    page = report(tmp_path, OLD / "engine-0.32.0-full.kvh")
    drawn = page.model["runs"][0]["requests"]
    assert drawn["core"] is False
    took = sorted((page.array(drawn["ended"]) - page.array(drawn["arrived"])).tolist())
    assert took == pytest.approx(sorted(trace.requests()["e2e_latency"].tolist()), abs=1e-6)


def test_what_is_not_there_is_said_with_its_reason(tmp_path: Path):
    page = report(tmp_path, OLD / "engine-0.32.0-light.kvh", DATA / "baseline.kvh")
    for chart in ("blocks", "tokens", "limits"):
        light, full = page.why_empty(chart)
        assert light.startswith("no engine core was recorded")
        assert full == ""
    for chart in ("ttft", "itl", "e2e", "distributions"):
        assert "light" in page.why_empty(chart)[0]
    assert "no engine core was recorded" in page.text


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "rings")


def test_an_empty_trace_is_a_page_that_says_so(recording: Recording, tmp_path: Path):
    page = report(tmp_path, recording.path)
    assert page.model["runs"][0]["lines"] == []
    assert all(page.why_empty(chart.id)[0] for part in PARTS for chart in part.charts)


def test_one_step(recording: Recording, tmp_path: Path):
    recording.step(0.5)
    page = report(tmp_path, recording.path)
    assert page.curve("kv_cache_usage").tolist() == [0.5]


def test_steps_without_stats_are_gaps_and_not_zeros(recording: Recording, tmp_path: Path):
    recording.step(0.5)
    recording.step(math.nan, has_scheduler_stats=0, num_running_reqs=-1, num_waiting_reqs=-1)
    recording.step(0.25)
    page = report(tmp_path, recording.path)
    assert np.isnan(page.curve("kv_cache_usage")).tolist() == [False, True, False]
    assert np.isnan(page.curve("num_running_reqs")).tolist() == [False, True, False]


def test_an_engine_that_never_finished_a_request(recording: Recording, tmp_path: Path):
    recording.run(20)
    page = report(tmp_path, recording.path)
    assert page.model["runs"][0]["requests"]["count"] == 0
    assert page.why_empty("e2e") == ["no request has had its first token or ended"]


@pytest.mark.parametrize("content", [b"", b"not a trace", b"\x89PNG\r\n" * 900])
def test_a_file_of_another_kind_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for verb in (["report"], ["plot"]):
        assert main([*verb, str(path), "-o", str(tmp_path / "out.png")]) == 1
        assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


def test_names_with_html_in_them_are_escaped(tmp_path: Path):
    recording = Recording(tmp_path / "rings", model=HOSTILE, kv_cache_dtype=HOSTILE, vllm=HOSTILE)
    recording.step()
    trace = kvhook.open(recording.path)
    run = read(trace, trace.cores(), HOSTILE)
    from kvhook.report.page import page

    text = page([run], "0")
    assert "alert(1)" in text  # it is told
    assert "<script>alert" not in text
    assert "<img" not in text
    assert text.count("</script>") == 4
    for shown in (trace._repr_html_(), trace.summary()._repr_html_()):
        assert "alert(1)" in shown
        assert "<script" not in shown
        assert "<img" not in shown


def test_the_diagnosis_stands_with_its_evidence_and_what_acts_on_it(tmp_path: Path):
    from kvhook.analysis.diagnosis.finding import INFERRED, Finding
    from kvhook.report.page import page

    trace = kvhook.open(DATA / "baseline.kvh")
    run = read(trace, trace.cores(), "baseline")
    finding = Finding("cache_too_small", f"Too small {HOSTILE}", "num_gpu_blocks_override", {"share": 0.25}, INFERRED)
    sick = dataclasses.replace(run, summary=dataclasses.replace(run.summary, findings=[finding]))
    well = dataclasses.replace(run, summary=dataclasses.replace(run.summary, findings=[]))
    text = page([sick], "0")
    part = text[text.index('id="diagnosis"') :]
    assert "Too small &lt;/script&gt;" in part
    assert "num_gpu_blocks_override" in part
    assert "<td>0.25</td>" in part
    assert "Inferred: the engine core was not recorded." in part
    assert "<script>alert" not in text
    assert "Nothing was found that holds this run back." in page([well], "0")


def test_the_file_asks_no_network_for_anything(tmp_path: Path):
    text = report(tmp_path, DATA / "baseline.kvh").text
    assert "default-src 'none'" in text
    outside = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?!#|data:)([a-z]+:)?//[^"')\s]+""", text)
    assert outside == []
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(", text)


def test_a_report_tells_no_paths(tmp_path: Path):
    recording = Recording(tmp_path / "rings", model="/home/somebody/models/tiny-llama")
    recording.step()
    text = report(tmp_path, recording.path).text
    assert "tiny-llama" in text
    assert "/home/somebody" not in text
    assert str(tmp_path) not in text


def test_traces_of_one_name_are_told_apart(tmp_path: Path):
    page = report(tmp_path, DATA / "baseline.kvh", DATA / "baseline.kvh")
    assert [run["name"] for run in page.model["runs"]] == ["baseline", "baseline (2)"]


def test_a_page_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "report.html"
    out.write_text("mine")
    assert main(["report", str(DATA / "baseline.kvh"), "-o", str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"
    assert main(["report", str(DATA / "baseline.kvh"), "-o", str(tmp_path / "no" / "report.html")]) == 1
    assert "no directory" in capsys.readouterr().err


# Pictures, and notebooks


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_for_a_paper(suffix: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"usage{suffix}"
    assert main(["plot", str(DATA / "baseline.kvh"), str(OLD / "engine-0.32.0-light.kvh"), "-o", str(out)]) == 0
    content = out.read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        text = content.decode()
        assert all(word in text for word in ("KV cache in use (%)", "baseline, running", "seconds"))


def test_a_picture_of_nothing_or_of_an_unknown_kind_is_one_line(
    recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(recording.path), "-o", str(tmp_path / "a.png")]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    assert main(["plot", str(DATA / "baseline.kvh"), "-o", str(tmp_path / "a.gif")]) == 1
    assert ".png, .svg, .pdf" in capsys.readouterr().err


def test_a_notebook_shows_the_numbers_of_the_summary():
    trace = kvhook.open(DATA / "baseline.kvh")
    summary = trace.summary()
    for shown in (summary._repr_html_(), trace._repr_html_()):
        assert f"{summary.prefix_cache_hits:,}" in shown
        assert f"{100 * (summary.prefix_cache_hit_rate or 0):.1f} %" in shown
    assert "<svg" in trace._repr_html_()
    assert "<script" not in trace._repr_html_()


def test_scopes_are_listed_and_the_summary_leaves_warm_up_out(fresh: Path):
    with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh") as session:
        engine = vllm.engine()
        for name, warmup in (("warm-up", True), ("<measured>", False)):
            with session.scope(name, warmup=warmup):
                engine.plan += [step_stats(generated=4, kv_cache_usage=0.5) for _ in range(5)]
                for _ in range(5):
                    engine.step()
    page = report(fresh, fresh / "run.kvh")
    assert "&lt;measured&gt;" in page.text
    assert "<measured>" not in page.text
    assert "<dt>steps</dt><dd>5</dd>" in page.text
    assert len(page.curve("kv_cache_usage")) == 10


def rows_under(page: Page, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    below = page.text.split(f"<h4>{heading}", 1)[1].split("<table>", 1)[1].split("</table>", 1)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", below)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_hit_rates_of_labels_adapters_and_prompts_are_tables(tmp_path: Path):
    page = report(tmp_path, trace_with_labels(tmp_path).name)
    assert rows_under(page, "By label")[1:] == [
        ["agent-0", "2", "160", "80", "50.0 %", "4"],
        ["agent-1", "2", "100", "0", "0.0 %", "4"],
        ["without a label", "1", "40", "40", "100.0 %", "2"],
    ]
    assert [row[:2] for row in rows_under(page, "By LoRA adapter")[1:]] == [["no adapter", "3"], ["french", "2"]]
    assert "By prompt" not in page.text


def test_hits_of_samples_among_each_other_stand_against_hits_across_prompts(recording: Recording, tmp_path: Path):
    # prompt 0: the first sample finds 16 tokens of an earlier call, the others all 96 whole blocks
    for prompt, cached in ((0, [16, 96, 96]), (1, [0, 64])):
        for sample, found in enumerate(cached):
            recording.finish(
                prompt, prompt_number=prompt, sample_index=sample, num_prompt_tokens=100,
                num_cached_tokens=found, num_generation_tokens=5,
            )  # fmt: skip
    recording.step(num_prompt_tokens=500)
    page = report(tmp_path, recording.path)
    assert rows_under(page, "By prompt")[1:] == [
        ["0", "3", "300", "208", "69.3 %", "15"],
        ["1", "2", "200", "64", "32.0 %", "10"],
    ]
    # 3 samples would each have found 16 alone: 208 - 48 are from siblings; of the other prompt all 64
    assert "Of all 500 prompt tokens 44.8 % (224) were found because a sample" in page.text
    assert "and 9.6 % (48) because another prompt or an earlier call had." in page.text


def test_what_other_caches_would_have_found_is_drawn(tmp_path: Path):
    trace = ROOT / "tests" / "data" / "whole" / "run.kvh"
    out = tmp_path / "report.html"
    assert main(["report", str(trace), "-o", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    found = kvhook.open(trace).what_if()
    section = text[text.index('<section id="other-caches">') :].partition("</section>")[0]
    assert section.count("<circle") == len(found.sizes)
    for size in found.sizes:
        assert f"{size.blocks:,} blocks: {'' if size.exact else 'about '}{100 * size.hit_rate:.1f} % found" in section
    assert f"this run: {found.blocks:,}" in section
    assert section.count("<circle class=exact") == sum(size.exact for size in found.sizes)


def test_without_blocks_the_report_says_why_other_caches_are_not_known(recording: Recording, tmp_path: Path):
    recording.step()
    out = tmp_path / "report.html"
    assert main(["report", str(recording.path), "-o", str(out)]) == 0
    section = out.read_text(encoding="utf-8").partition('<section id="other-caches">')[2].partition("</section>")[0]
    assert "class=absent" in section
    assert "<svg" not in section
