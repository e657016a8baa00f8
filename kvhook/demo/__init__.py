"""The demo: a tiny model made on the spot, and a workload whose KV cache is worth looking at."""
