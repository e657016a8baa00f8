"""The cache's usage through a large batch: it rises, peaks, and returns to zero; a poller once a second misses that."""

from common import arguments, encode, make_llm, sampling

args = arguments(__doc__, "cache_usage.kvh")

import kvhook  # noqa: E402
from kvhook.analysis.blocks import blocks_of  # noqa: E402
from kvhook.demo.live import bar  # noqa: E402

GENERATED = 60

session = kvhook.install()
llm = make_llm(args, num_gpu_blocks_override=200, disable_log_stats=False)  # vLLM's own stats on, to compare with
prompts = encode(
    llm, [f"Story {i}: once upon a time, {'far ' * (2 * i)}away, there was a block of keys." for i in range(24)]
)

hook = kvhook.VLLMMetricsCollector(llm)
poller = kvhook.VLLMMetricsCollector(llm, collection_interval=1.0, source="prometheus_registry")
hook.start_monitoring()
poller.start_monitoring()
llm.generate(prompts, sampling(GENERATED), use_tqdm=False)
poller.stop_monitoring()
hook.stop_monitoring()

stats, polled = hook.get_comprehensive_stats(), poller.get_comprehensive_stats()
for part in stats["trend"]["usage_progression"][::2]:
    usage = part["kv_cache_usage"] or 0.0
    print(f"  {bar(usage, 40)} {100 * usage:5.1f} %  running {part['num_running_reqs_peak']}")
blocks = stats["raw_metrics"]["last_step"]["num_kv_blocks"]
# the last token that is generated is never read, and the place of the one before it is given back within the last step
held = sum(blocks_of(len(p["prompt_token_ids"]) + GENERATED - 2, stats["environment"]["block_size"]) for p in prompts)
found = stats["key_metrics"]["kv_cache_usage_peak"]
print(f"peak, every step:       {100 * found:.1f} % = {round(found * blocks)} of {blocks} blocks")
print(f"peak, block arithmetic: {held} blocks, if all requests run to their ends together")
print(f"peak, polled at 1 Hz:   {100 * polled['key_metrics']['kv_cache_usage_peak']:.1f} %")
print(f"steps seen:             {stats['summary']['rows']} by the hook, {polled['summary']['rows']} by the poller")
print(f"at the end:             {stats['key_metrics']['gpu_cache_usage_percent']:.1f} %")
session.dump(args.out, overwrite=True)
print(f"\nThe trace is in {args.out}")
