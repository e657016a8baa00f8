"""One LLM query over the rows of a table: in the table's own order, and reordered so that neighbours share prefixes.

The reordering is that of Greedy Group Recursion (Liu et al., "Optimizing LLM Queries in Relational Data Analytics
Workloads"): take the value whose repetition saves most, put its rows next to each other and its field in front, and go
on with the rest, within those rows and outside them.
"""

import random
import time
from collections import Counter

import kvhook
from kvhook.analysis.blocks import prefix_hits

from common import arguments, encode, make_llm, percent, sampling

session = kvhook.install()  # before LLM(...)

QUERY = "Is the customer content with the product? Answer yes or no. "
PRODUCTS = [f"The {name}, {'very ' * 20}well made, with a guarantee" for name in ("kettle", "lamp", "chair", "radio")]
SHOPS = [f"The shop in {town}, {'at the corner ' * 6}near the station" for town in ("Ghent", "Turin", "Porto")]

Row = dict[str, str]
Cells = list[tuple[str, str]]


def table() -> list[Row]:
    """Reviews, as they came in."""
    rng = random.Random(0)
    return [
        {
            "review": f"Number {i}: {rng.choice(['broken', 'fine', 'late'])}.",
            "shop": rng.choice(SHOPS),
            "product": rng.choice(PRODUCTS),
        }
        for i in range(100)
    ]


def reorder(rows: list[Row]) -> list[Cells]:
    """Rows, and in each row the fields, in the order in which they are to be sent."""
    times = Counter((field, value) for row in rows for field, value in row.items())
    best = max(times, key=lambda cell: len(cell[1]) ** 2 * (times[cell] - 1), default=None)
    if best is None or times[best] == 1:
        return [list(row.items()) for row in rows]
    field, value = best
    same = [{f: v for f, v in row.items() if f != field} for row in rows if row.get(field) == value]
    return [[best, *cells] for cells in reorder(same)] + reorder([row for row in rows if row.get(field) != value])


def texts(rows: list[Cells]) -> list[str]:
    """The prompts."""
    return [QUERY + "".join(f"{field}: {value}\n" for field, value in cells) for cells in rows]


args = arguments((__doc__ or "").splitlines()[0], "reorder.kvh")
llm = make_llm(args, num_gpu_blocks_override=1024)
llm.generate("to get warm", sampling(8), use_tqdm=False)

rows = table()
found = {}
for order, sent in (("own order", [list(row.items()) for row in rows]), ("reordered", reorder(rows))):
    llm.reset_prefix_cache()
    prompts = encode(llm, texts(sent))
    collector = kvhook.VLLMMetricsCollector(llm)
    collector.start_monitoring()
    began = time.monotonic()
    llm.generate(prompts, sampling(2), use_tqdm=False)
    seconds = time.monotonic() - began
    collector.stop_monitoring()
    stats = collector.get_comprehensive_stats()
    run = stats["summary"]
    found[order] = {
        "prompt tokens": run["num_prompt_tokens"],
        "hit tokens": run["prefix_cache_hits"],
        "  block arithmetic": sum(
            prefix_hits((p["prompt_token_ids"] for p in prompts), stats["environment"]["block_size"])
        ),
        "hit rate": percent(run["prefix_cache_hit_rate"]),
        "prompt tokens computed": run["num_prompt_tokens"] - run["prefix_cache_hits"],
        "seconds": f"{seconds:.3f}",
    }

print(f"{len(rows)} rows{'':16}" + "".join(f"{order:>12}" for order in found))
for what in found["own order"]:
    print(f"{what:23}" + "".join(f"{one[what]:>12}" for one in found.values()))
session.dump(args.out, overwrite=True)
print(f"\nThe trace of both is in {args.out}")
