"""A small member that is the base: loaded, run and cached once, token for token as three models."""

import os
from pathlib import Path

import pytest
import torch
from engines import V2, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy, prompt_logits
from tiny_models import make_model

STEPS = 12
ALPHAS = [1.0, 0.0, -0.5, 0.3]
PROMPTS = prompt_ids([3, 70, 33, 12], seed=81)
# Which member is the base, under which formula it is known.
CONTRASTIVE = {"expert": "base", "antiexpert": "small"}
DERA = {"expert": "other", "antiexpert": "base"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("same")
    made = {
        "model": make_model(root / "base", seed=1, tokenizer_size=105, unnamed=[50, 51]),
        "small": make_model(root / "small", seed=2, heads=1, hidden=32, layers=1, vocab=128),
        "other": make_model(root / "other", seed=3),
    }
    os.symlink(made["model"], root / "link", target_is_directory=True)
    return {**made, "base": str(root / "link")}


def held(model) -> tuple[dict[str, int], set[str]]:
    """Bytes of weights by member, and the members that have layers with a cache."""
    layers = model.vllm_config.compilation_config.static_forward_context
    return dict(model.member_weight_bytes), {name.split(".")[0] for name in layers}


def check(llm, trio: Trio, alphas=ALPHAS) -> None:
    """Greedy tokens, log-probabilities, and a second time from the prefix cache."""
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    for round in range(2):
        params = [greedy_params(STEPS, proxy_alpha=a, logprobs=2 * round or None) for a in alphas]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for output, prompt, alpha in zip(outputs, PROMPTS, alphas, strict=True):
            tokens, steps = greedy(trio, prompt, STEPS, alpha)
            assert list(output.outputs[0].token_ids) == tokens
            for logits, entries in zip(steps, output.outputs[0].logprobs or ()):
                row = logits.log_softmax(-1)
                for token, entry in entries.items():
                    assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
    assert outputs[1].num_cached_tokens > 0


@pytest.mark.parametrize(
    "case, drafts",
    [(CONTRASTIVE, None), (CONTRASTIVE, 3), (DERA, 3)],
    ids=["contrastive decoding", "drafts of its antiexpert", "DeRa with drafts of its expert"],
)
def test_the_base_is_held_once(folders, case, drafts):
    members = {role: folders[name] for role, name in case.items()}
    same = next(role for role, name in case.items() if name == "base")
    trio = Trio.load(folders["model"], **members, dtype=torch.float32)
    with running(model=folders["model"], **members, speculative_tokens=drafts) as llm:
        ((weights, layers),) = llm.apply_model(held)
        assert same not in weights and same not in layers and len(weights) == 2
        check(llm, trio)
        (output,) = llm.generate(
            {"prompt_token_ids": PROMPTS[2]},
            greedy_params(1, proxy_alpha=0.7, prompt_logprobs=0),
            use_tqdm=False,
        )
        rows = prompt_logits(trio, PROMPTS[2], 0.7).log_softmax(-1)
        for token, row, entries in zip(PROMPTS[2][1:], rows, output.prompt_logprobs[1:]):
            assert entries[token].logprob == pytest.approx(float(row[token]), abs=2e-4)


@pytest.mark.slow
def test_two_ranks(folders, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    members = {role: folders[name] for role, name in CONTRASTIVE.items()}
    members["antiexpert"] = make_model(Path(folders["model"]).parent / "two", seed=2, vocab=128)
    trio = Trio.load(folders["model"], **members, dtype=torch.float32)
    with running(model=folders["model"], **members, tensor_parallel_size=2) as llm:
        check(llm, trio)


@pytest.mark.skipif(not V2, reason="prompts of each model's own need Model Runner V2")
def test_weights_are_shared_where_prompts_differ(folders):
    """The base's weights, with a pass and a cache of its own for the other prompt."""
    members = {role: folders[name] for role, name in CONTRASTIVE.items()}
    trio = Trio.load(folders["model"], **members, dtype=torch.float32)
    others = prompt_ids([40, 5, 50, 12], seed=82)
    prompts = [{"base": b, "expert": e} for b, e in zip(PROMPTS, others)]
    with running(model=folders["model"], **members, own_prompts=True) as llm:
        ((weights, layers),) = llm.apply_model(held)
        assert "expert" not in weights and layers == {"base", "expert", "antiexpert"}
        params = [greedy_params(STEPS, proxy_alpha=a) for a in ALPHAS]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for output, prompt, alpha in zip(outputs, prompts, ALPHAS, strict=True):
            assert list(output.outputs[0].token_ids) == greedy(trio, prompt, STEPS, alpha)[0]
