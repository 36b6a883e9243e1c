"""Parts of bench_remote_base.py."""
