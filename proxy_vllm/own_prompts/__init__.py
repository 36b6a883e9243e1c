"""Each model its own prompt.

| module | what it holds |
|---|---|
| `prompts.py` | what such a request is, the arithmetic of its positions, what excludes it |
| `chat_templates.py`, `member_prompts.py` | text and messages to each member's token ids |
| `scheduler.py` | lengths and cache keys, in the engine's core |
| `inputs.py` | each model's inputs and attention metadata, in the workers |
"""
