"""A whole engine on a GPU: compiled members, CUDA graphs, and everything that the others test.

In float32 tokens must be exact, so attention is Triton's, which takes float32. Truth is the
Transformers loop with float64 sampling, on the CPU.
"""

import engines
import pytest
import torch
from engines import counted_graphs, greedy_params, running
from reference_loop import Trio, greedy
from sampled_reference import (
    ALPHAS,
    PROMPTS,
    ROWS,
    TOKENS,
    assert_logprobs,
    expected_tokens,
    generate,
    params,
    tokens_of,
)

pytestmark = pytest.mark.gpu
ALL = range(len(ROWS))
GRAPHS = {**engines.GRAPHS, "attention_backend": "TRITON_ATTN"}


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def expected(trio) -> list[list[int]]:
    return expected_tokens(trio)


def every_row(engine, extra_args: dict | None) -> list[list[int]]:
    from vllm import SamplingParams

    common = {"max_tokens": TOKENS, "ignore_eos": True, "extra_args": extra_args}
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = [SamplingParams(**row, **common) for row in ROWS]
    return tokens_of(engine.generate(prompts, sampling, use_tqdm=False))


@pytest.fixture(scope="module")
def tokens_of_the_base(trio) -> list[list[int]]:
    """Of plain vLLM, which must be gone before another engine starts in this process."""
    from vllm import LLM

    with running(LLM, model=trio["model"], **GRAPHS) as engine:
        return every_row(engine, None)


class TestOneEngine:
    """Compiled, in vLLM's CUDA graphs, with none of our options."""

    @pytest.fixture(scope="class")
    def llm(self, trio, tokens_of_the_base):
        with running(**trio, **GRAPHS) as engine:
            yield engine

    def test_greedy_at_several_alphas(self, llm, reference):
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        asked = [greedy_params(16, proxy_alpha=alpha) for alpha in ALPHAS]
        want = [greedy(reference, p, 16, a)[0] for p, a in zip(PROMPTS, ALPHAS)]
        assert tokens_of(llm.generate(prompts, asked, use_tqdm=False)) == want

    def test_every_kind_of_sampling_in_one_batch(self, llm, expected):
        with counted_graphs() as graphs:
            assert tokens_of(generate(llm, ALL)) == expected
        assert graphs["whole"] and graphs["piecewise"]

    def test_rows_alone_draw_as_in_the_batch(self, llm, expected):
        for row in (0, 2, 4):
            assert tokens_of(generate(llm, [row])) == [expected[row]]

    def test_logprobs_beside_top_k_and_top_p(self, llm, expected, reference):
        """vLLM's own filters, which the interpreter cannot run, and raw log-probabilities."""
        outputs = generate(llm, ALL, logprobs=4)
        assert tokens_of(outputs) == expected
        for row, output in zip(ALL, outputs):
            assert_logprobs(reference, row, output, 4, tolerance=1e-3)

    def test_a_grammar_beside_free_rows(self, llm, expected):
        from vllm.sampling_params import StructuredOutputsParams

        choices = ["w5w6w7", "w5w9", "w8w7w7"]
        sampling = [params(row) for row in ALL]
        sampling[3].structured_outputs = StructuredOutputsParams(choice=choices)
        sampling[3].ignore_eos = False
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        assert "".join(outputs[3].outputs[0].text.split()) in choices
        free = [row for row in ALL if row != 3]
        assert [tokens_of(outputs)[row] for row in free] == [expected[row] for row in free]

    def test_alpha_zero_is_the_base_alone(self, llm, tokens_of_the_base):
        assert every_row(llm, {"proxy_alpha": 0.0}) == tokens_of_the_base


def test_sampling_in_graphs(trio, expected):
    """Batches that shrink from one padded to eight down to one, with head weights at the end."""
    with running(**trio, **GRAPHS, sampler_cuda_graphs=True, fused_head_max_batch=2) as engine:
        assert all(engine.collective_rpc(lambda w: w.model_runner.sampler_graphs is not None))
        lengths = [TOKENS - row for row in ALL]
        sampling = [params(row, max_tokens=n) for row, n in zip(ALL, lengths)]
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        assert tokens_of(outputs) == [e[:n] for e, n in zip(expected, lengths)]
        for rows in ([0, 1, 0], [0, 1], [1], [4]):
            assert tokens_of(generate(engine, rows)) == [expected[row] for row in rows]
        # Rows that a graph does not cover, between steps that it does.
        assert tokens_of(generate(engine, [0, 1], logprobs=1)) == expected[:2]


def test_head_weights_without_graphs(trio, expected):
    eager = {**GRAPHS, "enforce_eager": True}
    with running(**trio, **eager, fused_head_max_batch=8) as engine:
        assert tokens_of(generate(engine, [0, 1, 0])) == [expected[row] for row in (0, 1, 0)]
        assert tokens_of(generate(engine, ALL)) == expected


def test_speculation(trio, reference):
    alphas = [1.0, 0.5, 0.0, -1.0]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:4]]
    want = [greedy(reference, p, 16, a)[0] for p, a in zip(PROMPTS, alphas)]
    with running(**trio, **GRAPHS, speculative_tokens=3, max_num_batched_tokens=128) as engine:
        asked = [greedy_params(16, proxy_alpha=alpha) for alpha in alphas]
        assert tokens_of(engine.generate(prompts, asked, use_tqdm=False)) == want


def test_bfloat16_with_the_default_attention(trio, reference):
    from bench_common import compare_with_loop

    bfloat16 = {**engines.GRAPHS, "dtype": "bfloat16", "sampler_cuda_graphs": True}
    with running(**trio, **bfloat16) as engine:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        asked = [greedy_params(16, proxy_alpha=alpha) for alpha in ALPHAS]
        tokens = tokens_of(engine.generate(prompts, asked, use_tqdm=False))
    checked = compare_with_loop(reference, PROMPTS, tokens, "bfloat16", ALPHAS)
    assert checked["passed"], checked
    assert checked["exact"] > checked["tokens"] / 2
