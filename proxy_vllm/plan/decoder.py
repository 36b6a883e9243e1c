"""The decoder that a `config.json` describes: Transformers builds it on the meta device.

Nothing is allocated and nothing is downloaded, and the parameters are exactly those of the
checkpoint, however its configuration spells them. What a token leaves in the KV cache is read from
the layers too: the rows of the key and value projections, the latent projection, the convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# More than any model has; a larger count is a typing error that would fill the memory.
_MOST_LAYERS = 10_000

_FULL = ("full_attention", "attention", "hybrid")
_WITHOUT_CACHE = ("mlp", "moe")
_STATE = ("linear_attention", "mamba", "mamba2", "conv")
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
# vLLM expands the latent of these and caches whole keys and values.
_EXPANDED_LATENT = ("minicpm3",)
# Types that vLLM reads with the class of another one, and Transformers does not know.
_SAME_AS = {"kimi_k2": "deepseek_v3"}
# Fields that no count needs, and that Transformers refuses in some spellings that vLLM accepts.
_NOT_NEEDED = ("quantization_config", "rope_scaling", "rope_parameters")
# A step runs the layers of these several times.
_LOOPED = ("hrm_text",)


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a sequence: keys and values of its tokens, or one state."""

    heads: int = 0
    """KV heads; a latent cache is one head. 0 for a state."""
    width: int = 0
    """Elements that a token leaves in each head, keys and values together."""
    window: int | None = None
    """Tokens that the layer attends to at most; None is all."""
    flops: int = 0
    """Operations that a new token spends on each token that it attends to."""
    owned: bool = True
    """False where the layer reads the cache of an earlier layer."""
    conv_elements: int = 0
    """State of convolutions, in the dtype of the model."""
    state_elements: int = 0
    """Recurrent state, in `state_bytes` an element (None: the dtype of the model)."""
    state_bytes: int | None = None


@dataclass(frozen=True)
class Parameters:
    """Parameters of a decoder by what a step does with them."""

    layers: int
    """Matrices that every token goes through: attention, MLPs, shared experts, routers."""
    head: int
    """The LM head, which may be the token table too."""
    tables: int
    """Tables of which a step reads one row a token: an untied token table, positions."""
    vectors: int
    """Norms, biases, convolutions."""
    routed: int
    """Matrices of routed experts."""
    num_experts: int
    tied: bool
    adapted: int = 0
    """Inputs and outputs of all layers that LoRA can adapt: its elements for each rank."""


def text_config(name: str, raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Transformers' configuration of the decoder in `raw`; raises `UserError` if it has none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    kind = raw.get("model_type")
    kind = _SAME_AS.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or not kind:
        raise UserError(f"{name}: config.json has no model_type; its size cannot be told")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{name}: Transformers {transformers.__version__} has no model_type {kind!r}, so its"
            " size cannot be told: update Transformers, or give the config.json of a model of the"
            " same shape whose type it has"
        )
    if raw.get("is_encoder_decoder"):
        raise UserError(f"{name}: {kind} has an encoder; only decoders can be planned for")
    fields = _counted({**raw, "model_type": kind})
    if isinstance(raw.get("text_config"), Mapping):
        fields["text_config"] = _counted(raw["text_config"])
    try:
        outer = transformers.CONFIG_MAPPING[kind].from_dict(fields)
        config = outer.get_text_config(decoder=True)
        layers = config.num_hidden_layers
    except Exception as error:  # Transformers' validators, and whatever an odd field breaks
        raise UserError(f"{name}: config.json cannot be read: {_short(error)}") from None
    if config is not outer:
        # As vLLM does: the class of the whole model says whether the head is tied.
        config.tie_word_embeddings = getattr(outer, "tie_word_embeddings", False)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name}: {config.model_type} is not a text-generation decoder")
    if config.model_type in _LOOPED:
        raise UserError(
            f"{name}: {config.model_type} runs its layers several times a step, which a plan does"
            " not count"
        )
    if not 0 < layers <= _MOST_LAYERS:
        raise UserError(f"{name}: config.json has {layers} layers; no model has that shape")
    return config


def _counted(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _NOT_NEEDED}


