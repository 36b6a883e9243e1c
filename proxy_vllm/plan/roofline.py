"""The model of cost: floor of a decode step, its ratio to the base alone, and the memory left.

A step's floor is a sum of phases, each at the slower of its memory and its arithmetic, because the
phases of one step follow each other:

    matrices   max(bytes of weights / bandwidth,  2 * batch * weights / peak)       each model
    attention  max(bytes of caches / bandwidth, operations on what is attended / peak)  each model
    sampling   batch * (sum of the models' vocabularies) * dtype bytes / bandwidth

Weights count once a step, LM heads among them (a tied table is read whole by the head); of an
untied token table one row a token is read, which is not counted. A layer with a window reads its
window, a latent layer its latents, and a state is read and written. Launch gaps, activations and
communication between ranks are not counted, so a measured step lies above the floor.
A tensor-parallel rank reads 1/T of the weights and its own KV heads.

Memory is what decoding sequences of `context` tokens hold. Where layers have windows or states it
is the better of vLLM's two layouts: one block table, in which windows keep every token, or a table
for each group of layers (tables.py). A window holds more than that while its prompt is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from proxy_vllm.errors import UserError
from proxy_vllm.plan.adapters import AdapterSlots
from proxy_vllm.plan.config_file import ConfigSource
from proxy_vllm.plan.gpus import Gpu, find_gpu
from proxy_vllm.plan.model_size import DTYPE_BYTES, ElementBytes, ModelShape, model_shape
from proxy_vllm.plan.speculation import Speculation, speculation
from proxy_vllm.plan.tables import Kind, held_in_tables
from proxy_vllm.validate import check_heads

GIB = 1 << 30
KV_DTYPE_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, **DTYPE_BYTES}

RESERVE_GIB = 2.0
"""CUDA context, activations of a prefill chunk, logits and CUDA graphs, on each GPU."""


@dataclass(frozen=True)
class StepFloor:
    """Least time of one decode step of `batch` sequences, in milliseconds."""

    matmul_ms: float
    attention_ms: float
    sampling_ms: float

    @property
    def step_ms(self) -> float:
        return self.matmul_ms + self.attention_ms + self.sampling_ms


def step_floor(
    members: Sequence[ModelShape],  # the base first
    gpu: Gpu,
    *,
    batch: int = 1,
    context: int = 1024,
    tp: int = 1,
    dtype_bytes: float = 2,
    kv_bytes: float | None = None,
    tokens_per_row: int = 1,
) -> StepFloor:
    """Floor of a decode step of `members` run one after another on `tp` GPUs like `gpu`.

    `context` is the number of tokens that each of the `batch` rows attends to. `members` holds the
    base alone, or base, expert and antiexpert; logit columns past the base's vocabulary are cut.
    A row that verifies drafts has more than one token in the step.
    """
    bandwidth, peak = gpu.bandwidth_tbps * 1e12, gpu.tflops * 1e12
    size = ElementBytes(dtype_bytes, dtype_bytes if kv_bytes is None else kv_bytes)
    tokens = batch * tokens_per_row
    matmul = attention = logits = 0.0
    for shape in members:
        weight_s = shape.step_weight_bytes(size, tokens) / tp / bandwidth
        matmul += max(weight_s, shape.step_matmul_flops(tokens) / tp / peak)
        cache_s = shape.step_cache_bytes(size, batch, context, tp) / bandwidth
        attention += max(cache_s, shape.step_attention_flops(tokens, context) / tp / peak)
        columns = min(shape.vocab_size, members[0].vocab_size)
        logits += tokens * columns * dtype_bytes / tp / bandwidth
    return StepFloor(matmul * 1e3, attention * 1e3, logits * 1e3)


@dataclass(frozen=True)
class Plan:
    """What a trio costs on a GPU. Times are floors; memory is per GPU."""

    step_ms: float
    base_step_ms: float
    ratio: float
    """base_step_ms / step_ms: the share of the base's own speed that is left, at most 1."""
    slowdown: float
    """step_ms / base_step_ms."""
    tokens_per_s: float
    base_tokens_per_s: float
    fits: bool
    """The weights, the reserve and the KV cache of `batch` rows of `context` tokens fit."""
    kv_tokens: int
    """Tokens that the KV cache of the three holds beside weights and reserve, in sequences of
    `context` tokens."""
    base_kv_tokens: int
    kv_tokens_one_table: int
    """The same where layers with windows keep every token, as own prompts need it."""
    kv_bytes_per_token: float
    """Bytes on one rank of a sequence of `context` tokens, over its tokens."""
    weights_gib: dict[str, float]
    """Of each member, slots for `adapters`, and `total`, over all GPUs."""
    parts_ms: dict[str, float]
    inputs: dict[str, Any]
    notes: tuple[str, ...]
    speculation: Speculation | None = None
    """With drafts of the expert, where they are asked for."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def plan(
    base: ModelShape | ConfigSource,
    expert: ModelShape | ConfigSource,
    antiexpert: ModelShape | ConfigSource,
    gpu: Gpu | str,
    *,
    dtype: str = "bfloat16",
    kv_cache_dtype: str = "auto",
    batch: int = 1,
    context: int = 1024,
    tp: int = 1,
    gpu_memory_utilization: float = 0.9,
    reserve_gib: float = RESERVE_GIB,
    speculative_tokens: int | None = None,
    acceptance: float | None = None,
    same_as_base: Collection[str] = (),
    another_prompt: Collection[str] = (),
    adapters: AdapterSlots | None = None,
) -> Plan:
    """Time, memory and fit of a trio on `tp` GPUs.

    With `speculative_tokens`, of which each is accepted with probability `acceptance`, also the
    speed with drafts. The drafter is the expert in place, so memory stays as it is. Small members
    in `same_as_base` are the base itself: they cost nothing, or where they read `another_prompt` a
    pass and a cache and no weights. With `adapters`
    requests have LoRA adapters of the expert; what a step reads of them is not counted.
    Members are shapes, or anything that `proxy_vllm.plan.model_size.load_config` reads. Raises
    `UserError` for an input that no engine could run, by name.

    >>> tiny = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, vocab_size=256,
    ...             num_attention_heads=2, intermediate_size=128)
    >>> plan(tiny, tiny, tiny, "h200").fits
    True
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    roles = ("base", "expert", "antiexpert")
    members = [
        source if isinstance(source, ModelShape) else model_shape(source)
        for source in (base, expert, antiexpert)
    ]
    check_load(members, batch, context, tp, gpu_memory_utilization, reserve_gib)
    notes = [f"{role}: {note}" for role, m in zip(roles, members) for note in m.notes]
    size = element_bytes(dtype, kv_cache_dtype)
    notes += warnings(dict(zip(roles, members)), size, context, gpu, tp)
    # Adapters make the expert another model, though its weights be another member's.
    adapted = ("expert",) if adapters is not None else ()
    runs = [role not in same_as_base or role in (*another_prompt, *adapted) for role in roles]
    running = [m for m, own in zip(members, runs) if own]
    own_weights = [role not in same_as_base for role in roles]
    if adapters is not None and adapters.alone:
        own_weights[1] = False
    if (speculative_tokens is None) != (acceptance is None):
        raise UserError(
            "--speculative-tokens and --acceptance go together: the share of drafts that is"
            " accepted decides what they gain (a server's /metrics counts it)"
        )
    floor_of = partial(
        step_floor,
        gpu=gpu,
        batch=batch,
        context=context,
        tp=tp,
        dtype_bytes=size.weights,
        kv_bytes=size.kv,
    )
    floor, alone = floor_of(running), floor_of(members[:1])
    drafts = None
    if speculative_tokens is not None and acceptance is not None:
        drafters = [m for role, m in zip(roles, members) if role not in same_as_base]
        drafters = drafters[1:] if adapters is None else [members[1]]
        if not drafters:
            raise UserError("--speculative-tokens: expert and antiexpert are the base itself")
        drafts = speculation(
            running,
            drafters[0],
            floor_of,
            batch=batch,
            drafts=speculative_tokens,
            acceptance=acceptance,
        )

    holding = [m for m, own in zip(members, own_weights) if own]
    weights = {
        role: m.weight_bytes(size) / GIB if own else 0.0
        for role, m, own in zip(roles, members, own_weights)
    }
    budget_gib = gpu.memory_gib * gpu_memory_utilization - reserve_gib
    trio_gib = budget_gib
    if adapters is not None:
        weights["adapters"] = adapters.bytes(members[1], size) / GIB
        trio_gib -= weights["adapters"] / tp
    kv_tokens = partial(fitting_tokens, size=size, context=context, tp=tp)
    tokens = kv_tokens(running, holding=holding, budget_gib=trio_gib)
    return Plan(
        step_ms=floor.step_ms,
        base_step_ms=alone.step_ms,
        ratio=alone.step_ms / floor.step_ms,
        slowdown=floor.step_ms / alone.step_ms,
        tokens_per_s=batch / floor.step_ms * 1e3,
        base_tokens_per_s=batch / alone.step_ms * 1e3,
        fits=tokens >= batch * context,
        kv_tokens=tokens,
        base_kv_tokens=kv_tokens(members[:1], budget_gib=budget_gib),
        kv_tokens_one_table=kv_tokens(
            running, holding=holding, budget_gib=trio_gib, one_table=True
        ),
        kv_bytes_per_token=_held(running, size, context, tp) / context,
        weights_gib={**weights, "total": sum(weights.values())},
        parts_ms=asdict(floor),
        inputs={
            **{role: m.name for role, m in zip(roles, members)},
            "same_as_base": sorted(same_as_base),
            "gpu": asdict(gpu),
            "tensor_parallel_size": tp,
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "batch": batch,
            "context": context,
            "gpu_memory_utilization": gpu_memory_utilization,
            "reserve_gib": reserve_gib,
            **({"adapters": asdict(adapters)} if adapters is not None else {}),
        },
        notes=tuple(notes),
        speculation=drafts,
    )


