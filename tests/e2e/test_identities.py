"""Exact identities of the formula, against plain ``vllm.LLM`` on one member alone.

alpha 0, or expert == antiexpert      the base
base == antiexpert and alpha 1        the expert
"""

from dataclasses import dataclass
from typing import Any

import pytest
from engines import greedy_params, prompt_ids, running
from tiny_models import make_model

PROMPTS = prompt_ids([11, 40, 90], seed=31)
STEPS = 12


@dataclass
class Answers:
    """Of each prompt: greedy tokens, their log-probabilities, and tokens sampled with a seed."""

    greedy: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    seeded: list[list[int]]


def ask(llm: Any, alpha: float | None) -> Answers:
    from vllm import SamplingParams

    extra = {} if alpha is None else {"extra_args": {"proxy_alpha": alpha}}
    seeds = range(len(PROMPTS))
    params = [
        *(greedy_params(STEPS, proxy_alpha=alpha, logprobs=3) for _ in PROMPTS),
        *(
            SamplingParams(temperature=0.9, seed=s, max_tokens=STEPS, ignore_eos=True, **extra)
            for s in seeds
        ),
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS * 2], params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [{token: e.logprob for token, e in entry.items()} for entry in output.outputs[0].logprobs]
        for output in outputs[: len(PROMPTS)]
    ]
    return Answers(tokens[: len(PROMPTS)], logprobs, tokens[len(PROMPTS) :])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("identities")
    return {
        "base": make_model(root / "base", seed=1),
        "expert": make_model(root / "expert", seed=2, hidden=32, heads=1, layers=1),
    }


@pytest.fixture(scope="module")
def alone(folders) -> dict[str, Answers]:
    """What vLLM itself answers with each member."""
    from vllm import LLM

    answers = {}
    for role, folder in folders.items():
        with running(LLM, model=folder) as llm:
            answers[role] = ask(llm, None)
    assert answers["base"].greedy != answers["expert"].greedy
    return answers


def check(got: Answers, want: Answers, tolerance: float) -> None:
    assert got.greedy == want.greedy
    assert got.seeded == want.seeded
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        for entry, other in zip(ours, theirs, strict=True):
            assert entry == pytest.approx(other, abs=tolerance)


def test_expert_equal_to_antiexpert_is_the_base(folders, alone):
    small = folders["expert"]
    with running(model=folders["base"], expert=small, antiexpert=small) as llm:
        for alpha in (1.0, -3.0, 0.0):
            check(ask(llm, alpha), alone["base"], 0.0)


def test_alpha_zero_is_the_base_and_base_equal_to_antiexpert_the_expert(folders, alone):
    with running(
        model=folders["base"], expert=folders["expert"], antiexpert=folders["base"]
    ) as llm:
        check(ask(llm, 0.0), alone["base"], 0.0)
        check(ask(llm, 1.0), alone["expert"], 2e-5)
        halfway = ask(llm, 0.5)
        assert halfway.greedy not in (alone["base"].greedy, alone["expert"].greedy)
