"""Files and datasets of prompts, answered by one engine or by several.

| module | what it holds |
|---|---|
| `request.py`, `result.py` | one line: checked into a request; its output as JSON |
| `generator.py`, `shared.py` | many requests through one engine, for one thread or for several |
| `jsonl.py`, `file_job.py` | JSONL in, JSONL out, restartable |
| `ray_generator.py`, `ray_blocks.py`, `ray_job.py` | folders through several engines on Ray |
"""
