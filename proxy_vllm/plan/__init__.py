"""The cost model behind `proxy-vllm plan`; runs where vLLM is not installed.

| module | what it holds |
|---|---|
| `model_size.py` | parameters, weights and KV-cache bytes of a model, from its configuration |
| `roofline.py` | memory and time of a trio on a GPU |
"""
