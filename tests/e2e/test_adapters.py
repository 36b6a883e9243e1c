"""Experts as LoRA adapters, a mix of them in one batch, against loops with merged experts."""

from typing import Any

import pytest
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_adapters import ATTENTION, make_adapter, merge
from tiny_models import make_model

PROMPTS = prompt_ids([7, 30, 75, 12], seed=81)
STEPS = 12
ALPHAS = (1.0, 0.5, -1.5)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Any]:
    """Folders of a base, a small model, three adapters of it, and each merged."""
    root = tmp_path_factory.mktemp("adapters")
    base = make_model(root / "base", seed=1)
    plain = make_model(root / "small", seed=3, heads=2, kv_heads=1, layers=2)
    adapters = {
        "safety": make_adapter(root / "safety", plain, seed=1),
        "code": make_adapter(root / "code", plain, seed=2, rank=8, targets=ATTENTION),
        "terse": make_adapter(root / "terse", plain, seed=3, targets=("embed_tokens", "up_proj")),
    }
    merged = {name: merge(root / f"merged-{name}", plain, a) for name, a in adapters.items()}
    return {"base": base, "plain": plain, "adapters": adapters, "merged": merged}


@pytest.fixture(scope="module")
def truth(small):
    """What the loop answers with an adapter's merged model as the expert; None for the base."""
    import torch

    known: dict = {}
    trios = {
        name: Trio.load(small["base"], folder, small["plain"], torch.float32)
        for name, folder in (*small["merged"].items(), (None, small["plain"]))
    }

    def answer(name: str | None, prompt: int, alpha: float) -> list[int]:
        key = (name, prompt, 0.0 if name is None else alpha)
        if key not in known:
            known[key] = greedy(trios[name], PROMPTS[prompt], STEPS, key[2])[0]
        return known[key]

    return answer


def requests_of(small, names: dict[str, int] | None = None) -> dict[str | None, Any]:
    from vllm.lora.request import LoRARequest

    ids = {name: i + 1 for i, name in enumerate(small["adapters"])}
    return {None: None} | {
        name: LoRARequest(name, ids[name], path) for name, path in small["adapters"].items()
    }


def ask(llm, cases: list[tuple[str | None, int, float]], adapters, **params) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": PROMPTS[prompt]} for _, prompt, _ in cases],
        [greedy_params(STEPS, proxy_alpha=alpha, **params) for *_, alpha in cases],
        lora_request=[adapters[name] for name, *_ in cases],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


CASES = [
    (name, prompt, alpha)
    for i, alpha in enumerate(ALPHAS)
    for prompt in range(len(PROMPTS))
    for name in [(None, "safety", "code", "terse")[(i + prompt) % 4]]
] + [(None, 0, 3.0), ("safety", 0, 1.0), ("code", 0, 1.0), ("terse", 0, 1.0)]


def test_any_mix_of_adapters_and_alphas(small, truth):
    """Two slots for three adapters, so that they also change places; chunked prefills."""
    adapters = requests_of(small)
    with running(
        model=small["base"],
        antiexpert=small["plain"],
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=3,
    ) as llm:
        want = [truth(*case) for case in CASES]
        assert len({tuple(tokens) for tokens in want}) > len(PROMPTS) + 6
        assert ask(llm, CASES, adapters) == want
        # Again, from the prefix cache, which must keep adapters apart.
        assert ask(llm, CASES[::-1], adapters) == want[::-1]
