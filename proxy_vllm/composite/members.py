"""Build and load the three members with vLLM's own code, and account for their memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from proxy_vllm.composite.cpu_rotary import rotate_flat
from proxy_vllm.config import ROLES
from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec


def build_member(role: str, member_config: VllmConfig, prefix: str) -> nn.Module:
    """Instantiate one member, its layers named ``{prefix}.…``, without weights.

    The compilation tag keeps the members' compiled graphs apart; the base keeps vLLM's own.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(member_config.model_config.dtype)
    try:
        with _window_of(member_config), nullcontext() if role == "base" else set_model_tag(role):
            member = initialize_model(
                member_config, prefix=prefix, model_config=member_config.model_config
            )
    finally:
        torch.set_default_dtype(dtype)
    if current_platform.is_cpu():
        rotate_flat(member)
    return member


@contextmanager
def _window_of(member_config: VllmConfig) -> Iterator[None]:
    """Have layers that are told no window take the member's, from settings that all share."""
    cache_config, model_config = member_config.cache_config, member_config.model_config
    window = model_config.get_sliding_window()
    types = getattr(model_config.hf_text_config, "layer_types", None)
    # As vLLM's `EngineArgs` finds it: layers of unlike models say themselves what they are.
    if model_config.disable_sliding_window or set(types or ()) - {"sliding_attention"}:
        window = None
    engine = cache_config.sliding_window
    cache_config.sliding_window = window
    try:
        yield
    finally:
        cache_config.sliding_window = engine


@contextmanager
def naming_member(role: str, member_config: VllmConfig) -> Iterator[None]:
    """Say whose weights do not load: vLLM's errors name tensors, which all three models have."""
    try:
        yield
    except Exception as error:
        name = member_config.model_config.model
        raise UserError(f"{role} {name!r}: its weights do not load: {one_line(error)}") from error


def load_member(role: str, member: nn.Module, member_config: VllmConfig) -> None:
    """Fill a member from its own checkpoint with the loader that the server was told to use."""
    with naming_member(role, member_config):
        loader = get_model_loader(member_config.load_config)
        loader.load_weights(member, member_config.model_config)


def retie_embeddings(member: nn.Module, member_config: VllmConfig) -> None:
    """Share an output head that equals the input embeddings, as vLLM does for a single model.

    After the first load only: when weights are loaded again, vLLM keeps layers without storage
    (on ``meta``) until the whole composite is done, and a shared head stays shared.
    """
    maybe_retie_word_embeddings(member, member_config.model_config)


def outlive_graphs(
    output: torch.Tensor | IntermediateTensors,
) -> torch.Tensor | IntermediateTensors:
    """A member's output, safe from the members that run after it.

    Piecewise CUDA graphs share one memory pool, and vLLM hands the output of a model's last graph
    back to it: nothing else runs before that output is read. Here other members' graphs do, and
    would write over it.
    """
    if (
        not is_forward_context_available()
        or get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE
    ):
        return output
    if isinstance(output, IntermediateTensors):
        return IntermediateTensors({name: tensor.clone() for name, tensor in output.items()})
    return output.clone()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers on this rank, tied storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def kv_bytes_per_token(specs: "dict[str, KVCacheSpec]") -> dict[str, float]:
    """KV-cache bytes that one token costs each member on this rank, by layer-name prefix."""
    totals = dict.fromkeys(ROLES, 0.0)
    for name, spec in specs.items():
        role = name.split(".", 1)[0]
        if role in totals:
            totals[role] += spec.page_size_bytes / spec.block_size
    return totals
