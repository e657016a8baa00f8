"""The cache's usage through a large batch: it rises, peaks and returns to zero. A poller once a second misses that."""

import kvhook
from kvhook.analysis.blocks import blocks_of
from kvhook.text.bar import bar

from common import arguments, encode, make_llm, sampling

session = kvhook.install()  # before LLM(...)

REQUESTS, GENERATED = 96, 80

args = arguments(__doc__, "cache_usage.kvh")
llm = make_llm(
    args,
    num_gpu_blocks_override=700,
    max_num_seqs=REQUESTS,
    max_num_batched_tokens=16384,  # all prompts in one step, so that all requests end in the same one
    disable_log_stats=False,  # vLLM's own stats on, to compare with
)
prompts = encode(
    llm, [f"Story {i}: once upon a time, {'far ' * i}away, there was a block of keys." for i in range(REQUESTS)]
)

hook = kvhook.VLLMMetricsCollector(llm)
poller = kvhook.VLLMMetricsCollector(llm, collection_interval=1.0, source="prometheus_registry")
hook.start_monitoring()
poller.start_monitoring()
llm.generate(prompts, sampling(GENERATED), use_tqdm=False)
poller.stop_monitoring()
hook.stop_monitoring()

stats, polled = hook.get_comprehensive_stats(), poller.get_comprehensive_stats()
progression = stats["trend"]["usage_progression"]
for part in [*progression[:-1:3], progression[-1]]:
    usage = part["kv_cache_usage"] or 0.0
    print(f"  {bar(usage, 40)} {100 * usage:5.1f} %  running {part['num_running_reqs_peak']}")
blocks = stats["raw_metrics"]["last_step"]["num_kv_blocks"]
# the last token that is generated is never read, and the place of the one before it is given back within the last step
held = sum(blocks_of(len(p["prompt_token_ids"]) + GENERATED - 2, stats["environment"]["block_size"]) for p in prompts)
found = stats["key_metrics"]["kv_cache_usage_peak"]
print(f"peak, every step:       {100 * found:.1f} % = {round(found * blocks)} of {blocks} blocks")
print(f"peak, block arithmetic: {held} blocks, if all requests run to their ends together")
most = max(row["metrics_found"]["kv_cache_usage"] for row in poller.get_metrics_history())
print(
    f"peak, polled at 1 Hz:   {100 * most:.1f} % = {round(most * blocks)} blocks: "
    f"{'missed' if most < found else 'seen'}"
)
print(f"looked at it:           {stats['total_collections']} times the hook, {polled['total_collections']} the poller")
print(f"at the end:             {stats['key_metrics']['gpu_cache_usage_percent']:.1f} %")
session.dump(args.out, overwrite=True)
print(f"\nThe trace is in {args.out}")
