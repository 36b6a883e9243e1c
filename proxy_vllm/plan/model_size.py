"""The size of one member: weights, KV cache and states, and the arithmetic of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy_vllm.errors import UserError
from proxy_vllm.plan import decoder
from proxy_vllm.plan.config_file import ConfigSource, load_config
from proxy_vllm.plan.decoder import LayerCache, Parameters
from proxy_vllm.plan.tables import Kind

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}

# Blocks of 32 weights share one 8-bit scale. Checkpoints in this format quantise experts alone.
_MXFP4_BITS = 4.25


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of an element of the weights (before quantisation) and states, and of the KV cache."""

    weights: float = 2
    kv: float = 2


@dataclass(frozen=True)
class ModelShape:
    """Counts of one decoder: parameters, not bytes, unless the name says otherwise."""

    name: str
    num_heads: int
    vocab_size: int
    params: Parameters
    experts_per_token: int
    caches: tuple[LayerCache, ...]
    quant_bits: float | None = None
    """Bits a matrix weight takes, scales included; None is the dtype's."""
    quant_head: bool = False
    quant_experts_only: bool = False
    max_positions: int | None = None
    kind: str | None = None
    """``model_type`` of the text configuration."""
    notes: tuple[str, ...] = field(default=())

    @property
    def num_params(self) -> int:
        p = self.params
        return p.layers + p.routed + p.head + p.vectors + p.tables

    @property
    def routed_share(self) -> float:
        """The share of routed experts that one token takes."""
        return self.experts_per_token / self.params.num_experts if self.params.routed else 0.0

    def _bytes(self, routed: float, rest: float, size: ElementBytes) -> float:
        quantised = size.weights if self.quant_bits is None else self.quant_bits / 8
        layers = size.weights if self.quant_experts_only else quantised
        head = quantised if self.quant_head else size.weights
        fixed = self.params.layers * layers + self.params.head * head
        return fixed + routed * quantised + rest * size.weights

    def weight_bytes(self, size: ElementBytes) -> float:
        """Bytes that the weights take in memory."""
        return self._bytes(self.params.routed, self.params.tables + self.params.vectors, size)

    def step_weight_bytes(self, size: ElementBytes, tokens: int) -> float:
        """Bytes of weights that a step of `tokens` tokens reads: each matrix and the head once.

        Of routed experts it counts those that the tokens are expected to hit when the router picks
        evenly: a share of 1 - (1 - k/E)^tokens.
        """
        hit = 1 - (1 - self.routed_share) ** tokens
        return self._bytes(self.params.routed * hit, self.params.vectors, size)

    def step_matmul_flops(self, tokens: int) -> float:
        """Two operations for each weight that a token meets."""
        p = self.params
        return 2.0 * tokens * (p.layers + p.head + p.routed * self.routed_share)

    def _row(self, cache: LayerCache, size: ElementBytes, tp: int) -> float:
        """Bytes that one token leaves in one layer on one rank.

        vLLM keeps whole KV heads: with more ranks than heads each rank holds a copy of one.
        """
        return max(1, cache.heads // tp) * cache.width * size.kv

    def state_bytes(self, size: ElementBytes, tp: int = 1) -> float:
        """Bytes of convolution and recurrent states of one sequence on one rank."""
        return sum(_state_bytes(c, size) / tp for c in self.caches)

    def cache_bytes(
        self, size: ElementBytes, context: int, tp: int = 1, *, one_table: bool = False
    ) -> float:
        """Bytes that a sequence of `context` tokens holds on one rank.

        With one block table for all layers, those with a window keep every token.
        """
        kept = sum(
            self._row(c, size, tp) * (context if one_table else attended(c, context))
            for c in self.caches
            if c.owned
        )
        return kept + self.state_bytes(size, tp)

    def cache_kinds(self, size: ElementBytes, tp: int = 1) -> Counter[Kind]:
        """How many layers of each kind keep something of a sequence."""
        kinds: Counter[Kind] = Counter()
        for cache in self.caches:
            if cache.width and cache.owned:
                kinds[Kind(token_bytes=self._row(cache, size, tp), window=cache.window)] += 1
            elif not cache.width:
                kinds[Kind(state_bytes=_state_bytes(cache, size) / tp)] += 1
        return kinds

    def step_cache_bytes(self, size: ElementBytes, batch: int, context: int, tp: int = 1) -> float:
        """Bytes of caches that a step moves: keys and values read, states read and written."""
        read = sum(self._row(c, size, tp) * attended(c, context) for c in self.caches)
        return batch * (read + 2 * self.state_bytes(size, tp))

    def step_attention_flops(self, tokens: int, context: int) -> float:
        """Scores and weighted sums of `tokens` new tokens, each over `context` earlier ones."""
        return float(tokens * sum(c.flops * attended(c, context) for c in self.caches))


def _state_bytes(cache: LayerCache, size: ElementBytes) -> float:
    recurrent = cache.state_elements * (cache.state_bytes or size.weights)
    return cache.conv_elements * size.weights + recurrent


def attended(cache: LayerCache, context: int) -> int:
    """Tokens that a layer reads of a sequence of `context` tokens."""
    return context if cache.window is None else min(context, cache.window)


def model_shape(source: ConfigSource, name: str | None = None) -> ModelShape:
    """Counts of the decoder that `source` (see `load_config`) describes.

    Covers the decoders of Transformers: full attention, windows, chunks, latent attention, states
    and mixtures of experts. Raises `UserError` for what is not counted, by name.
    """
    raw = load_config(source)
    name = name or (str(source) if isinstance(source, (str, Path)) else "model")
    config = decoder.text_config(name, raw)
    model = decoder.build(name, config)
    params = decoder.parameters(model)
    notes = []
    if "text_config" in raw:
        notes.append("only the text part is counted")
    quant = raw.get("quantization_config")
    if not quant and isinstance(raw.get("text_config"), Mapping):
        quant = raw["text_config"].get("quantization_config")
    try:
        bits, quant_head, quant_note = _quantisation(quant)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name}: quantization_config in config.json is odd ({error})") from None
    if quant_note:
        notes.append(quant_note)
    return ModelShape(
        name=name,
        num_heads=getattr(config, "num_attention_heads", None) or 1,
        vocab_size=config.vocab_size,
        params=params,
        experts_per_token=decoder.experts_per_token(name, config) if params.routed else 0,
        caches=decoder.caches(name, config, model),
        quant_bits=bits,
        quant_head=quant_head,
        quant_experts_only=bits == _MXFP4_BITS,
        max_positions=getattr(config, "max_position_embeddings", None),
        kind=config.model_type,
        notes=tuple(notes),
    )


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
        bits, group = _MXFP4_BITS, None
    elif isinstance(quant.get("bits") or quant.get("w_bit"), int):
        bits = float(quant.get("bits") or quant.get("w_bit"))  # type: ignore[arg-type]
        group = group or quant.get("q_group_size")
    if bits is None:
        return None, False, f"quantization {method!r} is not known: counted without it"
    if isinstance(group, int) and group > 0:
        bits += (16 + (bits if bits < 8 else 0)) / group  # a 16-bit scale, a zero point
    note = f"{method}: {bits:g} bits a matrix weight, scales included; peak FLOP/s kept at 16-bit"
    return bits, bool(quant.get("lm_head")), note
