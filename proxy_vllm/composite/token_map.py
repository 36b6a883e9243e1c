"""A small member whose tokenizer numbers some tokens otherwise than the base's (``tokenizer_map``).

Embedding and head are read from the checkpoint in another order of rows, so that the member reads
and writes the base's ids and a step costs nothing more.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from proxy_vllm.errors import UserError


def number_as_base(role: str, member: nn.Module, moves: dict[int, int]) -> None:
    """Have a member's token tables filled in the base's order, whenever weights are loaded.

    vLLM gives every table's parameters a ``weight_loader`` that gets all rows of the checkpoint and
    keeps this rank's. It gets them reordered here.

    Args:
        role: for messages.
        member: built, and not yet loaded.
        moves: the member's own id -> the base's, for every id that changes. Both sides hold the
            same ids.
    """
    parameters = {
        parameter
        for module in member.modules()
        if isinstance(module, VocabParallelEmbedding)
        for parameter in module.parameters(recurse=False)
    }
    for parameter in parameters:
        load = parameter.weight_loader
        parameter.weight_loader = _reordering(role, load, list(moves), list(moves.values()))


def _reordering(
    role: str, load: Callable[..., None], own: list[int], base: list[int]
) -> Callable[..., None]:
    def reordered(parameter: nn.Parameter, rows: torch.Tensor) -> None:
        if rows.ndim == 0 or rows.shape[0] <= max(own):
            raise UserError(
                f"the tokenizer map of the {role} needs a row for each token in embedding and head,"
                f" and this checkpoint has {list(rows.shape)}: use one with unpacked embeddings"
            )
        ordered = rows.clone()
        ordered[base] = rows[own]
        load(parameter, ordered)

    return reordered
