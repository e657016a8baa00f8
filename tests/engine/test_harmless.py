"""Kvhook in a real engine changes nothing that the user can see, and goes without a trace."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import kvhook
from kvhook.errors import StatsOffError
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM, Recorded
from tests.workloads import Seen, observe, run, workload

THROUGHPUT = "Avg prompt throughput"


pytestmark = pytest.mark.usefixtures("nothing_installed")


def test_outputs_are_the_same_with_and_without(recorded: Recorded, bare: Seen, bare_default: Seen):
    assert recorded.seen.token_ids == bare.token_ids == bare_default.token_ids


def test_the_engine_takes_as_many_steps_with_and_without(recorded: Recorded, bare: Seen):
    assert len(recorded.seen.steps) == len(bare.steps)
    assert [s.blocks_in_use for s in recorded.seen.steps] == [s.blocks_in_use for s in bare.steps]


def test_nothing_failed_inside(recorded: Recorded):
    assert recorded.session.faults == {}


# The user's stats on


def test_stats_on_vllms_loggers_are_those_without_kvhook(stats_on: Recorded, bare: Seen):
    assert stats_on.seen.loggers == bare.loggers
    assert "PrometheusStatLogger" in bare.loggers


def test_stats_on_get_metrics_counts_what_it_counts_without_kvhook(stats_on: Recorded, bare: Seen):
    assert stats_on.seen.error_of_get_metrics == bare.error_of_get_metrics == ""
    assert stats_on.seen.counters == bare.counters
    assert stats_on.seen.histograms.keys() == bare.histograms.keys()
    counts = {name: count for name, (count, _) in bare.histograms.items()}
    assert {name: count for name, (count, _) in stats_on.seen.histograms.items()} == counts


def test_stats_on_the_log_goes_on(stats_on: Recorded, bare: Seen):
    # before 0.11 an engine behind LLM never logs its stats
    logs = vllm_here.engine_has("logger_manager")
    assert any(THROUGHPUT in line for line in bare.log) == logs
    assert any(THROUGHPUT in line for line in stats_on.seen.log) == logs


# The user's stats off


def test_stats_off_kvhook_is_alone_in_the_list_of_loggers(stats_off: Recorded, bare_default: Seen):
    assert bare_default.loggers == []
    assert len(stats_off.seen.loggers) == 1
    assert "Prometheus" not in stats_off.seen.loggers[0]
    assert "Logging" not in stats_off.seen.loggers[0]


def test_stats_off_the_log_lines_do_not_come_back(stats_off: Recorded, bare_default: Seen):
    assert not any(THROUGHPUT in line for line in bare_default.log)
    assert not any(THROUGHPUT in line for line in stats_off.seen.log)


def test_stats_off_get_metrics_goes_on_refusing(stats_off: Recorded, bare_default: Seen):
    assert bare_default.error_of_get_metrics.startswith("AssertionError: Stat logging disabled")
    assert stats_off.seen.error_of_get_metrics.startswith("AssertionError: Stat logging disabled")


def test_stats_off_prometheus_keeps_the_numbers_of_the_engine_before(make_llm: MakeLLM):
    # vLLM's own logger, when made, throws away the numbers of every earlier engine.
    earlier = make_llm(disable_log_stats=False)
    run(earlier, workload()[:1])
    before = {m.name: m.value for m in earlier.get_metrics() if type(m).__name__ == "Counter"}
    with kvhook.install():
        run(make_llm(), workload()[:2])
        after = {m.name: m.value for m in earlier.get_metrics() if type(m).__name__ == "Counter"}
    assert before["vllm:prompt_tokens"] == len(workload()[0].prompts[0])
    assert after == before


# Putting back


def names() -> dict[str, Any]:
    """The objects behind the names that kvhook patches, looked up by hand."""
    import vllm.v1.engine.llm_engine as engine  # type: ignore[import-not-found, unused-ignore]
    import vllm.v1.metrics.loggers as loggers  # type: ignore[import-not-found, unused-ignore]
    import vllm.v1.metrics.stats as stats  # type: ignore[import-not-found, unused-ignore]

    return {
        **{f"LLMEngine.{name}": value for name, value in vars(engine.LLMEngine).items()},
        **{
            f"{owner}.{name}": value
            for owner in ("StatLoggerManager", "PrometheusStatLogger")
            for name, value in vars(getattr(loggers, owner, object)).items()
        },
        **{f"IterationStats.{name}": value for name, value in vars(stats.IterationStats).items()},
        **{f"llm_engine.{name}": value for name, value in vars(engine).items()},
    }


@pytest.mark.usefixtures("make_llm")
def test_after_uninstall_the_patched_names_are_the_very_objects_they_were():
    before = names()
    kvhook.install()
    patched = names()
    changed = {name for name in before if patched[name] is not before[name]}
    assert {"LLMEngine.step", "LLMEngine.__init__"} <= changed
    kvhook.uninstall()
    after = names()
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] is not before[name]] == []


@pytest.mark.parametrize("options", [{}, {"disable_log_stats": False}], ids=["stats_off", "stats_on"])
def test_an_engine_that_outlives_uninstall_gives_the_same_outputs(make_llm: MakeLLM, bare: Seen, options: Any):
    with kvhook.install() as session:
        llm = make_llm(**options)
    assert observe(llm, workload()).token_ids == bare.token_ids
    assert len(session.steps()) == 0


# attach, two engines, deletion


def test_attach_to_an_engine_with_its_stats_on_records_from_then_on(make_llm: MakeLLM):
    llm = make_llm(disable_log_stats=False)
    run(llm, workload()[:1])
    session = kvhook.attach(llm)
    seen = observe(llm, workload()[1:3])
    steps = session.steps()
    assert len(steps) == len(seen.steps)
    assert steps["num_prompt_tokens"].sum() == seen.counters["vllm:prompt_tokens"] == sum(seen.prompt_lengths)
    assert steps["prefix_cache_hits"].sum() == seen.counters["vllm:prefix_cache_hits"] > 0
    assert kvhook.attach(llm) is session
    run(llm, workload()[:1])
    assert session.steps()["step"].tolist() == list(range(len(session.steps())))


def test_attach_to_an_engine_with_its_stats_off_says_that_it_is_too_late(make_llm: MakeLLM):
    llm = make_llm()
    before = names()
    with pytest.raises(StatsOffError, match="cannot be changed any more"):
        kvhook.attach(llm)
    assert all(names()[name] is before[name] for name in before)
    run(llm, workload()[:1])


def test_two_engines_in_one_process_are_told_apart(make_llm: MakeLLM):
    with kvhook.install() as session:
        one, two = make_llm(), make_llm(disable_log_stats=False)
        first = run(one, workload()[:1])
        second = run(two, workload()[1:2])
        first += run(one, workload()[4:5])
        for engine, outputs in enumerate((first, second)):
            steps, requests = session.steps(engine), session.requests(engine)
            assert (steps["engine"] == engine).all()
            assert steps["step"].tolist() == list(range(len(steps)))
            assert steps["num_generation_tokens"].sum() == sum(len(o.outputs[0].token_ids) for o in outputs)
            assert len(requests) == len(outputs)
        assert [e["engine"] for e in session.meta["engines"]] == [0, 1]
        assert [e["stats_on"] for e in session.meta["engines"]] == [False, True]
        assert session.summary().engines == 2
        assert len(session.rings) == 2


def test_a_deleted_engine_closes_its_ring_and_its_steps_stay(make_llm: MakeLLM):
    from kvhook.ring.reader import RingReader

    with kvhook.install() as session:
        one, two = make_llm(), make_llm()
        run(one, workload()[:1])
        run(two, workload()[:1])
        readers = [RingReader(ring) for ring in session.rings]
        assert [reader.closed for reader in readers] == [False, False]
        del one
        gc.collect()
        assert [reader.closed for reader in readers] == [True, False]
        assert len(session.steps(0)) > 0
        assert session.summary().num_finished_reqs == 2


def test_an_aborted_request_is_recorded_as_vllm_reports_it(make_llm: MakeLLM):
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    with kvhook.install() as session:
        llm = make_llm()
        engine = llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        for name in ("a", "b"):
            engine.add_request(name, {"prompt_token_ids": [5, 6, 7]}, params)
        for _ in range(5):
            engine.step()
        engine.abort_request(["a"])
        while engine.has_unfinished_requests():
            engine.step()
        steps, requests = session.steps(), session.requests()
    assert session.faults == {}
    assert "length" in requests["finish_reason"].tolist()
    # a name that is no number has none; it is never text: nothing that a user wrote leaves the engine
    assert "request_id" not in (requests.dtype.names or ()) or set(requests["request_id"].tolist()) == {-1}
    assert steps["step"].tolist() == list(range(len(steps)))
    assert steps["num_kv_blocks_used"][-1] == 0


def test_facts_about_the_engine(stats_off: Recorded):
    (engine,) = stats_off.session.meta["engines"]
    import vllm  # type: ignore[import-not-found, unused-ignore]

    assert engine["vllm"] == vllm.__version__
    assert (engine["block_size"], engine["num_gpu_blocks"], engine["num_kv_blocks"]) == (32, 60, 59)
    assert engine["enable_prefix_caching"] is True
    assert engine["max_num_seqs"] == 24
    assert engine["stats_on"] is False


def test_no_text_leaves_the_engine(stats_off: Recorded, tmp_path: Any):
    (path,) = stats_off.session.dump(tmp_path / "run.kvh")
    data = path.read_bytes()
    for one in stats_off.seen.outputs:
        text = one.outputs[0].text.strip()
        assert len(text) < 8 or text.encode() not in data


def test_columns_that_are_absent_have_a_reason_and_are_not_there(recorded: Recorded):
    (engine,) = recorded.session.meta["engines"]
    for kind, rows in (("step", recorded.steps), ("request", recorded.requests)):
        reasons = engine["absent"][kind]
        # exactly those that vLLM's code does not have
        assert set(reasons) == vllm_here.absent(kind, engine["stats_on"])
        assert not set(rows.dtype.names) & reasons.keys()
        assert all(reasons.values())
    both = vllm_here.absent("step", engine["stats_on"]) | vllm_here.absent("request")
    assert recorded.session.meta["absent"].keys() == both
