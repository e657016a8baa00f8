"""What only an engine can show: the collector's numbers against what came back, block arithmetic, and each other."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.adapters.table import read_path
from kvhook.analysis.blocks import blocks_of, prefix_hits
from kvhook.check import Check, Failed, Result, Skipped, expect, run
from kvhook.check.engine import output_to, recorded_engine
from kvhook.collector import VLLMMetricsCollector, names
from kvhook.errors import KvhookError

if TYPE_CHECKING:
    from kvhook.recording.session import Session

#: Collections of which the median is taken for the cost.
TIMES = 25
#: Rounds of repeated prompts, requests in each, and tokens that each request generates.
ROUNDS, VISITORS, ANSWER = 4, 3, 4
#: Requests of the batch whose usage is followed.
BATCH = 8

_TEXT = (
    "You are the librarian of a small town. You answer in short and friendly sentences, you name the shelf and the "
    "title, and you never make up a book. When you do not know you say so and offer to look it up until tomorrow. "
)

_DOCTOR = "`kvhook doctor` says what kvhook can record of this vLLM, and why not the rest"
_TOTALS = (
    "do not rely on this collection method with this vLLM, and report it with the output of `kvhook doctor --json`"
)
_ALONE = "see that nothing else uses this engine, and that the model has plain full attention; else report it"


def check_engine(model: str | None, log: Path) -> Iterator[Result]:
    """Start an engine, make every check on it, and take it down.

    Args:
        model: a model of the user's, or None for the tiny one.
        log: vLLM's messages go into this file meanwhile.
    """
    with contextlib.ExitStack() as stack:
        started: list[tuple[Any, Session]] = []

        def engine_starts() -> str:
            """The engine starts."""
            began = time.monotonic()
            try:
                started.append(stack.enter_context(recorded_engine(model)))
            except KvhookError as error:
                raise Failed("an engine", "one", "none", str(error)) from error
            except Exception as error:
                seen = f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0]}"
                raise Failed(f"vLLM with {model or 'the tiny model'}", "an engine", seen, _messages_in(log)) from error
            return f"{model or 'a tiny Llama with random weights'}, in {time.monotonic() - began:.0f} s"

        yield from _quietly([engine_starts], log)
        if started:
            # nothing of the engine is kept here, so that it is gone when the stack is closed
            yield from _quietly(Inference(*started.pop()).checks(), log)
            with output_to(log):
                stack.close()


def _quietly(checks: list[Check], log: Path) -> Iterator[Result]:
    """Run checks, without vLLM's messages in between."""
    for check in checks:
        with output_to(log):
            (result,) = run([check])
        yield result


def _messages_in(log: Path) -> str:
    return f"read vLLM's messages in {log}, and see that the model runs without kvhook"


