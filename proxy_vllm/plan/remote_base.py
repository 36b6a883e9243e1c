"""What a base elsewhere costs: the small pair on a GPU here, round trips, and money.

Each token takes a row of the expert and one of the antiexpert. The local engine has them from two
requests, which run both models over what is not cached: the last block of keys and values, half
full on average. With T tokens a trip and Q questions a token, a conversation's

    seconds a token = step of the pair + latency * (1 / T + Q)
    dollars a token = (prompts a trip * context * prompt + (T + 1) * completion) / T
                      + Q * (context * prompt + completion)

A trip ends with a token that the pair overrules, and that is paid for too; drafts of the expert
are prompts of their own. The base's own time for a token is not counted: nobody here knows it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from proxy_vllm.errors import UserError
from proxy_vllm.plan.config_file import ConfigSource
from proxy_vllm.plan.gpus import Gpu, find_gpu
from proxy_vllm.plan.model_size import ModelShape, model_shape
from proxy_vllm.plan.roofline import (
    GIB,
    RESERVE_GIB,
    check_load,
    element_bytes,
    fitting_tokens,
    step_floor,
    warnings,
)
from proxy_vllm.plan.tables import BLOCK
from proxy_vllm.remote_base.settings import RemoteBase
from proxy_vllm.remote_base.usage import Price

# Of the trained trio in the box, 20 log-probabilities, without drafts: the gate of 100 prompts in
# benchmarks/results/remote_base_cpu.json (2,400 tokens, 1,146 trips, 467 questions).
TOKENS_A_TRIP = 2.1
QUESTIONS_A_TOKEN = 0.2


@dataclass(frozen=True)
class Trips:
    """How an answer is made, as reports of answers and a server's `/metrics` count it.

    Attributes:
        latency_ms: of a round trip to the endpoint, beside the base's own time.
        tokens_a_trip: tokens of an answer in one trip.
        questions_a_token: further calls for a token; none where the mode is `top-k`.
    """

    latency_ms: float = 0.0
    tokens_a_trip: float = TOKENS_A_TRIP
    questions_a_token: float = QUESTIONS_A_TOKEN

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ms < float("inf"):
            raise UserError(f"--base-latency-ms {self.latency_ms}: give a number from 0")
        if not 1 <= self.tokens_a_trip < float("inf"):
            raise UserError(f"--tokens-a-trip {self.tokens_a_trip}: give a number from 1")
        if not 0 <= self.questions_a_token < float("inf"):
            raise UserError(f"--questions-a-token {self.questions_a_token}: give a number from 0")


@dataclass(frozen=True)
class RemoteBasePlan:
    """Times are floors; memory is per GPU."""

    step_ms: float
    """Of the pair, for a token of each conversation."""
    token_ms: float
    """Of one conversation: the step, and its share of round trips and questions."""
    tokens_per_s: float
    """Of all conversations that may ask the endpoint at once."""
    fits: bool
    kv_tokens: int
    weights_gib: dict[str, float]
    dollars_per_1000_tokens: float | None
    """None without a price."""
    inputs: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def plan_remote_base(
    remote: RemoteBase,
    expert: ModelShape | ConfigSource,
    antiexpert: ModelShape | ConfigSource,
    gpu: Gpu | str,
    *,
    trips: Trips | None = None,
    dtype: str = "bfloat16",
    kv_cache_dtype: str = "auto",
    batch: int = 1,
    context: int = 1024,
    tp: int = 1,
    gpu_memory_utilization: float = 0.9,
    reserve_gib: float = RESERVE_GIB,
) -> RemoteBasePlan:
    """Time, memory and money of `batch` conversations; the endpoint is not asked.

    Members are shapes, or anything that `proxy_vllm.plan.model_size.load_config` reads. Raises
    `UserError` for an input that no engine could run, by name.
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    trips = trips or Trips()
    pair = {
        role: source if isinstance(source, ModelShape) else model_shape(source)
        for role, source in (("expert", expert), ("antiexpert", antiexpert))
    }
    members = list(pair.values())
    check_load(members, batch, context, tp, gpu_memory_utilization, reserve_gib)
    size = element_bytes(dtype, kv_cache_dtype)
    step_ms = step_floor(
        members,
        gpu,
        batch=2 * batch,
        context=context,
        tp=tp,
        dtype_bytes=size.weights,
        kv_bytes=size.kv,
        tokens_per_row=BLOCK // 2,
    ).step_ms
    questions = trips.questions_a_token if remote.mode == "exact" else 0.0
    token_ms = step_ms + trips.latency_ms * (1 / trips.tokens_a_trip + questions)
    tokens = fitting_tokens(
        members,
        size=size,
        budget_gib=gpu.memory_gib * gpu_memory_utilization - reserve_gib,
        context=context,
        tp=tp,
    )
    weights = {role: shape.weight_bytes(size) / GIB for role, shape in pair.items()}
    notes = [f"{role}: {note}" for role, shape in pair.items() for note in shape.notes]
    notes += warnings(pair, size, context, gpu, tp)
    if remote.concurrency < batch:
        notes.append(f"{remote.concurrency} conversations ask at once (--base-concurrency)")
    notes.append("the base's own time for a token is not counted, and its endpoint was not asked")
    return RemoteBasePlan(
        step_ms=step_ms,
        token_ms=token_ms,
        tokens_per_s=min(batch, remote.concurrency) / token_ms * 1e3,
        fits=tokens >= batch * context,
        kv_tokens=tokens,
        weights_gib={**weights, "total": sum(weights.values())},
        dollars_per_1000_tokens=_dollars(remote, trips, questions, context),
        inputs={
            "base": remote.model,
            "base_url": remote.url,
            "base_mode": remote.mode,
            **{role: shape.name for role, shape in pair.items()},
            "gpu": asdict(gpu),
            "tensor_parallel_size": tp,
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "batch": batch,
            "context": context,
            "gpu_memory_utilization": gpu_memory_utilization,
            "reserve_gib": reserve_gib,
            **asdict(trips),
            "questions_a_token": questions,
        },
        notes=tuple(notes),
    )


def _dollars(remote: RemoteBase, trips: Trips, questions: float, context: int) -> float | None:
    """Of 1000 tokens of an answer; prompts at the cached price, if there is one."""
    if remote.price is None:
        return None
    price = Price.parse(remote.price)
    prompt = context * (price.prompt if price.cached is None else price.cached)
    trip = (1 + remote.drafts) * prompt + (trips.tokens_a_trip + 1) * price.completion
    token = trip / trips.tokens_a_trip + questions * (prompt + price.completion)
    return token * 1000 / 1e6
