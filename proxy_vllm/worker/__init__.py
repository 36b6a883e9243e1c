"""The modified worker, laid out as vLLM's `v1/worker/gpu`.

| module | what it holds |
|---|---|
| `gpu_worker.py`, `cpu_worker.py` | the workers, and the V1 runner of a CPU |
| `model_runner.py`, `model_state.py` | Model Runner V2, and each request's alpha and prompts |
| `sampler.py`, `sampler_graphs.py` | the fused sampler, and its CUDA graphs |
"""
