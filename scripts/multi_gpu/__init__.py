"""Parts of `scripts/bench_multi_gpu.py`."""
