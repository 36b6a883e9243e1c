"""The composite model: base, expert and antiexpert as one vLLM model.

| module | what it holds |
|---|---|
| `model.py` | `ProxyTunedForCausalLM`, the model that vLLM loads and runs |
| `members.py` | building and loading the three models, and their memory |
| `heads.py` | the three output heads: through their weights, or sharded over ranks |
| `formula.py` | the formula on logits, for whichever device they are on |
"""
