"""Sampling from fixed addresses, with a stand-in for CUDA graphs that spoils everything else."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from engines import running
from sampled_reference import PROMPTS, TOKENS, expected_tokens, generate, params, tokens_of

pytestmark = pytest.mark.skipif(
    os.environ.get("PROXY_VLLM_CPU_RUNNER", "v1") != "v2" or torch.cuda.is_available(),
    reason="stands in for CUDA graphs in the interpreter; test_gpu.py has the real ones",
)


@pytest.fixture(scope="module")
def expected(trio) -> list[list[int]]:
    return expected_tokens(trio)


def spoil(tensor: torch.Tensor) -> None:
    """A value that cannot go unnoticed, and that no kernel dies of."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 3)


class StandIn:
    """Records work as a CUDA graph does, as far as a CPU can tell.

    Replayed work finds every parameter outside of its own buffers spoiled, and its output too;
    afterwards its inputs are spoiled, so that each step has to write all of them.
    """

    def __init__(self, runner) -> None:
        self.runner = runner
        self.replayed: Counter[tuple[int, bool]] = Counter()

    @contextmanager
    def spoiled(self) -> Iterator[None]:
        sampler = self.runner.sampler
        states = sampler.sampling_states
        live = [states.temperature, states.seeds, states.top_k, states.top_p, states.min_p]
        tensors = [buffer.cpu for state in live for buffer in state.pool._uva_bufs]
        tensors.append(self.runner.input_buffers.positions)
        saved = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            spoil(tensor)
        yield
        for tensor, value in zip(tensors, saved):
            tensor.copy_(value)

    def record(self, work):
        work()

        def replay() -> None:
            graphs = self.runner.sampler_graphs
            self.replayed[work.args] += 1
            graphs.tokens.fill_(-7)
            with self.spoiled():
                work()
            for tensor in (graphs.hidden, *self.runner.sampler.row_buffers.vectors.values()):
                spoil(tensor)

        return replay


def capture(worker) -> StandIn:
    stand_in = StandIn(worker.model_runner)
    worker.model_runner.capture_sampler([1, 2, 4, 99], stand_in.record)
    return stand_in


def test_every_replayed_token_is_the_references(trio, expected):
    """Batches that shrink from one too large to the smallest, with filters and without."""
    with running(**trio, fused_head_max_batch=2) as llm:
        # A step of the model comes before any capture; a CPU engine has no warm-up that runs one.
        assert tokens_of(generate(llm, [0], max_tokens=1)) == [expected[0][:1]]
        (stand_in,) = llm.collective_rpc(capture)
        # Row i gives TOKENS - i tokens: batches of 7 rows down to one, padded to 4, 2 and 1.
        lengths = [TOKENS - row for row in range(7)]
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        sampling = [params(row, max_tokens=n) for row, n in enumerate(lengths)]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        assert tokens_of(outputs) == [e[:n] for e, n in zip(expected, lengths)]
        seen = stand_in.replayed
        assert seen[4, True] and seen[1, False]
        assert not seen[1, True]

        before = Counter(seen)
        assert tokens_of(generate(llm, [0, 1, 0])) == [expected[i] for i in (0, 1, 0)]
        assert seen[4, False] > before[4, False]

        # Rows that need their whole distribution: no replay.
        before = Counter(seen)
        assert tokens_of(generate(llm, [0, 1], logprobs=1)) == expected[:2]
        assert seen == before
