"""``kvhook top``: as a screen of text, under Textual's pilot, and as text for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvhook.analysis.live import View
from kvhook.cli import main
from kvhook.discovery.watch import one_of
from kvhook.launch.textfile import Textfile
from kvhook.records.engine_events import CODES
from kvhook.text.live import HELP, SORTS, advice, history, screen
from kvhook.text.prometheus import as_text
from tests.conftest import ROOT
from tests.ring.synthetic import Recording
from tests.watched import watched

# ---- text ----------------------------------------------------------------------------------------------------------

PLAIN = View(4736, 0, "/models/tiny-llama", "serve.py", "alive", 0.1, 5120, 10.0, 59, 32)
FULL = View(
    **{
        **vars(PLAIN),
        "used": 0.5,
        "cached": 0.25,
        "empty": 0.25,
        "history": [abs(n % 40 - 20) / 20 for n in range(60)],
        "running": 7,
        "waiting": 12,
        "preempted": 2,
        "preempted_run": 30,
        "finished_run": 1234,
        "aborted_run": 1,
        "prefill_rate": 1200.4,
        "decode_rate": 890.0,
        "hit_rate": 0.4,
        "hit_rate_run": 0.35,
        "steps_rate": 99.6,
        "ttft": (0.178, 0.4),
        "itl": (0.0094, 0.021),
        "step_time": (0.009, 0.015),
        "limits": [("kv_blocks", 0.75), ("none_waiting", 0.25)],
        "recomputed": 0,
        "cost": 5e-6,
        "cost_share": 0.0005,
    }
)
SCREEN = """\
kvhook top
       pid eng  state   run  wait      KV    hits prefill/s decode/s  TTFT p50
      4736   0  alive     7    12  50.0 %  40.0 %     1,200      890    178 ms
--- 4736 serve.py tiny-llama --------------------------------------------------
KV cache    #########====..... used 50 %, cached 25 %, empty 25 % of 59 blocks
history     #:.                                   .:#:.                  100 %
            ###:.                               .:#####:.
            ######:.                         .:###########:.
            ########:.                     .:###############:.
            ###########:.               .:#####################:.
            #############:.           .:#########################:.
            ################:.     .:###############################:.
            ##################:. .:###################################:.   0 %
requests    7 running, 12 waiting, 2 preempted
this run    1,234 finished, 1 aborted, 30 preempted
tokens/s    1,200 prefill, 890 decode; hit rate 40.0 %, run 35.0 %
latency     TTFT 178 ms, 400 ms; ITL 9.4 ms, 21 ms (p50, p99)
steps       5,120; 100/s, 9 ms, 15 ms (p50, p99)
limited by  no KV blocks 75 %, nobody waited 25 %
            requests waited for KV blocks in 75 % of the steps
