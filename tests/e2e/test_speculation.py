"""Drafting with the expert changes how many steps an answer takes, and nothing else."""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model

K = 3
STEPS = 16
PROMPTS = prompt_ids([4, 30, 90], seed=41)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Base and antiexpert are one model: at alpha 1 every draft is right, at alpha 0 few are."""
    root = tmp_path_factory.mktemp("speculation")
    base = make_model(root / "base", seed=1)
    expert = make_model(root / "expert", seed=2, hidden=32, heads=1, layers=1)
    return {"model": base, "expert": expert, "antiexpert": base}


@pytest.fixture(scope="module")
def reference(folders) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def llm(folders):
    with running(
        **folders, speculative_tokens=K, disable_log_stats=False, max_num_batched_tokens=96
    ) as engine:
        yield engine


def counters(llm) -> dict[str, int]:
    return {
        m.name.removeprefix("vllm:spec_decode_num_"): m.value
        for m in llm.get_metrics()
        if m.name.startswith("vllm:spec_decode_num_") and hasattr(m, "value")
    }


def run(llm, alphas, **fields):
    """Outputs, and by how much each counter of speculation grew."""
    before = counters(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in PROMPTS],
        [greedy_params(STEPS, proxy_alpha=a, **fields) for a in alphas],
        use_tqdm=False,
    )
    after = counters(llm)
    return outputs, {name: after[name] - before[name] for name in after}


def test_greedy_output_is_that_of_the_loop(llm, reference):
    """Own alpha of each request, in rows of drafts too."""
    alphas = [0.5, 1.0, -1.0]
    outputs, grown = run(llm, alphas)
    for output, prompt, alpha in zip(outputs, PROMPTS, alphas):
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, STEPS, alpha)[0]
    assert 0 < grown["accepted_tokens"] < grown["draft_tokens"]


def test_drafts_are_taken_where_the_expert_is_right(llm, reference):
    """With alpha 1 the combination is the expert, so a step yields K tokens more than one."""
    outputs, grown = run(llm, [1.0] * 3)
    for output, prompt in zip(outputs, PROMPTS):
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, STEPS, 1.0)[0]
    assert grown["accepted_tokens"] == grown["draft_tokens"] == K * grown["drafts"]
    assert grown["drafts"] <= len(PROMPTS) * -(-STEPS // (K + 1))
    _, base = run(llm, [0.0] * 3)
    assert base["accepted_tokens"] < base["draft_tokens"] / 2


def test_logprobs_of_accepted_tokens(llm, reference):
    alphas = [0.5, 1.0, -1.0]
    outputs, _ = run(llm, alphas, logprobs=2)
    for output, prompt, alpha in zip(outputs, PROMPTS, alphas):
        tokens, steps = greedy(reference, prompt, STEPS, alpha)
        assert list(output.outputs[0].token_ids) == tokens
        for token, logits, got in zip(tokens, steps, output.outputs[0].logprobs, strict=True):
            assert got[token].logprob == pytest.approx(
                float(logits.log_softmax(-1)[token]), abs=2e-4
            )