def fitting_tokens(
    members: Sequence[ModelShape],
    *,
    size: ElementBytes,
    budget_gib: float,
    context: int,
    tp: int,
    holding: Sequence[ModelShape] | None = None,
    one_table: bool = False,
) -> int:
    """Tokens that the KV cache of `members` holds in `budget_gib` of each GPU beside weights.

    `holding` are those with weights of their own; None: all of them.
    """
    holders = members if holding is None else holding
    left = budget_gib * GIB - sum(m.weight_bytes(size) for m in holders) / tp
    held = _held(members, size, context, tp, one_table=one_table)
    return max(0, int(left // (held / context)))


def _held(
    members: Sequence[ModelShape],
    size: ElementBytes,
    context: int,
    tp: int,
    *,
    one_table: bool = False,
) -> float:
    """Bytes that a sequence holds on one rank, of all members, in the better layout."""
    kinds = sum((m.cache_kinds(size, tp) for m in members), Counter[Kind]())
    states = any(kind.state_bytes for kind in kinds)
    whole = sum(m.cache_bytes(size, context, tp, one_table=True) for m in members)
    if not states and (one_table or all(kind.window is None for kind in kinds)):
        return whole
    if one_table:  # states never share the attention layers' table
        kinds = _without_windows(kinds)
    tables = held_in_tables(kinds, context)
    return tables if states else min(whole, tables)


def _without_windows(kinds: Counter[Kind]) -> Counter[Kind]:
    whole: Counter[Kind] = Counter()
    for kind, count in kinds.items():
        whole[replace(kind, window=None)] += count
    return whole


def element_bytes(dtype: str, kv_cache_dtype: str) -> ElementBytes:
    """Bytes of elements by the options' names; `UserError` for names that no engine takes."""
    # vLLM runs a float32 checkpoint at 16 bits too, unless told otherwise.
    weights = 2 if dtype == "auto" else DTYPE_BYTES.get(dtype)
    if weights is None:
        raise UserError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPE_BYTES)}")
    kv = weights if kv_cache_dtype == "auto" else KV_DTYPE_BYTES.get(kv_cache_dtype)
    if kv is None:
        raise UserError(f"unknown KV cache dtype {kv_cache_dtype!r}: {', '.join(KV_DTYPE_BYTES)}")
    return ElementBytes(weights, kv)


