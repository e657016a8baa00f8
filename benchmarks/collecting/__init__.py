"""The parts of `benchmarks/collectors.py`."""
