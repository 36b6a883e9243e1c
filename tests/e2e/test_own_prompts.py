"""Each model its own prompt: token-exact against three separate models, whatever the scheduler does.

Own prompts need Model Runner V2; on the V1 runner only the refusal is tested.
"""

import random
from typing import Any

import pytest
import torch
from conftest import RUNNER
from engines import SMALL, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy

BLOCK = SMALL["block_size"]
KEYS = {"expert": "proxy_expert_prompt", "antiexpert": "proxy_antiexpert_prompt"}

v2 = pytest.mark.skipif(RUNNER != "v2", reason="own prompts need Model Runner V2")


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


def prompts_of(lengths: tuple[int | None, ...], seed: int) -> Any:
    """Random prompts: a list of ids where only the base has a length, else one for each role."""
    ids = prompt_ids([n or 1 for n in lengths], seed=seed)
    prompt = {r: p for r, n, p in zip(("base", "expert", "antiexpert"), lengths, ids) if n}
    return prompt if len(prompt) > 1 else prompt["base"]


def params_of(prompt: Any, max_tokens: int, alpha: float, **kwargs: Any) -> Any:
    params = greedy_params(max_tokens, proxy_alpha=alpha, **kwargs)
    if isinstance(prompt, dict):
        params.extra_args |= {KEYS[role]: ids for role, ids in prompt.items() if role != "base"}
    return params


def base_of(prompt: Any) -> list[int]:
    return prompt["base"] if isinstance(prompt, dict) else prompt


def check(llm, reference, prompts, alphas=None, max_tokens=12) -> list[Any]:
    """Generate greedily in one batch, and compare every token with the loop."""
    alphas = alphas or [1.0] * len(prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": base_of(p)} for p in prompts],
        [params_of(p, max_tokens, a) for p, a in zip(prompts, alphas, strict=True)],
        use_tqdm=False,
    )
    for prompt, alpha, output in zip(prompts, alphas, outputs, strict=True):
        want, _ = greedy(reference, prompt, max_tokens, alpha)
        lengths = {r: len(p) for r, p in prompt.items()} if isinstance(prompt, dict) else None
        assert list(output.outputs[0].token_ids) == want, (lengths, len(base_of(prompt)), alpha)
        assert output.prompt_token_ids == base_of(prompt)
    return outputs


LENGTHS = [
    (40, 41, None),
    (40, 39, None),
    (40, 40, None),
    (33, 33 + 3 * BLOCK, None),
    (33 + 3 * BLOCK, 33, None),
    (1, 64, None),
    (64, 1, None),
    (31, 32, 33),
    (32, 33, 31),
    (33, 31, 32),
    (1, 2, 130),
    (130, 2, 1),
    (64, 96, 32),
    (20, None, 70),
]


@v2
@pytest.mark.parametrize("budget", [96, 32, 7])
def test_every_mix_of_lengths(trio, reference, budget):
    """Chunks larger and smaller than the differences; caching on, so blocks are also reused."""
    alphas = [1.0, 0.5, -1.0, 0.0, 2.0]
    with running(**trio, max_num_batched_tokens=max(budget, 8), max_num_seqs=8 if budget > 8 else 2) as llm:
        for i in range(0, len(LENGTHS), 7):
            group = LENGTHS[i : i + 7]
            prompts = [prompts_of(n, seed=100 + i + j) for j, n in enumerate(group)]
            prompts.insert(3, prompts_of((45, None, None), seed=200 + i))
            mixed = [alphas[(i + j) % 5] for j in range(len(prompts))]
            check(llm, reference, prompts, mixed)
            check(llm, reference, prompts, mixed[::-1])
