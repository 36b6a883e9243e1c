"""CUDA graphs on a GPU: three models replayed as one, whole in decodes and in pieces in prefills.

Greedy float32 against the Transformers loop, and bfloat16 with FlashAttention, whose builders keep
buffers of their own, within what rounding can move. Prompts of each model's own are asked under
graphs in test_own_prompts.py.
"""

import pytest
import torch
from bench_common import compare_with_loop
from engines import GRAPHS, counted_graphs, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from test_own_prompts import LENGTHS, base_of, params_of, prompts_of
from tiny_models import make_model

pytestmark = pytest.mark.gpu

TOKENS = 12


@pytest.mark.parametrize("own_prompts", [False, True])
def test_members_with_fewer_tokens_than_the_base(tmp_path, own_prompts):
    """Prompts hold tokens that the small members lack; every length meets another graph."""
    small = {"heads": 2, "kv_heads": 1, "layers": 1}
    trio = {
        "model": make_model(tmp_path / "base", seed=1, vocab=111),
        "expert": make_model(tmp_path / "expert", seed=2, vocab=90, **small),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, vocab=101, **small),
    }
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    prompts = prompt_ids([1, 3, 9, 17, 40, 64, 70, 130], seed=800)
    alphas = [1.0, 0.5, -1.0, 0.0, 2.0, 1.0, 1.0, 0.5]
    with running(**trio, **GRAPHS, own_prompts=own_prompts) as llm, counted_graphs() as graphs:
        for _ in range(2):
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts],
                [greedy_params(TOKENS, proxy_alpha=a) for a in alphas],
                use_tqdm=False,
            )
            for prompt, alpha, output in zip(prompts, alphas, outputs, strict=True):
                want, _ = greedy(models, prompt, TOKENS, alpha)
                assert list(output.outputs[0].token_ids) == want, (len(prompt), alpha)
    assert graphs["whole"] and graphs["piecewise"]


@pytest.mark.parametrize("own_prompts", [False, True])
def test_flash_attention(trio, own_prompts):
    """One builder a model, each with the lengths of its own sequences."""
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    lengths = LENGTHS if own_prompts else [(n, None, None) for n in (1, 9, 33, 64, 130)]
    prompts = [prompts_of(n, seed=820 + i) for i, n in enumerate(lengths)]
    alphas = [(1.0, 0.5, -1.0)[i % 3] for i in range(len(prompts))]
    with (
        running(
            **trio,
            **GRAPHS,
            dtype="bfloat16",
            own_prompts=own_prompts,
            attention_backend="FLASH_ATTN",
        ) as llm,
        counted_graphs() as graphs,
    ):
        outputs = llm.generate(
            [{"prompt_token_ids": base_of(p)} for p in prompts],
            [params_of(p, TOKENS, a) for p, a in zip(prompts, alphas, strict=True)],
            use_tqdm=False,
        )
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    compared = compare_with_loop(models, prompts, tokens, "bfloat16", alphas)
    assert compared["passed"] and compared["tokens"] == TOKENS * len(prompts), compared
    assert graphs["whole"] and graphs["piecewise"]