def build(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config`, without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # each architecture fails in its own way on an odd shape
        raise UserError(
            f"{name}: Transformers cannot build a {config.model_type} of this config.json:"
            f" {_short(error)}"
        ) from None


def _short(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else text[:300] + " ..."


def parameters(model: PreTrainedModel) -> Parameters:
    """Count parameters, shared ones once."""
    from torch import nn

    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    in_layers = in_tables = vectors = routed = num_experts = 0
    experts: list[tuple[str, torch.Size]] = []
    for name, parameter in model.named_parameters():
        if parameter is head:
            continue
        if re.search(r"\.experts\.", f".{name}."):
            experts.append((name, parameter.shape))
        elif id(parameter) in tables:
            in_tables += parameter.numel()
        elif parameter.dim() != 2 or name.endswith("A_log"):
            vectors += parameter.numel()
        else:
            in_layers += parameter.numel()
    # One tensor holds all experts of a layer, or each expert is a module of its own.
    numbered = [int(n) for name, _ in experts for n in re.findall(r"experts\.(\d+)\.", name)]
    if numbered:
        num_experts = max(numbered) + 1
    elif experts:
        num_experts = next(shape[0] for name, shape in experts if "down_proj" in name)
    for _, shape in experts:
        # An expert that copies its input has no weights, whatever the tensor's shape says.
        spare = not numbered and shape[0] > num_experts
        routed += shape.numel() // shape[0] * (num_experts if spare else shape[0])
    return Parameters(
        layers=in_layers,
        head=head.numel(),
        tables=in_tables,
        vectors=vectors,
        routed=routed,
        num_experts=num_experts,
        tied=id(head) in tables,
        adapted=sum(
            sum(m.weight.shape)
            for m in model.modules()
            if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and m.weight is not head
        )
        + sum(sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Embedding)),
    )


def experts_per_token(name: str, config: PreTrainedConfig) -> int:
    """How many routed experts a token takes; raises `UserError` where nothing says so."""
    for field in _EXPERTS_PER_TOKEN:
        value = getattr(config, field, None)
        if isinstance(value, (list, tuple)):
            value = max(value, default=0)
        if value:
            return int(value)
    raise UserError(
        f"{name}: {config.model_type} has experts, and config.json does not say how many a token"
        " takes (num_experts_per_tok)"
    )


def caches(name: str, config: PreTrainedConfig, model: PreTrainedModel) -> tuple[LayerCache, ...]:
    """What each layer of `model` keeps of a sequence; raises `UserError` for unknown kinds."""
    types = list(getattr(config, "layer_types", None) or ())
    known = {*_FULL, *_WITHOUT_CACHE, *_STATE, "sliding_attention", "chunked_attention"}
    if odd := sorted({str(t) for t in types} - known):
        raise UserError(
            f"{name}: {config.model_type} has {', '.join(odd)}: it cannot be planned for"
        )
    found = tuple(_caches(config, model, types))
    if not found:
        raise UserError(f"{name}: no attention is found in a {config.model_type}")
    return found


def _caches(
    config: PreTrainedConfig, model: PreTrainedModel, types: list[str]
) -> Iterator[LayerCache]:
    from torch import nn

    last: dict[str | None, LayerCache] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = dict(module.named_children())
        index = re.search(r"\.(\d+)\.", f".{path}.")
        kind = types[int(index[1])] if types and index else None
        if any(isinstance(part, nn.Conv1d) for part in parts.values()):
            yield _state(config, module)
        elif "kv_a_proj_with_mqa" in parts:
            yield _latent(config, parts["kv_a_proj_with_mqa"])
        elif kind in _STATE:
            continue
        elif any(part in parts for part in ("k_proj", *_FUSED)):
            last[kind] = _attention(config, module, parts, _window(config, kind))
            yield last[kind]
        elif {"q_proj", "o_proj"} <= parts.keys() and kind in last:
            # No projections of its own: it reads what the last layer of its kind has cached.
            yield replace(last[kind], owned=False)


def _window(config: PreTrainedConfig, kind: str | None) -> int | None:
    """The window of a layer: by its own type, or the model's where layers have none."""
    if kind == "chunked_attention":
        return config.attention_chunk_size
    if kind == "sliding_attention" or kind is None:
        return getattr(config, "sliding_window", None) or None
    return None


def _attention(
    config: PreTrainedConfig,
    module: torch.nn.Module,
    parts: Mapping[str, torch.nn.Module],
    window: int | None,
) -> LayerCache:
    output = next(parts[part] for part in _OUTPUT if part in parts)
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    fused = next((parts[part] for part in _FUSED if part in parts), None)
    if fused is not None:
        keys = values = (_rows(fused) - _columns(output)) // 2
    else:
        keys = _rows(parts["k_proj"])
        values = _rows(parts["v_proj"]) if "v_proj" in parts else keys
    kv_heads = max(1, keys // head_dim)
    width = (keys + values) // kv_heads
    # A product and a sum for each channel of keys (scores) and of values (weighted sum).
    return LayerCache(heads=kv_heads, width=width, window=window, flops=2 * heads * width)


def _rows(linear: torch.nn.Module) -> int:
    """Outputs of a projection; GPT-2's class stores its matrix the other way round."""
    shape = linear.weight.shape
    return int(shape[1] if type(linear).__name__ == "Conv1D" else shape[0])


def _columns(linear: torch.nn.Module) -> int:
    shape = linear.weight.shape
    return int(shape[0] if type(linear).__name__ == "Conv1D" else shape[1])


def _latent(config: PreTrainedConfig, projection: torch.nn.Module) -> LayerCache:
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    if config.model_type in _EXPANDED_LATENT:
        dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        return LayerCache(heads=heads, width=2 * dim, flops=4 * heads * dim)
    width = _rows(projection)
    # Queries are brought to the latent space: scores over its whole width, sums over the rank.
    return LayerCache(heads=1, width=width, flops=2 * heads * (width + rank))


def _state(config: PreTrainedConfig, module: torch.nn.Module) -> LayerCache:
    from torch import nn

    convolutions = [m for m in module.children() if isinstance(m, nn.Conv1d)]
    conv = sum(m.out_channels * (m.kernel_size[0] - 1) for m in convolutions)
    logs = next((p for n, p in module.named_parameters() if n.endswith("A_log")), None)
    state, state_bytes = 0, _state_bytes(config)
    if logs is not None and logs.dim() == 2:  # Mamba: a row of states a channel
        state = logs.numel()
    elif hasattr(module, "ssm_state_size"):  # Mamba 2
        state = module.num_heads * module.head_dim * module.ssm_state_size
    elif hasattr(module, "head_v_dim"):  # gated delta rule
        state = module.num_v_heads * module.head_k_dim * module.head_v_dim
    elif logs is not None:  # Kimi's delta attention
        state, state_bytes = module.num_heads * module.head_dim**2, state_bytes or 4
    return LayerCache(conv_elements=conv, state_elements=state, state_bytes=state_bytes)


def _state_bytes(config: PreTrainedConfig) -> int | None:
    dtype = getattr(config, "mamba_ssm_dtype", None)
    dtype = str(dtype or getattr(config, "mamba_ssm_cache_dtype", None))
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype.removeprefix("torch."))
