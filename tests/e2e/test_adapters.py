"""Experts as LoRA adapters, a mix of them in one batch, against loops with merged experts."""

from typing import Any

import pytest
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_adapters import ATTENTION, make_adapter, merge
from tiny_models import make_model

PROMPTS = prompt_ids([7, 30, 75, 12], seed=81)
STEPS = 12

# Adapter, prompt, alpha.
Case = tuple[str | None, int, float]


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


def ask(llm, cases: list[Case]) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": PROMPTS[prompt]} for _, prompt, _ in cases],
        [greedy_params(STEPS, proxy_alpha=alpha) for *_, alpha in cases],
        lora_request=[llm.adapters.get(name) for name, *_ in cases],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


CASES: list[Case] = [
    (None, 0, 3.0),
    ("safety", 0, 1.0),
    ("code", 0, 1.0),
    ("terse", 1, 0.5),
    ("safety", 2, -1.5),
    (None, 2, 1.0),
    ("code", 1, 0.5),
    ("code", 3, 0.0),
]


def test_any_mix_of_adapters_and_alphas(small, truth):
    """Two slots for three adapters, so that they also change places; prompts in chunks."""
    with running(
        model=small["base"],
        antiexpert=small["plain"],
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=3,
        lora_modules=small["adapters"],
    ) as llm:
        want = [truth(*case) for case in CASES]
        assert len({tuple(tokens) for tokens in want}) == len(CASES)
        assert ask(llm, CASES) == want
        # Again, from the prefix cache, which must keep adapters apart.
        assert ask(llm, CASES[::-1]) == want[::-1]


def test_adapters_of_another_expert_and_drafts(small, tmp_path):
    """With an expert of its own, a request without an adapter is steered by that one.

    All slots are taken here, and vLLM's products on a CPU would give such rows the last one's.
    """
    import torch

    expert = make_model(tmp_path / "expert", seed=4, heads=2, kv_heads=1, layers=2)
    experts = {name: merge(tmp_path / name, expert, a) for name, a in small["adapters"].items()}
    trios = {
        name: Trio.load(small["base"], folder, small["plain"], torch.float32)
        for name, folder in ((None, expert), *experts.items())
    }
    cases: list[Case] = [("safety", 0, 1.0), (None, 0, 1.0), ("code", 1, 0.5), (None, 2, -1.0)]
    with running(
        model=small["base"],
        expert=expert,
        antiexpert=small["plain"],
        enable_lora=True,
        max_loras=2,
        speculative_tokens=2,
        lora_modules={name: small["adapters"][name] for name in ("safety", "code")},
    ) as llm:
        got = ask(llm, cases)
    for tokens, (name, prompt, alpha) in zip(got, cases, strict=True):
        assert tokens == greedy(trios[name], PROMPTS[prompt], STEPS, alpha)[0], name


def test_drafts_are_those_of_the_requests_adapter(small):
    """Where base and antiexpert are one model, alpha 1 is the expert alone: every draft holds."""
    with running(
        model=small["plain"],
        antiexpert=small["plain"],
        enable_lora=True,
        max_loras=2,
        speculative_tokens=3,
        disable_log_stats=False,
        lora_modules={name: small["adapters"][name] for name in ("safety", "code")},
    ) as llm:
        ask(llm, [("safety", 0, 1.0), ("code", 1, 1.0), ("safety", 2, 1.0), ("code", 3, 1.0)])
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    # The last draft of an answer may come too late to be taken.
    assert counts["vllm:spec_decode_num_accepted_tokens"] >= 0.9 * drafted > 0
