"""The cost model behind `proxy-vllm plan`; runs where vLLM is not installed.

| module | what it holds |
|---|---|
| `config_file.py` | `config.json` of a folder or of the hub |
| `decoder.py` | parameters and caches of the model that Transformers builds from it |
| `model_size.py` | bytes and operations of one model |
| `gpus.py` | bandwidth, arithmetic and memory of GPUs |
| `tables.py` | how block tables round up what a sequence holds |
| `speculation.py` | speed with drafts of the expert |
| `roofline.py` | memory and time of a trio on a GPU |
"""
