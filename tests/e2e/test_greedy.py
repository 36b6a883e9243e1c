"""Greedy float32 output is token-exact against the three-model Transformers loop."""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model

PROMPTS = prompt_ids([3, 17, 40, 70, 100])
ALPHAS = [1.0, 0.0, 0.5, -1.5, None]


def check(llm, trio, prompts=PROMPTS, alphas=ALPHAS, max_tokens=16, dtype=torch.float32):
    """Generate with a different alpha for each prompt and compare with the loop."""
    reference = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], dtype)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        [greedy_params(max_tokens, proxy_alpha=a) for a in alphas],
        use_tqdm=False,
    )
    for prompt, alpha, output in zip(prompts, alphas, outputs):
        want, _ = greedy(reference, prompt, max_tokens, 1.0 if alpha is None else alpha)
        assert list(output.outputs[0].token_ids) == want, f"alpha {alpha}"


def test_mixed_alphas_in_one_batch(trio):
    with running(**trio) as llm:
        check(llm, trio)


ARCHITECTURES = {
    "qwen2 base, llama small": ({"arch": "qwen2", "heads": 2, "kv_heads": 1}, {}),
    "gpt2 base, tied; opt small": ({"arch": "gpt2", "tied": True}, {"arch": "opt", "tied": True}),
    "llama base tied, qwen2 small with 4 heads": (
        {"tied": True},
        {"arch": "qwen2", "hidden": 128, "heads": 4, "kv_heads": 2},
    ),
}


@pytest.mark.parametrize("base_args, small_args", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_members_of_different_architectures(tmp_path, base_args, small_args):
    small = {"hidden": 64, "heads": 2, "layers": 1, **small_args}
    trio = {
        "model": make_model(tmp_path / "base", seed=1, **base_args),
        "expert": make_model(tmp_path / "expert", seed=2, **small),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, **small),
    }
    with running(**trio) as llm:
        check(llm, trio)