def check_load(
    members: Sequence[ModelShape],
    batch: int,
    context: int,
    tp: int,
    utilization: float,
    reserve_gib: float,
) -> None:
    for name, value in (("--batch", batch), ("--context", context), ("--tp", tp)):
        if value < 1:
            raise UserError(f"{name} {value}: give a whole number from 1")
    if not 0 < utilization <= 1:
        raise UserError(f"--gpu-memory-utilization {utilization}: give a share above 0, up to 1")
    if not 0 <= reserve_gib < float("inf"):
        raise UserError(f"--reserve-gib {reserve_gib}: give a number of GiB from 0")
    for shape in members:
        for kv_heads in {c.heads for c in shape.caches if c.heads}:
            check_heads(shape.name, shape.num_heads, kv_heads, tp, shape.kind)


def warnings(
    members: Mapping[str, ModelShape], size: ElementBytes, context: int, gpu: Gpu, tp: int
) -> list[str]:
    """What a user should know of these figures; `members` by role, the base if it is here."""
    notes = []
    for role, shape in members.items():
        if shape.max_positions and context > shape.max_positions:
            notes.append(f"{role}: has {shape.max_positions} positions, context is {context}")
    for role in ("expert", "antiexpert"):
        columns = members[role].vocab_size
        base = members["base"].vocab_size if "base" in members else columns
        if columns < base:
            notes.append(
                f"{role}: {columns} vocabulary entries, base has {base}; the three must share one "
                "tokenizer, and padding alone may differ"
            )
    if size.weights == 4:
        notes.append("peak FLOP/s is the 16-bit one; float32 arithmetic is slower")
    if tp > 1:
        notes.append("communication between ranks is not counted")
    if gpu.source == "data sheet":
        notes.append("bandwidth is the data sheet's; a measured copy reaches about 0.9 of it")
    return notes
