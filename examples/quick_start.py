"""Quick start: what the KV cache did while `generate` ran, as the session and the collector tell it."""

import kvhook

from common import arguments, make_llm, percent, sampling

session = kvhook.install()  # before LLM(...): every step is recorded from here on

SYSTEM = "You are a helpful assistant. You answer in one sentence, in plain words, and say so if you do not know."

args = arguments(__doc__, "quick_start.kvh")
llm = make_llm(args, num_gpu_blocks_override=64)

collector = kvhook.VLLMMetricsCollector(llm)
collector.start_monitoring()
for question in ("What is a KV cache?", "Who needs one?", "What is it made of?"):
    llm.generate(f"{SYSTEM} {question}", sampling(32), use_tqdm=False)
stats = collector.get_comprehensive_stats()
collector.stop_monitoring()

key = stats["key_metrics"]
print(f"source:        {stats['collection_method']}")
print(f"usage:         {key['gpu_cache_usage_percent']:.1f} % now, {key['gpu_cache_usage_peak_percent']:.1f} % at most")
print(f"hit rate:      {percent(key['gpu_prefix_cache_hit_rate'])}")
print(f"tokens:        {key['prompt_tokens_total']} of prompts, {key['generation_tokens_total']} generated")
print(f"first token:   {1e3 * stats['histogram_analysis']['avg_time_to_first_token_seconds']:.1f} ms on average")
print(f"\n{session.summary()}")
session.dump(args.out, overwrite=True)
print(f"\nThe trace is in {args.out}: kvhook summary {args.out}")