class Inference:
    """The checks of one engine. They are made in order: each leaves the engine idle.

    Args:
        llm: a ``vllm.LLM`` with vLLM's stats and prefix caching on, made after ``kvhook.install()``, whose prefix
            cache has seen nothing yet.
        session: what records it.
    """

    def __init__(self, llm: Any, session: Session) -> None:
        self.llm = llm
        self.session = session
        self.collector = VLLMMetricsCollector(llm)
        self.environment = self.collector.environment()

    def checks(self) -> list[Check]:
        """All of them."""
        return [
            *(self.recorded, self.basic_collection, self.hit_rate_progression, self.usage_progression),
            *(self.methods_agree, self.histograms_agree, self.accounts_balance, self.cost),
        ]

    def recorded(self) -> str:
        """The engine is recorded."""
        found = self.collector.collect_hook_stats()
        if not found["stats_available"]:
            raise Failed("kvhook's recording", "this engine in it", _reason(found, names.HOOK), _DOCTOR)
        expect("faults in kvhook", self.session.faults, {})
        e = self.environment
        blocks = f"{e['num_gpu_blocks']} blocks of {e['block_size']} tokens"
        return f"vLLM {e['vllm']} on {e['device']}, adapter {e['adapter']}, {blocks}"

    def basic_collection(self) -> str:
        """Basic collection."""
        prompts = [self._prompt(f"Request {i}. ", 24 + 3 * i) for i in range(4)]
        collector = self._monitor()
        generated = self._generate(prompts, 16)
        collector.stop_monitoring()
        stats = collector.get_comprehensive_stats()
        summary, key, analysis = stats["summary"], stats["key_metrics"], stats["histogram_analysis"]
        sent = sum(map(len, prompts))
        expect("collection_method", stats["collection_method"], names.HOOK, _DOCTOR)
        expect("prompt tokens of 4 requests", summary["num_prompt_tokens"], sent, _TOTALS)
        expect("tokens that they generated", summary["num_generation_tokens"], sum(generated), _TOTALS)
        expect("requests that finished", summary["num_finished_reqs"], len(prompts), _TOTALS)
        expect("first tokens in the histogram", analysis["total_ttft_requests"], len(prompts), _TOTALS)
        expect("requests that run or wait now", (key["requests_running"], key["requests_waiting"]), (0, 0), _ALONE)
        wanted = [*(k.key for k in names.KEYS), *(v.name for v in names.VALUES if v.name != names.V0_RATE)]
        absent = [name for name in wanted if name not in key]
        silent = [name for name in absent if not stats["absent"].get(name)]
        expect("key metrics that have neither value nor reason", silent, [])
        more = f", {len(absent)} absent ({stats['absent'][absent[0]]})" if absent else ""
        return f"{sent} prompt and {sum(generated)} generated tokens, as sent; {len(key)} metrics{more}"

    def hit_rate_progression(self) -> str:
        """Hit-rate progression."""
        self._needs_block_arithmetic()
        size = self.environment["block_size"]
        shared = self._prompt("The same for all. ", 3 * size + size // 2)
        # each round goes on with more of what all share, so that the rate climbs from round to round
        rounds = [
            [shared[: size * (n + 1)] + self._prompt(f"Visitor {v} of day {n}. ", size) for v in range(VISITORS)]
            for n in range(ROUNDS - 1)
        ]
        rounds.append(rounds[-1])
        self._needs_room_for(max(len(p) for r in rounds for p in r) + ANSWER)
        collector = self._monitor()
        for prompts in rounds:
            self._generate(prompts, ANSWER)
            collector.collect_current_stats()
        collector.stop_monitoring()
        stats = collector.get_comprehensive_stats()
        if names.V0_RATE in stats["latest_stats"]["metrics_found"]:
            raise Skipped(stats["absent"]["prefix_cache_queries"])
        seen = stats["trend"]["between_collections"]
        hits = iter(prefix_hits([prompt for prompts in rounds for prompt in prompts], size))
        expected = [sum(next(hits) for _ in prompts) for prompts in rounds]
        asked = [sum(map(len, prompts)) for prompts in rounds]
        expect("tokens looked up, round by round", [r["prefix_cache_queries"] for r in seen], asked, _ALONE)
        expect("tokens hit, round by round", [r["prefix_cache_hits"] for r in seen], expected, _ALONE)
        rates = [h / a for h, a in zip(expected, asked, strict=True)]
        expect("hit rates", [r["prefix_cache_hit_rate"] for r in seen], rates)
        so_far = sum(expected) / sum(asked)
        expect("hit rate so far", seen[-1]["prefix_cache_hit_rate_so_far"], so_far)
        text = ", ".join(f"{100 * rate:.1f}" for rate in rates)
        return f"{text} %, {100 * so_far:.1f} % in all: {sum(expected)} tokens, the block arithmetic of each round"

    def usage_progression(self) -> str:
        """Usage progression through a batch."""
        self._needs_block_arithmetic()
        size = self.environment["block_size"]
        # all end in the middle of a block, so that it does not matter if one starts a few steps before the others
        length, generated = size + size // 2, size
        self._needs_room_for(length + generated)
        collector = self._monitor()
        prompts = [self._prompt(f"Story {i} of the batch. ", length) for i in range(BATCH)]
        self._generate(prompts, generated)
        collector.stop_monitoring()
        stats = collector.get_comprehensive_stats()
        usage = [part["kv_cache_usage"] for part in stats["trend"]["usage_progression"]]
        peak = stats["summary"]["kv_cache_usage_peak"]
        if peak is None:
            raise Failed("usage", "a peak", f"none: {stats['absent'].get('kv_cache_usage')}", _DOCTOR)
        (engine,) = (e for e in self.session.meta["engines"] if e["engine"] == self._number)
        of, reserved = engine["kv_usage_of"], engine["kv_usage_reserved"]
        # the last token is never read, and the place of the one before it is given back in the step that takes it
        held = BATCH * blocks_of(length + generated - 2, size)
        expect("blocks in use at the peak", round(peak * of) - reserved, held, _ALONE)
        expect("usage at the end", stats["key_metrics"]["gpu_cache_usage_sys"], reserved / of, _ALONE)
        highest = max(range(len(usage)), key=lambda i: usage[i])
        if usage[: highest + 1] != sorted(usage[: highest + 1]) or not usage[0] < usage[highest]:
            raise Failed("usage on the way to its peak", "a rise", str(usage[: highest + 1]), _ALONE)
        return (
            f"rises to {100 * peak:.2f} % = {held} of {engine['num_kv_blocks']} blocks, the block arithmetic; back to 0"
        )

    def methods_agree(self) -> str:
        """Every collection method against the others."""
        found = self._every_source()
        compared = [v.name for v in names.VALUES if v.name != names.V0_RATE] + ["prefix_cache_hit_rate"]
        # vLLM's front end does not pass the stats of every step on to its counters; kvhook has counted what it kept
        missed = self.session.summary(self._number).missed_by_vllm
        kept = {"prefix_cache_queries": missed.queries, "prefix_cache_hits": missed.hits} if missed else {}
        if any(kept.values()):
            compared.remove("prefix_cache_hit_rate")  # it is made of the other two
        known = {}
        for name in compared:
            values = {source: f["metrics_found"][name] for source, f in found.items() if name in f["metrics_found"]}
            if len({value + kept.get(name, 0) * (source != names.HOOK) for source, value in values.items()}) > 1:
                reference = values.pop(names.HOOK, None)
                raise Failed(name, f"{reference} from every source, as {names.HOOK} has it", str(values), _TOTALS)
            known[name] = len(values)
        if not any(count == len(found) for count in known.values()):
            raise Failed("values that every source knows", "some", "none", _TOTALS)
        partly = [f"{name} from {count}" for name, count in known.items() if count < len(found)]
        more = f"; not from all: {', '.join(partly)}" if partly else ""
        if missed is not None and any(kept.values()):
            looked_up = f"{missed.queries:,} tokens looked up, {missed.hits:,} found"
            more += f"; vLLM's own counters missed {looked_up}: rely on {names.HOOK} for the prefix cache"
        return f"{' = '.join(found)}: {len(compared) - len(partly)} of {len(compared)} values{more}"

    def histograms_agree(self) -> str:
        """Latency histograms, bucket by bucket."""
        found = {source: f["histogram_data"] for source, f in self._every_source().items()}
        reference = found.pop(names.HOOK)
        compared = 0
        for source, histograms in found.items():
            for name, theirs in histograms.items():
                if name not in reference:
                    continue
                mine, compared = reference[name], compared + 1
                expect(f"{name}: values from {source}", theirs["count"], mine["count"], _TOTALS)
                # a vLLM of another release may have other bounds: those in common count
                common = [bound for bound in theirs["buckets"] if bound in mine["buckets"]]
                theirs_in, mine_in = ({b: h["buckets"][b] for b in common} for h in (theirs, mine))
                expect(f"{name}: buckets from {source}", theirs_in, mine_in, _TOTALS)
        if not compared:
            raise Skipped("no source but kvhook's has histograms in this vLLM")
        return f"{len(reference)} of kvhook's, {compared} comparisons; the hook alone knows exact percentiles"

    def accounts_balance(self) -> str:
        """Accounts that must balance."""
        accounts = self.session.summary(self._number).accounts
        if not accounts:
            raise Skipped("this vLLM tells no two numbers that could be compared")
        for account in accounts:
            if not account.ok:
                where = f"{account.left_is}, against {account.right_is}"
                raise Failed(f"{account.name} ({where})", str(account.right), str(account.left), _TOTALS)
        explained = "; ".join(f"{a.name}: {a.difference:+,}, {a.explained_by}" for a in accounts if a.difference)
        said = ", ".join(f"{a.left:,} {a.name}" for a in accounts if a.right)
        return f"{len(accounts)} accounts: {said}{f' (explained: {explained})' if explained else ''}"

    def cost(self) -> str:
        """Cost of each method."""
        cost = self.session.summary(self._number).kvhook_ns_p50
        if cost is None:
            raise Failed("what kvhook takes in a step", "a time", "no step was measured", _DOCTOR)
        c = self.collector
        calls: dict[str, Callable[[], object]] = {
            names.HOOK: c.collect_hook_stats,
            names.INTERNAL: c.collect_internal_stats,
            names.REGISTRY: c.collect_prometheus_metrics,
            "everything": c.get_comprehensive_stats,
        }
        took = {name: f"{1e3 * _median_seconds(call):.2f} ms" for name, call in calls.items()}
        text = ", ".join(f"{name} {time}" for name, time in took.items())
        return f"recording {cost / 1e3:.1f} us a step; one collection: {text}"

    @property
    def _number(self) -> int:
        """The number of this engine in the session."""
        hook = self.collector.recording
        if hook.session is None:
            raise Failed("kvhook's recording", "this engine in it", "nothing of it", _DOCTOR)
        number = hook.number
        if number is None:
            raise Skipped("the engine has several ranks, each recorded as an engine of its own")
        return number

    def _monitor(self) -> VLLMMetricsCollector:
        """A collector whose monitored time begins now."""
        collector = VLLMMetricsCollector(self.llm)
        collector.start_monitoring()
        return collector

    def _every_source(self) -> dict[str, dict[str, Any]]:
        c = self.collector
        found = {
            names.HOOK: c.collect_hook_stats(),
            names.INTERNAL: c.collect_internal_stats(),
            names.REGISTRY: c.collect_prometheus_metrics(),
        }
        for source, one in found.items():
            if not one["stats_available"]:
                raise Failed(f"the source {source}", "numbers", _reason(one, source), _DOCTOR)
        return found

    def _prompt(self, beginning: str, length: int) -> list[int]:
        """So many token ids that begin with a text. Two with another beginning share no block."""
        tokenizer = self.llm.get_tokenizer()
        ids = list(tokenizer.encode(beginning))
        while len(ids) < length:
            ids += tokenizer.encode(_TEXT)
        return ids[:length]

    def _generate(self, prompts: list[list[int]], max_tokens: int) -> list[int]:
        """How many tokens came back for each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def _needs_block_arithmetic(self) -> None:
        """Skip where prefix caching is off, or a block is not so many tokens of a request and stays until its end."""
        if self.environment["enable_prefix_caching"] is not True:
            raise Skipped("prefix caching is off in this engine")
        if why := _no_block_arithmetic(read_path(self.llm, "llm_engine.vllm_config.model_config")):
            raise Skipped(f"{why}: its blocks cannot be predicted from the number of tokens")

    def _needs_room_for(self, num_tokens: int) -> None:
        longest = read_path(self.llm, "llm_engine.vllm_config.model_config.max_model_len")
        if isinstance(longest, int) and longest < num_tokens:
            raise Skipped(f"it needs requests of {num_tokens} tokens, and this engine takes {longest} at most")


def _no_block_arithmetic(model_config: Any) -> str:
    """Why a model's KV cache is not one block per so many tokens, "" if it is or is not known to be otherwise."""
    if read_path(model_config, "is_hybrid") is True or read_path(model_config, "is_attention_free") is True:
        return "the model has state layers"
    kinds = read_path(model_config, "hf_text_config.layer_types")
    if isinstance(kinds, (list, tuple)) and set(kinds) - {"full_attention"}:
        return f"the model has layers of the kinds {', '.join(sorted(map(str, set(kinds))))}"
    sliding = read_path(model_config, "get_sliding_window")
    if callable(sliding) and sliding() is not None:
        return "the model's attention has a sliding window"
    return ""


def _reason(collected: dict[str, Any], source: str) -> str:
    return str(collected["debug_info"]["not_available"].get(source, "nothing"))


def _median_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
