"""The prefix cache: prompts that begin alike, sent in rounds, with `enable_prefix_caching` and without."""

import gc
import time

import kvhook
from kvhook.analysis.blocks import prefix_hits

from common import arguments, encode, make_llm, percent, sampling

session = kvhook.install()  # before LLM(...)
args = arguments(__doc__, "prefix_cache.kvh")

SYSTEM = "You are the librarian of a small town. You answer in short and friendly sentences, and never make up a book. "
ROUNDS = [
    [f"{SYSTEM} Visitor {v} of day {day}: do you have something about the sea?" for v in range(4)] for day in range(4)
]

for caching in (True, False):
    llm = make_llm(args, enable_prefix_caching=caching)
    rounds = [encode(llm, texts) for texts in ROUNDS]
    llm.generate("to get warm", sampling(8), use_tqdm=False)
    collector = kvhook.VLLMMetricsCollector(llm)
    collector.start_monitoring()
    began = time.monotonic()
    for prompts in rounds:
        llm.generate(prompts, sampling(8), use_tqdm=False)
        collector.collect_current_stats()
    seconds = time.monotonic() - began
    stats = collector.get_comprehensive_stats()

    print(f"\nenable_prefix_caching={caching}: {seconds:.2f} s")
    expected = iter(prefix_hits((p["prompt_token_ids"] for r in rounds for p in r), stats["environment"]["block_size"]))
    for number, (prompts, part) in enumerate(zip(rounds, stats["trend"]["between_collections"], strict=True), 1):
        arithmetic = sum(next(expected) for _ in prompts)
        print(
            f"  round {number}: {part['prefix_cache_hits']:4} of {part['prefix_cache_queries']:4} tokens hit "
            f"({percent(part['prefix_cache_hit_rate'])}); block arithmetic: {arithmetic if caching else 0}"
        )
    run = stats["summary"]
    rate = run["prefix_cache_hit_rate"]
    why = f" ({stats['absent']['gpu_prefix_cache_hit_rate']})" if rate is None else ""
    print(f"  hit rate of the rounds: {percent(rate)}{why}")
    print(
        f"  prompt tokens computed: {run['num_prompt_tokens'] - run['prefix_cache_hits']} of {run['num_prompt_tokens']}"
    )
    del llm
    gc.collect()
session.dump(args.out, overwrite=True)
print(f"\nThe trace of both engines is in {args.out}")
