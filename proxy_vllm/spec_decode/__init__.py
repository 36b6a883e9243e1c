"""Drafts by the composite's own expert, laid out as vLLM's `spec_decode`.

The expert is loaded already, and a verified step has written its keys and values: it drafts without
weights, KV cache or prefill of its own. Verification draws the token of every position exactly as
a step without drafts would, and accepts a draft where it is that very token. So drafts change how
many steps an answer takes and nothing else, sampled answers included.

| module | what it holds |
|---|---|
| `speculator.py` | Model Runner V2: the draft loop |
| `verification.py` | Model Runner V2: drafts that equal the drawn tokens |
| `v1_runner.py` | the V1 runner of a CPU: both |
| `scheduler.py`, `draft_length.py` | which requests draft, and how many tokens a step |
"""
