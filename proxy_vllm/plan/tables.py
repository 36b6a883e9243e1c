"""How vLLM's block tables round up what a sequence holds, when layers are of several kinds.

vLLM gives every block of its pool one size: that of a page of `g` layers. Layers of one kind (same
bytes a token and same window, or a state) are divided into groups of `g`, the last one padded, and
each group has a block table. Kinds with a smaller page get more tokens a block where their page
divides the largest one, and are padded where it does not. Source of these rules:
`vllm/v1/core/kv_cache_utils.py`, `unify_kv_cache_spec_page_size` and
`_get_kv_cache_groups_uniform_page_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

BLOCK = 16
"""vLLM's block size on a GPU, in tokens; states raise it so that one fits into a page."""


@dataclass(frozen=True)
class Kind:
    """What layers of one kind keep on one rank: bytes a token, or bytes of a state."""

    token_bytes: float = 0
    window: int | None = None
    state_bytes: float = 0


def held_in_tables(layers: Mapping[Kind, int], context: int) -> float:
    """Bytes that a decoding sequence of `context` tokens holds, with a table for each group.

    Args:
        layers: the number of layers of each kind, of all members together.
        context: tokens of the sequence.
    """
    widest = max((kind.token_bytes for kind in layers), default=0)
    state = max((kind.state_bytes for kind in layers), default=0)
    block = BLOCK * max(1, math.ceil(state / (BLOCK * widest))) if widest else BLOCK
    page = max(block * widest, state)
    counts = layers.values()
    fewest, most = min(counts), max(counts)
    # vLLM's rule: kinds of nearly equal numbers share one large group size.
    group = most if most < 1.5 * fewest else fewest
    blocks = sum(
        math.ceil(count / group) * _blocks(kind, context, block, page)
        for kind, count in layers.items()
    )
    return blocks * group * page


def _blocks(kind: Kind, context: int, block: int, page: float) -> int:
    """Blocks that a sequence holds in one table."""
    if kind.state_bytes:
        return 1
    ratio, rest = divmod(page, block * kind.token_bytes)
    tokens = block if rest else int(block * ratio)
    if kind.window is None:
        return math.ceil(context / tokens)
    # The window's first and last block may both be cut.
    return math.ceil(min(context, kind.window) / tokens) + 1
