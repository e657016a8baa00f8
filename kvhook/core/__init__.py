"""kvhook inside vLLM's engine core: what the scheduler and the block pool do, counted where they do it."""
