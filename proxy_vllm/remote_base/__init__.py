"""A base that lives elsewhere: an endpoint reports its top log-probabilities, the pair runs here.

| module | what it holds |
|---|---|
| `bounds.py` | what a reported row tells about the steered distribution, and how surely |
| `sampling.py` | sampling parameters on such a row |
| `settings.py`, `usage.py` | where the base is; counts, price and limits |
| `dialects.py`, `token_names.py` | how endpoints differ, as data; names of tokens to ids |
| `endpoint.py` | rows over HTTP |
| `pair.py` | the local pair's shift, from an engine without a base |
| `steering.py` | one request, token by token |
| `engine_core.py` | requests as tasks behind vLLM's front ends |
| `reports.py`, `answers.py` | what an answer says about its tokens; the same over HTTP |
"""
