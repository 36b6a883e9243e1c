"""How the caches of three unlike members are laid out in vLLM's blocks.

Two layouts run any mix of full and local attention:

- *one table*: every layer keeps every token, so that all share one block table. Local attention is
  computed as such.
- *several tables*: vLLM's hybrid manager gives kinds of attention tables of their own and frees
  what has left a window. Its groups hold equally many layers and pages of one size, so that unlike
  members can cost more than they save.

Layers with states keep a table of their own in both.
"""

import copy
from collections.abc import Callable

import torch.distributed as dist
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_max_concurrency_for_kv_cache_config,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    replace_as,
)

from proxy_vllm.config import ROLES
from proxy_vllm.errors import UserError, one_line

logger = init_logger(f"vllm.{__name__}")

Specs = dict[str, KVCacheSpec]

# Memory for which the layouts are compared; which of them is better hardly depends on it.
_NOMINAL_BYTES = 1 << 40

# Local attention, what keeps every token instead, and the fields that only the former has. The
# window goes too: vLLM (0.32.0) refuses two windows in one table.
_PROMOTIONS: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (
        SlidingWindowMLASpec,
        MLAAttentionSpec,
        ("sliding_window", "extra_retained_tokens", "bounded_replay"),
    ),
    (SlidingWindowSpec, FullAttentionSpec, ("sliding_window", "extra_retained_tokens")),
    (ChunkedLocalAttentionSpec, FullAttentionSpec, ("attention_chunk_size",)),
)


def one_table(specs: Specs, block_size: int) -> Specs:
    """The layers' caches, with local attention kept for every token."""
    out = {}
    for name, spec in specs.items():
        for local, full, drop in _PROMOTIONS:
            if isinstance(spec, local):
                spec = replace_as(spec, full, drop=drop, block_size=block_size)
                break
        out[name] = spec
    return out


def align_states(cache_config: CacheConfig, specs: Specs) -> bool:
    """Raise the block size until a block's largest page of keys and values holds a state.

    vLLM does so for a model that mixes both itself, from one architecture's formula. Here the
    members' real layers decide, whichever of them has states.

    Returns:
        Whether ``cache_config`` was changed, so that the layers must be asked again.
    """
    states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    if not states:
        return False
    state = max(spec.real_page_size_bytes for spec in states)
    caches = [spec for spec in specs.values() if isinstance(spec, AttentionSpec)]
    if caches:
        per_token = max(spec.unpadded_page_size_bytes // spec.block_size for spec in caches)
        step = cache_config.block_size
        cache_config.block_size = step * cdiv(state, step * per_token)
        state = cache_config.block_size * per_token
    cache_config.mamba_page_size_padded = state
    if cache_config.mamba_cache_mode == "align":
        cache_config.mamba_block_size = cache_config.block_size
    return True


def choose(
    vllm_config: VllmConfig,
    ask_layers: Callable[[], Specs],
    memory_orders: list[str],
    asked: str,
    reason: str | None,
) -> Specs:
    """The caches of this rank's layers in the better layout, or the one that must be.

    Args:
        ask_layers: what vLLM's worker finds of the model's layers.
        memory_orders: what this rank's attention supports, as vLLM's worker reports it.
        asked: ``auto``, ``one`` or ``several`` tables.
        reason: why there must be one table; None if there need not.
    """
    cache_config = vllm_config.cache_config
    specs = ask_layers()
    whole = _of_all_stages(specs)
    if align_states(cache_config, whole):
        specs = ask_layers()
        whole = _of_all_stages(specs)
    single = one_table(whole, cache_config.block_size)
    if single == whole:
        return specs
    if any(isinstance(spec, ChunkedLocalAttentionSpec) for spec in whole.values()):
        reason = reason or "a member attends in chunks"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        reason = reason or "vLLM's hybrid KV-cache manager is off"
    if reason is not None:
        if asked == "several":
            raise UserError(f"--kv-cache-tables several: one table is needed, since {reason}")
        asked, why = "one", reason
    elif asked != "auto":
        why = "--kv-cache-tables"
    else:
        several = concurrency(vllm_config, whole, memory_orders)
        alone = concurrency(vllm_config, single, memory_orders)
        asked = "several" if several > alone else "one"
        length = vllm_config.model_config.max_model_len
        why = (
            "vLLM has no layout with several"
            if several == 0.0
            else f"several hold {several / alone:.2f} times the requests of {length} tokens"
            if alone
            else "vLLM has no layout with one"
        )
    logger.info_once("KV cache: %s block table%s (%s)", asked, "s" * (asked != "one"), why)
    return one_table(specs, cache_config.block_size) if asked == "one" else specs


def concurrency(vllm_config: VllmConfig, specs: Specs, memory_orders: list[str]) -> float:
    """How many requests of full length 1 TiB of cache holds; 0 where vLLM has no such layout."""
    config = copy.copy(vllm_config)
    config.cache_config = copy.copy(vllm_config.cache_config)
    config.cache_config.num_gpu_blocks_override = None
    try:
        resolve_kv_cache_layout(config, [memory_orders], specs.values())
        groups = get_kv_cache_groups(config, dict(specs))  # it writes into the dictionary
        layout = get_kv_cache_config_from_groups(config, groups, _NOMINAL_BYTES)
        return get_max_concurrency_for_kv_cache_config(config, layout)
    except (ValueError, NotImplementedError, AssertionError) as error:
        logger.info("A layout of the KV cache is impossible: %s", one_line(error))
        return 0.0


def _of_all_stages(specs: Specs) -> Specs:
    """The layers of all pipeline stages, which must settle on one layout."""
    group = get_pp_group()
    if group.world_size == 1:
        return specs
    stages: list[Specs | None] = [None] * group.world_size
    dist.all_gather_object(stages, specs, group=group.cpu_group)
    return {name: spec for stage in stages if stage for name, spec in stage.items()}


def bytes_per_request(vllm_config: VllmConfig, specs: Specs) -> dict[str, int]:
    """KV-cache bytes that one request of full length costs each member on this rank."""
    totals = dict.fromkeys(ROLES, 0)
    for name, spec in specs.items():
        role = name.split(".", 1)[0]
        if role in totals:
            totals[role] += spec.max_memory_usage_bytes(vllm_config)
    return totals
