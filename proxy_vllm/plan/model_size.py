"""What a model's `config.json` tells about its size: weights, KV cache and arithmetic of one step.

Nothing here imports torch, transformers or vLLM, and nothing but `config.json` is read, so that a
plan costs no download of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from proxy_vllm.errors import UserError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}

# Two MLP matrices (up, down) instead of three (gate, up, down).
_PLAIN_MLP = {"gpt2", "opt", "gpt_neox", "gptj", "phi", "starcoder2", "gpt_bigcode", "nemotron"}
# Transformers' default for a config.json that leaves `tie_word_embeddings` out.
_TIED = {"gpt2", "opt", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2"}
_TIED |= {"gpt_bigcode", "starcoder2"}
_UNTIED = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi", "phi3"}
_UNTIED |= {"gpt_neox", "gptj", "olmo", "olmo2", "granite", "stablelm", "internlm2", "nemotron"}

# Fields that may be absent, and what they are where they are there.
_OPTIONAL = {
    "sliding_window": int,
    "sliding_window_pattern": int,
    "layer_types": list,
    "mlp_only_layers": list,
    "quantization_config": Mapping,
}
# More than any model has; a larger count is a typing error that would fill the memory.
_MOST_LAYERS = 10_000

ConfigSource: TypeAlias = Any
"""A model folder, a config.json, a hub name, a config's dict, or an object with `to_dict()`."""


@dataclass(frozen=True)
class ModelShape:
    """Counts of one decoder: parameters, not bytes, unless the name says otherwise."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    layer_params: int
    """Matrices of all layers that every token goes through (attention, MLP, router)."""
    table_params: int
    """Tables of which a step reads one row a token: an untied token table, positions."""
    vector_params: int
    """Norms and biases."""
    routed_params: int = 0
    """Matrices of all routed experts of all layers (mixture of experts)."""
    num_experts: int = 0
    experts_per_token: int = 0
    windows: tuple[int | None, ...] = ()
    """Attention window of each layer in tokens; None is full attention."""
    quant_bits: float | None = None
    """Bits a matrix weight takes, scales included; None is the dtype's."""
    quant_head: bool = False
    max_positions: int | None = None
    config_dtype: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def head_params(self) -> int:
        """The LM head, whether or not it is the token table too."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        matrices = self.layer_params + self.routed_params + self.head_params
        return matrices + self.table_params + self.vector_params

    def _bytes(self, matrices: float, head: float, rest: float, dtype_bytes: float) -> float:
        quantised = dtype_bytes if self.quant_bits is None else self.quant_bits / 8
        head_bytes = quantised if self.quant_head else dtype_bytes
        return matrices * quantised + head * head_bytes + rest * dtype_bytes

    def weight_bytes(self, dtype_bytes: float) -> float:
        """Bytes that the weights take in memory."""
        matrices = self.layer_params + self.routed_params
        rest = self.table_params + self.vector_params
        return self._bytes(matrices, self.head_params, rest, dtype_bytes)

    def step_weight_bytes(self, dtype_bytes: float, batch: int) -> float:
        """Bytes of weights that one decode step reads: each matrix and the LM head once.

        Of routed experts it counts those that `batch` tokens are expected to hit when the router
        picks evenly: a share of 1 - (1 - k/E)^batch.
        """
        routed = 0.0
        if self.num_experts:
            missed = (1 - self.experts_per_token / self.num_experts) ** batch
            routed = self.routed_params * (1 - missed)
        matrices = self.layer_params + routed
        return self._bytes(matrices, self.head_params, self.vector_params, dtype_bytes)

    def step_matmul_flops(self, batch: int) -> float:
        """Two operations for each weight that a token meets, times `batch` tokens."""
        active = float(self.layer_params + self.head_params)
        if self.num_experts:
            active += self.routed_params * self.experts_per_token / self.num_experts
        return 2.0 * batch * active

    def kv_heads_per_rank(self, tp: int) -> int:
        """vLLM keeps whole KV heads: with more ranks than heads each rank holds a copy of one."""
        return max(1, self.num_kv_heads // tp)

    def kv_bytes_per_token(self, kv_bytes: float, tp: int = 1) -> float:
        """Bytes of keys and values that one token takes on one rank, all layers."""
        return 2 * self.kv_heads_per_rank(tp) * self.head_dim * self.num_layers * kv_bytes

    def attended(self, context: int) -> int:
        """Tokens read by one row, summed over layers: a window shortens its layer's."""
        return sum(context if w is None else min(context, w) for w in self.windows)

    def step_kv_bytes(self, kv_bytes: float, batch: int, context: int, tp: int = 1) -> float:
        row = 2 * self.kv_heads_per_rank(tp) * self.head_dim * kv_bytes
        return batch * self.attended(context) * row

    def step_attention_flops(self, batch: int, context: int) -> float:
        """Scores and weighted sum: 4 operations for each head, channel and attended token."""
        return 4.0 * batch * self.attended(context) * self.num_heads * self.head_dim


