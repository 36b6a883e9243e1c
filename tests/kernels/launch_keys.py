"""Counts the kernels that Triton would compile at start-up, and those that serving would add.

Runs without the interpreter and without a GPU, on tensors that have no memory: Triton hands each
key that it does not know to `jit_cache_hook`, which here takes note of it and compiles nothing.
"""

import json
import sys
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[2] / "scripts")]

from kernel_bench import resources  # noqa: E402

resources._prepare()

import torch  # noqa: E402
import triton  # noqa: E402

from proxy_vllm.composite.heads import FusedHeads, MemberLogits  # noqa: E402
from proxy_vllm.kernels.columns import Columns  # noqa: E402
from proxy_vllm.kernels.combine_sample import find_base_max, proxy_combine  # noqa: E402
from proxy_vllm.kernels.row_parameters import Plausibility, Steering  # noqa: E402
from proxy_vllm.worker.model_runner import ProxyModelRunner  # noqa: E402
from proxy_vllm.worker.row_buffers import RowBuffers  # noqa: E402
from proxy_vllm.worker.sampler import ProxySampler  # noqa: E402

META = torch.device("meta")
WIDTHS = (4096, 2048, 2048)
MAX_REQS = 256
FUSED = 64
FILTERS = ("top_k", "top_p", "min_p", "log_beta")


class Model:
    """What the runner asks of the composite, in bfloat16; vLLM's heads pad their logits' rows."""

    packed_width, hidden_dtype = sum(WIDTHS) + 16, torch.bfloat16
    sharded_heads = None
    proxy_config = SimpleNamespace(fused_head_max_batch=FUSED)

    def __init__(self, vocab: int, named: int) -> None:
        self.vocab_size, self.padded = vocab, -(-vocab // 64) * 64
        self.columns = Columns(0, vocab, named, named)
        self.fused_heads = FusedHeads.__new__(FusedHeads)
        self.fused_heads.weights = [empty(vocab, d, dtype=torch.bfloat16) for d in WIDTHS]
        self.fused_heads.columns, self.fused_heads.exchange = self.columns, None
        self.fused_heads.soft_caps, self.fused_heads.scales = [None] * 3, [1.0] * 3

    def unpack(self, packed):
        alpha, log_beta, drop = (empty(packed.shape[0]) for _ in range(3))
        steering = Steering(alpha, Plausibility(log_beta, drop))
        return list(packed[:, : sum(WIDTHS)].split(WIDTHS, 1)), steering

    def logits_for_sampling(self, hidden):
        rows = hidden[0].shape[0]
        members = [empty(rows, self.padded, dtype=torch.bfloat16) for _ in range(3)]
        return MemberLogits([m[:, : self.vocab_size] for m in members], self.columns, False)

    def combine(self, logits, steering, rows=None, masked=True):
        if rows is not None:
            logits, steering = logits.select(rows), steering.select(rows)
        members, alpha, columns = logits.members, steering.alpha, logits.columns
        log_beta, drop = steering.plausibility.log_beta, steering.plausibility.drop
        base_max = empty(len(alpha), 1)
        if masked:
            parts = find_base_max(*members, alpha, log_beta, columns)
            base_max = parts.amax(dim=1, keepdim=True)
        return proxy_combine(
            *members, alpha, columns=columns, log_beta=log_beta, drop=drop, base_max=base_max
        )


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def runner_of(model: Model) -> ProxyModelRunner:
    sampler = ProxySampler.__new__(ProxySampler)
    sampler.use_fp64_gumbel, sampler.exchange, sampler.fusable = False, None, True
    sampler.row_buffers = RowBuffers(MAX_REQS, META)
    runner = ProxyModelRunner.__new__(ProxyModelRunner)
    runner.model, runner.sampler, runner.device = model, sampler, META
    runner.max_num_reqs, runner.decode_query_len = MAX_REQS, 1
    return runner


def serve(
    runner: ProxyModelRunner, rows: int, filters: frozenset[str], special: int, alone: bool = False
) -> None:
    """One step of the runner: some rows are special and need their distribution.

    ``alone``: and some ask for one member by itself.
    """
    model, sampler = runner.model, runner.sampler
    hidden, steering = model.unpack(empty(rows, model.packed_width, dtype=torch.bfloat16))
    parameters = sampler.row_buffers.rows(steering, filters)
    if not special and not alone:
        runner.draw(hidden, parameters)
        return
    logits = model.logits_for_sampling(hidden)
    if alone:
        logits, steering = logits.with_members_alone(steering, empty(3, dtype=torch.int64))
    if special < rows:
        sampler.draw(logits, parameters)
        if not special:
            return
        index = empty(special, dtype=torch.int64)
        model.combine(logits, steering, index, parameters.masked)
    else:
        model.combine(logits, steering)


def main() -> None:
    seen: set[str] = set()

    def note(**given) -> bool:
        seen.add(f"{given['fn'].name}|{given['key']}")
        return True

    resources.compile_only({})
    triton.knobs.runtime.jit_cache_hook = note
    mixes = [frozenset(m) for m in chain(*(combinations(FILTERS, n) for n in range(5)))]
    batches = [*range(1, 40), 63, 64, 65, 100, 127, 128, 255, 256]
    results = []
    # Llama 3, Qwen 2.5 with its padding, and a vocabulary that nothing divides.
    for vocab, named in ((128256, 128256), (152064, 151665), (50257, 50257)):
        seen.clear()
        runner = runner_of(Model(vocab, named))
        runner.warm_up_sampler()
        warm = len(seen)
        for rows in batches:
            for mix in mixes:
                for special in {0, 1, rows // 2, rows}:
                    serve(runner, rows, mix, special)
                    if len(mix) in (0, len(FILTERS)):
                        serve(runner, rows, mix, special, alone=True)
        names = sorted(key.split("|")[0] for key in seen)
        results.append({"vocab": vocab, "warm": warm, "added": len(seen) - warm, "names": names})
    print(json.dumps(results))


main()
