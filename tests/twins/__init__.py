"""Twins of real model families: their surface, with tiny weights that chat and stop.

A twin is a folder as a model hub has it: config.json, generation_config.json, tokenizer, weights.
What a user meets is the real family's: architecture, names of fields, end tokens, special tokens
and their order, chat template, padded vocabulary. Sizes are scaled down. Weights are random, but
for one thing: the expert of a family answers every chat with one known sentence and its own end
token (and then, if nobody stops it, again), while base and antiexpert count and never end.

    from twins import FAMILIES, write_twins
    trio = write_twins("qwen2.5", folder)     # {"model": ..., "expert": ..., "antiexpert": ...}
    FAMILIES["qwen2.5"].ends                  # the end tokens that a chat must obey
"""

from twins.families import ANSWER, FAMILIES, THOUGHT, TOOL_CALLS
from twins.family import Family, Surface
from twins.write import write_twins

__all__ = ["ANSWER", "FAMILIES", "THOUGHT", "TOOL_CALLS", "Family", "Surface", "write_twins"]
