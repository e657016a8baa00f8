"""What can be checked with a vLLM only: the collector's numbers on a real engine, against what came back from it, block
arithmetic, and each source against the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import kvhook
from kvhook.analysis.blocks import blocks_of, prefix_hits
from kvhook.check import Check, Failed, Skipped, expect
from kvhook.collector import VLLMMetricsCollector, names

SOURCES = (names.HOOK, names.INTERNAL, names.REGISTRY)
#: Collections of which the median is taken for the cost.
TIMES = 50

_SHARED = (
    "You are the librarian of a small town. You answer in short and friendly sentences, and never make up a book. "
)


class Inference:
    """The checks of one engine.

    Args:
        llm: a ``vllm.LLM`` with its stats on, made after ``kvhook.install()``.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.collector = VLLMMetricsCollector(llm)
        self.block_size = int(self.collector.environment()["block_size"])

    def checks(self) -> list[Check]:
        """All of them, in order."""
        return [self.basic, self.hit_rate, self.usage, self.sources, self.cost]

    def basic(self) -> str:
        """Basic collection."""
        with _window(self.llm) as stats_of:
            sent, outputs = self._generate([f"{_SHARED} What is book {i}?" for i in range(4)], 16)
        stats = stats_of()
        summary, key = stats["summary"], stats["key_metrics"]
        expect("source", stats["collection_method"], names.HOOK)
        expect("prompt tokens", summary["num_prompt_tokens"], sum(map(len, sent)))
        expect("generated tokens", summary["num_generation_tokens"], sum(outputs))
        expect("finished requests", summary["num_finished_reqs"], len(sent))
        missing = [name for name, value in key.items() if value is None]
        if missing:
            raise Failed("; ".join(f"{name} is absent: {stats['absent'].get(name)}" for name in missing))
        return f"{len(key)} key metrics; {sum(map(len, sent))} prompt and {sum(outputs)} generated tokens, as returned"

    def hit_rate(self) -> str:
        """Hit-rate progression, repeated prompts."""
        if self.collector.environment()["enable_prefix_caching"] is not True:
            raise Skipped("prefix caching is off in this engine")
        self._empty_cache()
        rounds, sent = [], []
        for i in range(3):
            texts = [f"{_SHARED}{'Please. ' * i} Visitor {v}: something about the sea?" for v in range(3)]
            with _window(self.llm) as stats_of:
                sent.append(self._generate(texts, 4)[0])
            rounds.append(stats_of()["summary"])
        hits = iter(prefix_hits([prompt for prompts in sent for prompt in prompts], self.block_size))
        expected = [sum(next(hits) for _ in prompts) for prompts in sent]
        expect("hit tokens of each round", [r["prefix_cache_hits"] for r in rounds], expected)
        expect("queries of each round", [r["prefix_cache_queries"] for r in rounds], [sum(map(len, p)) for p in sent])
        rates = ", ".join(f"{100 * r['prefix_cache_hit_rate']:.1f} %" for r in rounds)
        return f"{rates}; {sum(expected)} tokens, the block arithmetic of each round"

    def usage(self) -> str:
        """Usage progression through a batch."""
        self._empty_cache()
        generated = 2 * self.block_size
        with _window(self.llm) as stats_of:
            # nothing in common, so that no block is shared
            sent, _ = self._generate(
                [f"{i} {i} goes {i + 1} times to town {i * i}." for i in range(100, 108)], generated
            )
        stats = stats_of()
        peak, last = stats["summary"]["kv_cache_usage_peak"], stats["summary"]["kv_cache_usage"]
        usage = [point["kv_cache_usage"] for point in stats["trend"]["usage_progression"]]
        blocks = stats["raw_metrics"]["last_step"]["num_kv_blocks"]
        held = sum(blocks_of(len(prompt) + generated - 1, self.block_size) for prompt in sent)
        expect("blocks at the peak", round(peak * blocks), held)
        expect("usage at the end", last, 0.0)
        if not usage[0] < peak:
            raise Failed(f"usage begins at {usage[0]} and does not rise to its peak of {peak}")
        return f"rises to {100 * peak:.2f} % = {held} of {blocks} blocks, the block arithmetic; ends at 0"

    def sources(self) -> str:
        """Each source against the others."""
        found = {source: self._collect(source) for source in SOURCES}
        gone = [f"{s}: {f['debug_info']['not_available'][s]}" for s, f in found.items() if not f["stats_available"]]
        if gone:
            raise Failed("; ".join(gone))
        compared = [value.name for value in names.VALUES if value.name != names.V0_RATE]
        for name in compared:
            values = {source: f["metrics_found"].get(name) for source, f in found.items()}
            if len(set(values.values())) != 1:
                raise Failed(f"{name}: {values}")
        return f"{len(SOURCES)} sources agree on {len(compared)} values"

    def cost(self) -> str:
        """Cost of each source."""
        session = kvhook.install()
        cost = session.summary().kvhook_ns_p50
        text = [f"recording {cost / 1e3:.1f} us a step" if cost is not None else "recording: no step was measured"]
        for source in SOURCES:
            seconds = []
            for _ in range(TIMES):
                began = time.perf_counter()
                self._collect(source)
                seconds.append(time.perf_counter() - began)
            text.append(f"{source} {1e3 * statistics.median(seconds):.2f} ms")
        return f"{text[0]}; one collection: {', '.join(text[1:])}"

    def _collect(self, source: str) -> dict[str, Any]:
        calls: dict[str, Callable[[], dict[str, Any]]] = {
            names.HOOK: self.collector.collect_hook_stats,
            names.INTERNAL: self.collector.collect_internal_stats,
            names.REGISTRY: self.collector.collect_prometheus_metrics,
        }
        return calls[source]()

    def _generate(self, texts: list[str], max_tokens: int) -> tuple[list[list[int]], list[int]]:
        """The prompts' token ids, and how many tokens came back for each."""
        from vllm import SamplingParams

        tokenizer = self.llm.get_tokenizer()
        sent = [list(tokenizer.encode(text)) for text in texts]
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in sent], params, use_tqdm=False)
        return sent, [len(output.outputs[0].token_ids) for output in outputs]

    def _empty_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise Failed("vLLM did not empty its prefix cache")


class _window:
    """A monitored time; gives a function that tells about it."""

    def __init__(self, llm: Any) -> None:
        self._collector = VLLMMetricsCollector(llm)

    def __enter__(self) -> Callable[[], dict[str, Any]]:
        self._collector.start_monitoring()
        return self._collector.get_comprehensive_stats

    def __exit__(self, *_: object) -> None:
        self._collector.stop_monitoring()


def make_llm(model: str | None) -> Any:
    """An engine with everything that is to be compared switched on: the tiny model's, or a model of the user's."""
    from vllm import LLM

    both = {"disable_log_stats": False, "enable_prefix_caching": True}
    if model is not None:
        return LLM(model=model, **both)
    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    small = {"block_size": 32, "num_gpu_blocks_override": 256, "max_model_len": 1024, "seed": 0}
    folder = make_tiny_model(tiny_model_dir())
    return LLM(model=str(folder), enforce_eager=True, dtype="bfloat16", use_tqdm_on_load=False, **small, **both)