kvhook      5 us a step, 0.05 % of their time; 0 records missed here"""


def test_the_screen_of_one_engine():
    shown = screen([FULL], 0, 79, 23, heading="kvhook top", ascii_only=True)
    assert "\n".join(shown) == SCREEN


def test_nothing_is_known_and_nothing_is_made_up():
    text = "\n".join(screen([PLAIN], 0, 100, 23))
    assert "used -" in text
    assert "0.0 %" not in text
    assert "limited by  -" in text


def test_without_an_engine_it_says_what_to_do():
    text = "\n".join(screen([], 0, 80, 24, heading="kvhook top"))
    assert "kvhook run -- python script.py" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 10), (40, 5), (200, 60), (1, 1)])
@pytest.mark.parametrize("engines", [1, 16, 300])
def test_it_fits_any_terminal(width: int, height: int, engines: int):
    views = [View(**{**vars(FULL), "pid": 1000 + n}) for n in range(engines)]
    for selected in (0, engines // 2, engines - 1, engines + 5):
        shown = screen(views, selected, width, height, heading="kvhook top")
        assert len(shown) <= height
        assert max(map(len, shown)) <= width
        if (width, height) == (80, 24):
            assert any(line.startswith("--- ") and str(1000 + min(selected, engines - 1)) in line for line in shown)
            assert engines == 1 or sum(line.startswith("> ") for line in shown) == 1


def test_plain_characters_only_where_they_are_asked_for():
    assert all(line.isascii() for line in screen([FULL], 0, 80, 24, ascii_only=True))
    assert not all(line.isascii() for line in screen([FULL], 0, 80, 24))
    assert history([-1.0, 0.5, 9.0], 60) == "▁▅█"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limits": [("kv_blocks", 0.5)]}, "KV blocks in 50 %"),
        ({"limits": [("max_num_seqs", 0.9)]}, "max_num_seqs"),
        ({"limits": [("token_budget", 0.3)]}, "max_num_batched_tokens"),
        ({"limits": [("none_waiting", 1.0)]}, ""),
        ({"idle": 30.0, "limits": []}, "no step for 30 s"),
        ({"state": "dead"}, ""),
    ],
)
def test_advice_comes_with_its_evidence_and_not_without(change: dict[str, Any], said: str):
    text = advice(View(**{**vars(FULL), **change}))
    assert said in text
    assert bool(text) == bool(said)


# ---- the command and the live screen -------------------------------------------------------------------------------


def test_once_prints_every_engine_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Recording(tmp_path).run(3)
    Recording(tmp_path, engine=1).run(4)
    Recording(tmp_path, engine=2).run(5).die()  # ended before: not shown
    assert main(["top", "--once", "--ascii", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("KV cache") == 2
    assert out.count(" alive ") == 2


def test_no_terminal_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["top", "--dir", str(tmp_path)]) == 1
    assert "--once" in capsys.readouterr().err


def test_only_the_verb_imports_textual(python):
    out = python("import sys, kvhook, kvhook.cli; kvhook.cli.make_parser(); print('textual' in sys.modules)").stdout
    assert out.strip() == "False"


async def looked(app: Any) -> None:
    """Let it look at the engines, and wait until it has."""
    app.look_soon()
    await app.workers.wait_for_complete()


def pilot(size: tuple[int, int], views: list[View], act: Any) -> Any:
    """Run the live screen without a terminal, and do something to it."""
    app_module = pytest.importorskip("kvhook.top.app")
    looks: list[float] = []

    def look(window: float) -> list[View]:
        looks.append(window)
        return list(views)

    app = app_module.Top(look, ascii_only=True, every=60.0)

    async def drive() -> None:
        async with app.run_test(size=size) as driver:
            await app.workers.wait_for_complete()
            await driver.pause()
            await act(app, driver)
            await app.workers.wait_for_complete()

    asyncio.run(drive())
    return app, looks


def test_keys_do_what_the_help_says():
    views = [View(**{**vars(FULL), "pid": n, "used": n / 10}) for n in range(1, 4)]

    async def act(app: Any, driver: Any) -> None:
        assert app.shown[2].startswith("> ")
        await driver.press("down")
        assert app.shown[3].startswith("> ")
        await driver.press("s")
        assert "sorted by KV usage" in app.shown[0]
        assert [line.split()[0] for line in app.shown[2:5] if not line.startswith(">")] == ["3", "1"]
        await driver.press("plus")
        assert "last 30 s" in app.shown[0]
        await driver.press("minus", "minus", "minus", "minus", "minus", "minus", "minus", "minus")
        assert "last 1 s" in app.shown[0]
        await driver.press("p")
        assert "PAUSED" in app.shown[0]
        views.clear()
        await looked(app)
        assert any(line.startswith("--- 2 ") for line in app.shown)  # what it showed when it was paused
        await driver.press("space")
        await looked(app)
        assert "No engine" in app.shown[2]
        await driver.press("h")
        assert app.shown[2:] == list(HELP)
        await driver.press("escape", "q")

    app, looks = pilot((80, 24), views, act)
    assert app._exit
    assert looks[0] == 10.0
    assert {1.0, 30.0} <= set(looks)


def test_an_engine_that_ends_stays_with_a_last_summary_and_a_new_one_appears():
    views = [FULL]

    async def act(app: Any, driver: Any) -> None:
        views[0] = View(**{**vars(FULL), "state": "dead"})
        await looked(app)
        assert "kvhook autopsy 4736" in "\n".join(app.shown)
        views.insert(0, View(**{**vars(FULL), "pid": 99}))
        await looked(app)
        assert "2 engines" in app.shown[0]

    pilot((80, 24), views, act)


SNAPSHOTS = Path(__file__).parent / "data/top"


def of_blocks(used: float) -> dict[str, float]:
    """Half of what is not used is cached."""
    return {"used": used, "cached": (1 - used) / 2, "empty": (1 - used) / 2}


@pytest.mark.parametrize(
    ("name", "views", "keys"),
    [
        ("no-engine", [], ()),
        ("one-engine", [FULL], ()),
        (
            "sixteen-engines",
            [View(**{**vars(FULL), "pid": 1000 + n, **of_blocks(n / 16)}) for n in range(16)],
            ("s", "down"),
        ),
        ("full", [View(**{**vars(FULL), **of_blocks(0.97), "lost": 12})], ()),
        ("dead", [View(**{**vars(FULL), "state": "dead"})], ()),
        ("asleep", [View(**{**vars(FULL), "state": "asleep", "limits": [], "last_event": ("sleep", 4.0)})], ()),
        ("help", [FULL], ("h",)),
    ],
)
def test_pictures_of_the_screen_are_those_that_were_looked_at(
    name: str, views: list[View], keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """``WRITE_SNAPSHOTS=1`` writes them anew: then look at them, they open in a browser."""
    app_module = pytest.importorskip("kvhook.top.app")
    monkeypatch.setattr(app_module.time, "strftime", lambda _: "12:34:56")
    pictures: list[str] = []

    async def act(app: Any, driver: Any) -> None:
        await driver.press(*keys)
        await driver.pause()
        pictures.append(app.export_screenshot(title="kvhook top"))

    pilot((80, 24), views, act)
    path = SNAPSHOTS / f"{name}.svg"
    if os.environ.get("WRITE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(pictures[0], encoding="utf-8")
    assert pictures[0] == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm-256color", "NO_COLOR": "1"}])
def test_a_terminal_without_colours_is_given_none(tmp_path: Path, environment: dict[str, str]):
    pytest.importorskip("kvhook.top.app")
    Recording(tmp_path / "rings").run(3)
    command = [sys.executable, "-m", "kvhook", "top", "--dir", str(tmp_path / "rings")]
    more = {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "LINES": "24", **environment}
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, command, {**os.environ, **more})
    out = b""
    with contextlib.suppress(OSError):  # what a terminal says whose other end is closed
        asked = False
        while piece := os.read(terminal, 65536):
            out += piece
            if b"4736" in out or (b"serve.py" in out and not asked):
                os.write(terminal, b"q")
                asked = True
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = out.decode(errors="replace")
    assert "serve.py" in text
    colours = re.findall(r"\x1b\[[0-9;]*?(?:3[0-7]|4[0-7]|38;|48;|9[0-7])[0-9;]*m", text)
    assert not colours, colours[:5]


@pytest.mark.parametrize("size", [(80, 24), (40, 8), (160, 50)])
def test_it_is_drawn_for_the_terminal_s_size(size: tuple[int, int]):
    views = [View(**{**vars(FULL), "pid": n}) for n in range(1, 17)]

    async def act(app: Any, driver: Any) -> None:
        assert len(app.shown) <= size[1] - 1
        await driver.resize_terminal(60, 20)
        await driver.pause()
        assert max(map(len, app.shown)) <= 60

    pilot(size, views, act)


def test_no_line_is_broken_after_the_terminal_was_resized():
    views = [View(**{**vars(FULL), "pid": n}) for n in range(1, 17)]

    async def act(app: Any, driver: Any) -> None:
        for size in ((110, 34), (40, 12), (80, 24)):
            await driver.resize_terminal(*size)
            await driver.pause()
            text = app.query_one("#text")
            assert (text.size.width, text.size.height) == (size[0], len(app.shown))
            assert len(app.shown) <= size[1] - 1

    pilot((80, 24), views, act)


def test_engines_are_listed_in_the_order_in_which_they_were_made(tmp_path: Path):
    made = [Recording(tmp_path, engine=n).run(1) for n in range(11)]  # by name, 10 would come before 2
    assert [view.engine for view in watched(tmp_path)] == list(range(len(made)))


def test_an_engine_that_sleeps_is_shown_asleep_until_it_steps_again(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.clock -= 10**9
    recording.run(3).ring.note_event(CODES["sleep"], rest=True)
    recording.ring.note_event(CODES["weights_updated"])
    (view,) = watched(tmp_path)
    assert view.state == "asleep"
    assert view.last_event is not None
    assert view.last_event[0] == "weights_updated"
    shown = screen([view], 0, 80, 24)
    assert any("asleep" in line for line in shown)
    assert any("weights updated, " in line and line.endswith(" ago") for line in shown)
    recording.clock = time.monotonic_ns() + 10**9
    recording.run(1)
    (view,) = watched(tmp_path)
    assert view.state == "alive", "vLLM runs it, whoever forgot to wake it"


def test_every_order_can_be_computed_of_what_is_not_known():
    assert [key(PLAIN) for key in SORTS.values()] == [0.0] * len(SORTS)


# ---- for Prometheus ------------------------------------------------------------------------------------------------


def test_the_text_for_prometheus_is_read_by_its_own_parser():
    parser = pytest.importorskip("prometheus_client.parser")
    views = [FULL, View(**{**vars(PLAIN), "engine": 1, "model": 'a "name"\\ with\nall'})]
    families = {family.name: family for family in parser.text_string_to_metric_families(as_text(views))}
    blocks = {(s.labels["engine"], s.labels["state"]): s.value for s in families["kvhook_kv_blocks"].samples}
    assert blocks == {("0", "used"): 30, ("0", "cached"): 15, ("0", "empty"): 15}  # of 59, rounded
    steps = {s.labels["model"]: s.value for s in families["kvhook_steps"].samples}
    assert steps == {"/models/tiny-llama": 5120, 'a "name"\\ with\nall': 5120}
    limits = {s.labels["reason"]: s.value for s in families["kvhook_batch_limited_ratio"].samples}
    assert limits == {"kv_blocks": 0.75, "none_waiting": 0.25}
    assert families["kvhook_prefix_cache_hit_ratio"].samples[0].value == 0.35
    assert "kvhook_evicted_blocks" not in families, "what is not known is not there"


def test_the_file_is_replaced_as_a_whole_and_an_error_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recording = Recording(tmp_path / "rings").run(3)
    path = tmp_path / "out.prom"
    textfile = Textfile(path, lambda: [tmp_path / "rings"], one_of([]), every=0.0)
    textfile.look()
    assert "} 3\n" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    recording.run(2)
    textfile.look()
    assert "} 5\n" in path.read_text()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.prom"]
    path.unlink()
    path.mkdir()
    textfile.look()
    textfile.close()
    assert capsys.readouterr().err.count("cannot write") == 1
