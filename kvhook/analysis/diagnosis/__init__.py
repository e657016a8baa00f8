"""What a run suffers from, in plain words: each with its evidence and the vLLM setting that acts on it.

`signs` gathers what the rules look at, `rules` is the list of them; `cache`, `prefix` and `batch` hold them.
"""
