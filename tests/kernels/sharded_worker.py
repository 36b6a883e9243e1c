"""One gloo rank of test_sharded.py: samples its shards and reports tokens, calls and bytes."""

import os
import sys
from dataclasses import replace
from pathlib import Path

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("PROXY_VLLM_CPU_RUNNER", "v2")

import proxy_vllm  # noqa: E402, F401  # isort: skip
import interpreter_speed  # noqa: E402
import torch.distributed as dist  # noqa: E402
from kernel_cases import make_case, make_filters, make_heads, on  # noqa: E402

from proxy_vllm.kernels.columns import Columns  # noqa: E402
from proxy_vllm.kernels.fused_head import fused_head_sample  # noqa: E402
from proxy_vllm.kernels.sharded import (  # noqa: E402
    Exchange,
    ShardedSampler,
    merge_ranks,
    realign_columns,
)


def even(columns: int, padded: int) -> list[tuple[int, int]]:
    """Shard boundaries of a vocabulary padded to a multiple, as vLLM's heads split it."""
    part = -(-columns // (padded * world)) * padded
    return [(min(r * part, columns), min((r + 1) * part, columns)) for r in range(world)]


def main() -> None:
    if DEVICE == "cpu":
        interpreter_speed.install()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    job = torch.load(folder / "job.pt")
    case = make_case(**job["case"]).to(DEVICE)
    bounds = [tuple(pair) for pair in job["bounds"][str(world)]]
    start, end = bounds[rank]
    exchange = Exchange()
    columns = replace(Columns.of(*case.logits, job["named"]), start=start)
    sampler = ShardedSampler(exchange)
    shards = []
    for name in ("base", "expert", "antiexpert"):
        full = getattr(case, name)
        if name != "base":
            own = even(full.shape[1], 16)
            shards.append(
                realign_columns(full[:, own[rank][0] : own[rank][1]], own, bounds, exchange)
            )
        else:
            shards.append(full[:, start:end])
    realign_calls, realign_bytes = exchange.calls, exchange.bytes_sent
    results = []
    for kinds in job["kinds"]:
        exchange.calls = exchange.bytes_sent = 0
        filters = make_filters(case.base.shape[0], kinds=kinds)
        tokens = sampler.sample(
            *shards,
            case.rows(**on(DEVICE, filters)),
            columns=columns,
        )
        results.append((tokens.cpu(), exchange.calls, exchange.bytes_sent))
    exchange.calls = exchange.bytes_sent = 0
    logprobs = sampler.logprobs(
        *shards,
        case.rows(),
        results[0][0].to(DEVICE),
        5,
        columns=columns,
    )
    logprob_traffic = exchange.calls, exchange.bytes_sent
    exchange.calls = exchange.bytes_sent = 0
    head_tokens = None
    if all(low < high for low, high in bounds):
        hidden, weights = make_heads(case.base.shape[0], job["heads"], torch.float32)
        tokens, scores = fused_head_sample(
            [h.to(DEVICE) for h in hidden],
            [w[start:end].to(DEVICE) for w in weights],
            case.rows(),
            columns=replace(columns, named=columns.shared),
        )
        head_tokens = merge_ranks(exchange, scores, tokens).cpu()
    head_traffic = exchange.calls, exchange.bytes_sent
    # Qwen's two paddings of one vocabulary, as vLLM splits them; each column is its token.
    wanted, own = (
        [(r * width // world, (r + 1) * width // world) for r in range(world)]
        for width in job["real_widths"]
    )
    columns = torch.arange(*own[rank], device=DEVICE).float().expand(2, -1)
    exchange.calls = exchange.bytes_sent = 0
    moved = realign_columns(columns, own, wanted, exchange)
    real = (wanted[rank], moved.cpu(), exchange.calls, exchange.bytes_sent)
    torch.save(
        {
            "results": results,
            "real_widths": real,
            "logprobs": [tensor.cpu() for tensor in logprobs],
            "logprob_traffic": logprob_traffic,
            "heads": (head_tokens, *head_traffic),
            "realign": (realign_calls, realign_bytes),
        },
        folder / f"rank{rank}.pt",
    )
    dist.destroy_process_group()


main()
