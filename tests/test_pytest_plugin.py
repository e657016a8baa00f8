"""The pytest plug-in, in pytest runs of its own, over a vLLM that plays a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kvhook
import kvhook.recording.installation  # pytester takes out of this process what is first loaded in its tests
from kvhook.window import Window, position
from tests.conftest import ROOT
from tests.standin import fake_vllm, step_stats

pytest_plugins = ["pytester"]

#: An engine for the whole module; `work(llm, hits)` is a step in which 100 tokens are looked up and `hits` found.
CONFTEST = """
import sys
import pytest
import wrapt
from tests.standin import ENGINE, fake_vllm, step_stats

@pytest.fixture(scope="module")
def llm():
    with fake_vllm() as vllm:
        wrapt.notify_module_loaded(sys.modules[ENGINE])  # as a real import does
        yield vllm.engine(log_stats=False)

@pytest.fixture
def work(llm):
    def work(*hits):
        for some in hits:
            llm.plan.append(step_stats(prefix={"queries": 100, "hits": some}, kv_cache_usage=0.5, itl=[0.01, 0.02]))
            llm.step()
    return work
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test file; the plug-in is loaded by its module's name, whether or not this kvhook is installed.

    In a process of its own: afterwards pytest would take the modules that were loaded meanwhile out of this one.
    """
    pytester.makeconftest(CONFTEST)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(test: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test)
        return pytester.runpytest_subprocess(
            *("-p", "no:kvhook", "-p", "kvhook.pytest_plugin", "-p", "no:cacheprovider", "--strict-markers"),
            *arguments,
        )

    return run


def test_each_test_sees_its_own_part_of_the_run(run: Run):
    run("""
        import pytest

        def test_first(kvhook, work):
            work(50, 100)
            assert kvhook.summary().prefix_cache_hit_rate == 0.75
            assert kvhook.steps()["prefix_cache_hits"].tolist() == [50, 100]

        def test_between(work):
            work(0)

        def test_second(kvhook, work):
            assert kvhook.summary().steps == 0
            work(90)
            s = kvhook.summary()
            assert (s.prefix_cache_hit_rate, s.steps, s.engines, s.records_lost, s.records_dropped) == (0.9, 1, 1, 0, 0)
            values, counts = kvhook.latencies("inter_token_latency")
            assert sorted(values) == [0.01, 0.02]
            assert len(kvhook.requests()) == 0

        @pytest.mark.kvhook_session(whole=True)
        def test_all(kvhook):
            assert kvhook.summary().steps == 4
    """).assert_outcomes(passed=4)


def test_a_failed_test_shows_its_summary_and_keeps_its_trace(run: Run, pytester: pytest.Pytester):
    result = run(
        """
        import pytest

        def test_before(kvhook, work):
            work(1, 2, 3)

        @pytest.mark.parametrize("n", [1])
        def test_shared(kvhook, work, n):
            work(10)
            assert kvhook.summary().prefix_cache_hit_rate > 0.8
        """,
        "--kvhook-trace-dir=traces",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- kvhook -*", "*: 1 steps in *", "*hit rate 10.0 % of this run: 10 of 100 tokens"])
    (kept,) = (pytester.path / "traces").iterdir()
    assert "test_shared-1" in kept.name
    assert kvhook.open(kept).steps()["prefix_cache_hits"].tolist() == [10]
    result.stdout.fnmatch_lines([f"*trace *{kept.name}"])


def test_a_fixture_that_fails_shows_it_as_well(run: Run, pytester: pytest.Pytester):
    result = run(
        """
        import pytest

        @pytest.fixture
        def prepared(kvhook, work):
            work(30)
            assert 0

        @pytest.fixture
        def cleaned(kvhook, work):
            yield
            work(40)
            assert kvhook.summary().prefix_cache_hit_rate > 0.8

        def test_set_up(prepared): pass
        def test_take_down(cleaned): pass
        """,
        "--kvhook-trace-dir=traces",
    )
    result.assert_outcomes(errors=2, passed=1)
    result.stdout.fnmatch_lines(["*hit rate 30.0 % of this run*", "*hit rate 40.0 % of this run*"])
    assert len(list((pytester.path / "traces").iterdir())) == 2


def test_without_the_option_nothing_is_written(run: Run, pytester: pytest.Pytester):
    result = run("def test_it(kvhook, work):\n    work(1)\n    assert 0")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*- kvhook -*"])
    assert not list(pytester.path.rglob("*.kvh"))


def test_the_marker_records_a_test_that_does_not_take_the_fixture(run: Run, pytester: pytest.Pytester):
    result = run(
        """
        import pytest
        pytestmark = pytest.mark.kvhook_session

        def test_it(work):
            work(20)
            assert 0
        """,
        "--kvhook-trace-dir=traces",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*hit rate 20.0 % of this run*"])
    assert len(list((pytester.path / "traces").iterdir())) == 1


def test_a_test_that_made_no_step_keeps_no_trace(run: Run, pytester: pytest.Pytester):
    result = run("def test_it(kvhook):\n    assert 0", "--kvhook-trace-dir=traces")
    result.stdout.fnmatch_lines(["*no engine made a step in this test"])
    assert not (pytester.path / "traces").exists()


def test_a_trace_that_cannot_be_kept_hides_no_failure(run: Run, pytester: pytest.Pytester):
    (pytester.path / "traces").write_text("a file is in the way")
    result = run("def test_it(kvhook, work):\n    work(1)\n    assert 'the failure' == 0", "--kvhook-trace-dir=traces")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*'the failure' == 0*", "*FileExistsError*"])


def test_tests_that_do_not_ask_for_it_have_nothing_installed(run: Run):
    run("""
        import sys

        def test_it():
            assert "kvhook.recording.session" not in sys.modules
    """).assert_outcomes(passed=1)


def test_kvhook_is_installed_before_any_fixture_makes_an_engine(run: Run):
    run("""
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def early():
            import kvhook.recording.installation
            return kvhook.recording.installation.current_session()

        def test_it(early, kvhook):
            assert early is kvhook.session
    """).assert_outcomes(passed=1)


def test_collecting_alone_installs_nothing(run: Run, pytester: pytest.Pytester, fresh: Path):
    run("def test_it(kvhook): pass", "--collect-only").assert_outcomes()
    assert not (fresh / "rings").exists()


def test_a_test_that_uninstalls_kvhook_takes_nothing_from_the_next(run: Run):
    run("""
        import kvhook as package

        def test_first(kvhook, work):
            work(1)
            package.uninstall()
            assert kvhook.summary().steps == 1

        def test_second(kvhook):
            assert kvhook.summary().steps == 0
    """).assert_outcomes(passed=2)


def test_help_and_markers_name_it(run: Run):
    run("", "--help").stdout.fnmatch_lines(["*--kvhook-trace-dir=DIR*"])
    run("", "--markers").stdout.fnmatch_lines(["*@pytest.mark.kvhook_session(whole=False)*"])


# The window behind it


def test_a_window_of_two_engines_has_only_what_came_later(fresh: Path):
    with fake_vllm() as vllm:
        session = kvhook.install()
        engines = [vllm.engine(log_stats=False) for _ in range(3)]

        def work(engine: int, hits: int) -> None:
            engines[engine].plan.append(step_stats(prefix={"queries": 100, "hits": hits}))
            engines[engine].step()

        work(0, 1)
        work(1, 2)
        after = position(session.trace())
        work(1, 3)
        work(2, 4)
        window = Window(session.trace(), after)
        assert window.steps()["prefix_cache_hits"].tolist() == [3, 4]
        assert window.steps(1)["prefix_cache_hits"].tolist() == [3]
        assert [engine["engine"] for engine in window.meta["engines"]] == [1, 2]
        assert (window.meta["records_lost"], window.meta["records_dropped"]) == (0, 0)
        assert window.meta["vllm"] == session.meta["vllm"]
        (file,) = window.dump(fresh / "w.kvh")
        assert kvhook.open(file).steps()["prefix_cache_hits"].tolist() == [3, 4]


def test_an_empty_window(fresh: Path):
    assert Window(kvhook.install().trace(), {}).summary().steps == 0