def load_config(source: ConfigSource) -> dict[str, Any]:
    """The `config.json` of a local folder or a hub repository, or a config object, as a dict.

    Of a hub repository that one file is fetched. Raises `UserError` when it cannot be had.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "to_dict"):
        return source.to_dict()
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{source}: no config.json in this folder; give a model folder")
    elif not path.is_file():
        path = _hub_config(str(source))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot read {path.name} as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{source}: {path.name} holds no JSON object; give a model folder")
    return config


def _hub_config(name: str) -> Path:
    hint = "give a local model folder, or the name of a hub repository that you can read"
    # A hub name is "owner/name" or "name"; anything else can only be a path.
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not name.strip():
        raise UserError(f"{name or repr(name)}: no such model folder; {hint}")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(f"{name}: no such folder, and huggingface_hub is missing; {hint}") from None
    try:
        cached = hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        # Without this a name that the hub does not have, or no network, is retried for 20 seconds.
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"))
        return Path(hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client's own kinds, its HTTP library's, and ValueError
        reason = (str(error).strip().splitlines() or [""])[0].partition(" (Request ID")[0]
        why = f"{type(error).__name__}: {reason.rstrip('.')}"
        raise UserError(
            f"{name}: no such folder here, and the hub gave no config.json ({why}); {hint}"
        ) from None


def model_shape(source: ConfigSource, name: str | None = None) -> ModelShape:
    """Counts of the decoder that `source` (see `load_config`) describes.

    Covers decoders with plain attention: Llama, Mistral, Qwen2 and 3, Gemma, GPT-2, OPT, GPT-NeoX
    and those that use their field names, with grouped heads, tied tables, windows, and mixtures of
    experts of Mixtral's and Qwen's kind. Raises `UserError` for other attention kinds and for a
    missing field, by its name.
    """
    config = load_config(source)
    name = name or (str(source) if isinstance(source, (str, Path)) else "model")
    notes: list[str] = []
    if isinstance(config.get("text_config"), Mapping):
        outer, config = config, dict(config["text_config"])
        config.setdefault("tie_word_embeddings", outer.get("tie_word_embeddings"))
        config.setdefault("quantization_config", outer.get("quantization_config"))
        notes.append("only the text part is counted")
    kind = str(config.get("model_type", ""))
    for key, wanted in _OPTIONAL.items():
        if config.get(key) and not isinstance(config[key], wanted):
            what = wanted.__name__.lower()
            raise UserError(f"{name}: config.json has {key} = {config[key]!r}; it is a {what}")
    _refuse_other_attention(name, kind, config)

    def need(*keys: str) -> int:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            if value is not None:
                raise UserError(f"{name}: config.json has {key} = {value!r}; a count is needed")
        raise UserError(f"{name}: config.json has no {keys[0]}; its size cannot be told")

    def maybe(*keys: str) -> int | None:
        given = [key for key in keys if config.get(key) is not None]
        return need(*given) if given else None

    layers = need("num_hidden_layers", "n_layer")
    hidden = need("hidden_size", "n_embd")
    heads = need("num_attention_heads", "n_head")
    vocab = need("vocab_size")
    kv_heads = 1 if config.get("multi_query") else maybe("num_key_value_heads") or heads
    head_dim = maybe("head_dim") or hidden // heads
    if not head_dim or layers > _MOST_LAYERS:
        raise UserError(
            f"{name}: config.json has {layers} layers of width {hidden} in {heads} heads;"
            " no model has that shape"
        )
    ffn = maybe("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden

    known = kind in _TIED | _UNTIED
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = kind in _TIED
        if not known:
            notes.append("config.json has no tie_word_embeddings: counted with its own LM head")
    if not known:
        notes.append(f"model_type {kind!r} is counted as a Llama-like decoder")

    mlp_matrices = 2 if kind in _PLAIN_MLP else 3
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    sparse_layers, num_experts, per_token, routed, shared = _experts(
        config, maybe, hidden, ffn, layers
    )
    dense_mlp = (layers - sparse_layers) * mlp_matrices * hidden * ffn
    table = 0 if tied else vocab * hidden
    vectors = (2 * layers + 1) * hidden
    if kind == "gpt2":
        table += need("n_positions") * hidden
        # Four biases of 3h, h, ffn and h, and a bias beside each norm's weight.
        vectors += layers * (5 * hidden + ffn) + (2 * layers + 1) * hidden
    elif kind == "opt":
        width = maybe("word_embed_proj_dim") or hidden
        if width != hidden:
            raise UserError(f"{name}: OPT with word_embed_proj_dim {width} is not counted yet")
        table += (need("max_position_embeddings") + 2) * hidden
        vectors += layers * (5 * hidden + ffn) + (2 * layers + 1) * hidden
    elif kind in ("qwen2", "qwen2_moe"):
        vectors += layers * (heads + 2 * kv_heads) * head_dim
    elif kind in ("qwen3", "qwen3_moe"):
        vectors += layers * 2 * head_dim

    try:
        bits, quant_head, quant_note = _quantisation(config.get("quantization_config"))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name}: quantization_config in config.json is odd ({error})") from None
    if quant_note:
        notes.append(quant_note)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tied=bool(tied),
        layer_params=layers * attention + dense_mlp + shared,
        table_params=table,
        vector_params=vectors,
        routed_params=routed,
        num_experts=num_experts,
        experts_per_token=per_token,
        windows=_windows(config, layers),
        quant_bits=bits,
        quant_head=quant_head,
        max_positions=maybe("max_position_embeddings", "n_positions"),
        config_dtype=str(dtype).removeprefix("torch.") if dtype else None,
        notes=tuple(notes),
    )


def _refuse_other_attention(name: str, kind: str, config: Mapping[str, Any]) -> None:
    other = ""
    if config.get("kv_lora_rank"):
        other = "multi-head latent attention"
    elif config.get("is_encoder_decoder"):
        other = "an encoder"
    elif any(k.startswith(("mamba", "ssm", "rwkv")) for k in (kind, *config)):
        other = "state-space layers"
    else:
        allowed = {"full_attention", "sliding_attention", "chunked_attention"}
        odd = sorted({str(k) for k in config.get("layer_types") or ()} - allowed)
        other = ", ".join(odd)
    if other:
        raise UserError(f"{name}: {kind} has {other}; only plain attention can be planned for")


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    qwen = str(config.get("model_type", "")).startswith("qwen")
    if not window or (qwen and not config.get("use_sliding_window")):
        return (None,) * layers
    types = config.get("layer_types")
    if types:
        return tuple(None if t == "full_attention" else int(window) for t in types)
    # Gemma 2 and 3 leave every second and every sixth layer without a window.
    every = config.get("sliding_window_pattern") or (
        2 if config.get("model_type") == "gemma2" else 0
    )
    return tuple(None if every and (i + 1) % every == 0 else int(window) for i in range(layers))


def _experts(
    config: Mapping[str, Any], maybe: Any, hidden: int, ffn: int, layers: int
) -> tuple[int, int, int, int, int]:
    """Sparse layers, experts, experts a token, routed and always-read parameters of those."""
    experts = maybe("num_local_experts", "num_experts")
    if not experts:
        return 0, 0, 0, 0, 0
    per_token = maybe("num_experts_per_tok") or 1
    width = maybe("moe_intermediate_size") or ffn
    step = maybe("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    sparse = sum(1 for i in range(layers) if i not in dense and (i + 1) % step == 0)
    shared_width = maybe("shared_expert_intermediate_size") or 0
    routed = sparse * experts * 3 * hidden * width
    # The router, and Qwen's shared expert with its one-row gate.
    always = sparse * (hidden * experts + 3 * hidden * shared_width)
    if shared_width:
        always += sparse * hidden
    return sparse, experts, per_token, routed, always


def _quantisation(quant: Mapping[str, Any] | None) -> tuple[float | None, bool, str]:
    """Bits a matrix weight, whether the LM head is quantised too, and a note."""
    if not quant:
        return None, False, ""
    method = str(quant.get("quant_method", "unknown")).lower()
    bits: float | None = None
    group: Any = quant.get("group_size")
    if "fp8" in method or str(quant.get("quant_algo", "")).upper() == "FP8":
        bits, group = 8.0, None
    elif method == "compressed-tensors":
        groups = quant.get("config_groups") or {}
        weights = [g.get("weights") or {} for g in groups.values() if isinstance(g, Mapping)]
        # The coarsest of several groups, so that memory is not promised that is not there.
        known = [w for w in weights if w.get("num_bits")]
        if known:
            widest = max(known, key=lambda w: w["num_bits"])
            bits, group = float(widest["num_bits"]), widest.get("group_size")
    elif method == "bitsandbytes":
        # 4-bit blocks of 64 weights share one float32 scale.
        bits, group = (4.5 if quant.get("load_in_4bit") else 8.0), None
    elif method == "mxfp4":
        bits, group = 4.25, None  # blocks of 32 share one 8-bit scale
    elif isinstance(quant.get("bits") or quant.get("w_bit"), int):
        bits = float(quant.get("bits") or quant.get("w_bit"))  # type: ignore[arg-type]
        group = group or quant.get("q_group_size")
    if bits is None:
        return None, False, f"quantization {method!r} is not known: counted without it"
    if isinstance(group, int) and group > 0:
        bits += (16 + (bits if bits < 8 else 0)) / group  # a 16-bit scale, a zero point
    note = f"{method}: {bits:g} bits a matrix weight, scales included; peak FLOP/s kept at 16-bit"
    return bits, bool(quant.get("lm_head")), note
