"""Other formulas through an engine, and what the base finds implausible, against a plain loop."""

import math

import pytest
import torch
from engines import prompt_ids, running
from reference_loop import Trio, answer_logits, greedy
from tiny_models import make_methods_models, make_model
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

STEPS = 12
PROMPTS = prompt_ids([3, 70, 33, 12, 20, 9], seed=91)
ALPHAS = [0.5, 0.5, 0.0, -1.5, 2.0, 1.0]
BETAS = [0.1, None, 0.3, 0.0, 1.0, 0.02]


def masked(base: torch.Tensor, combined: torch.Tensor, beta: float) -> torch.Tensor:
    """Combined logits [V] without tokens that the base gives less than beta times its largest."""
    p = base.float().softmax(-1)
    drawable = combined > -math.inf
    return combined.masked_fill(p < beta * p[drawable].max() * (1 - 1e-7), -math.inf)


@torch.inference_mode()
def loop(trio: Trio, prompt: list[int], steps: int, alpha: float, beta: float):
    """Greedy tokens, and the logits [V] that each was taken from."""
    tokens, rows = [], []
    for _ in range(steps):
        ids = torch.tensor([[*prompt, *tokens]])
        members = [model(ids).logits[0, -1] for model in trio.models()]
        combined = trio.combine(*members, alpha)
        if alpha:
            combined = masked(members[0], combined, beta)
        rows.append(combined)
        tokens.append(int(combined.argmax()))
    return tokens, rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_methods_models(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def contrastive(folders) -> Trio:
    base = folders["base"]
    return Trio.load(base, base, folders["amateur"], torch.float32)


@pytest.fixture(scope="module")
def llm(folders):
    with running(
        model=folders["base"], method="contrastive", antiexpert=folders["amateur"]
    ) as engine:
        yield engine


def params_of(alpha: float, beta: float | None, **fields) -> SamplingParams:
    extra = {"proxy_alpha": alpha} | ({} if beta is None else {"proxy_beta": beta})
    fields = {"temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True, **fields}
    return SamplingParams(extra_args=extra, **fields)


def test_contrastive_decoding_in_a_mixed_batch(llm, contrastive):
    """Alone, with log-probabilities, and a second time from the prefix cache."""
    wanted = [
        loop(contrastive, prompt, STEPS, alpha, 0.1 if beta is None else beta)
        for prompt, alpha, beta in zip(PROMPTS, ALPHAS, BETAS)
    ]
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    for logprobs in (None, 3):
        params = [params_of(a, b, logprobs=logprobs) for a, b in zip(ALPHAS, BETAS)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for output, (tokens, rows) in zip(outputs, wanted, strict=True):
            assert list(output.outputs[0].token_ids) == tokens
            for row, entries in zip(rows, output.outputs[0].logprobs or ()):
                scores = row.log_softmax(-1)
                for token, entry in entries.items():
                    assert entry.logprob == pytest.approx(float(scores[token]), abs=2e-4)
    assert outputs[1].num_cached_tokens > 0
    plain = [greedy(contrastive, p, STEPS, a)[0] for p, a in zip(PROMPTS, ALPHAS)]
    assert sum(tokens != own for (tokens, _), own in zip(wanted, plain)) >= 1  # the mask matters
    # Alpha 0 is the base, whatever beta.
    assert wanted[2][0] == plain[2]


def test_drawn_tokens_are_plausible(llm, contrastive):
    prompts = [{"prompt_token_ids": p} for p in PROMPTS[:3]]
    params = [
        params_of(0.5, 0.2, temperature=1.5, seed=1),
        params_of(0.5, 0.05, temperature=1.5, seed=2, top_p=0.9),
        params_of(2.0, 0.1, temperature=2.0, seed=3, presence_penalty=0.5),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, prompt, beta in zip(outputs, PROMPTS, (0.2, 0.05, 0.1)):
        tokens = list(output.outputs[0].token_ids)
        base = answer_logits(contrastive, prompt, tokens, 0.0).softmax(-1)
        combined = answer_logits(contrastive, prompt, tokens, 0.5)
        for token, p, row in zip(tokens, base, combined):
            assert p[token] >= beta * p[row > -math.inf].max() * 0.999


def test_constraints_of_a_request_come_first(llm, contrastive):
    """What is allowed may all be implausible; it is then drawn by the formula."""
    allowed = [7, 9]
    choice = StructuredOutputsParams(choice=[f"w{token}" for token in allowed])
    outputs = llm.generate(
        [{"prompt_token_ids": PROMPTS[0]}] * 2,
        [
            params_of(0.5, 1.0, allowed_token_ids=allowed),
            params_of(0.5, 1.0, structured_outputs=choice, ignore_eos=False),
        ],
        use_tqdm=False,
    )
    tokens: list[int] = []
    for _ in range(STEPS):
        row = answer_logits(contrastive, PROMPTS[0], [*tokens, 0], 0.5)[-1]
        tokens.append(max(allowed, key=lambda t: float(row[t])))
    assert list(outputs[0].outputs[0].token_ids) == tokens
    assert outputs[1].outputs[0].text.strip() == f"w{tokens[0]}"


def test_drafts_and_dera(folders):
    """DeRa with a threshold: its aligned model drafts, and the base stands for the antiexpert."""
    base = folders["base"]
    trio = Trio.load(base, folders["aligned"], base, torch.float32)
    with running(
        model=base, method="dera", expert=folders["aligned"], beta=0.1, speculative_tokens=3
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in PROMPTS],
            [params_of(a, b) for a, b in zip(ALPHAS, BETAS)],
            use_tqdm=False,
        )
    for output, prompt, alpha, beta in zip(outputs, PROMPTS, ALPHAS, BETAS):
        tokens, _ = loop(trio, prompt, STEPS, alpha, 0.1 if beta is None else beta)
        assert list(output.outputs[0].token_ids) == tokens


@pytest.mark.slow
def test_two_ranks(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    amateur = make_model(tmp_path / "two", seed=2, vocab=131, tokenizer_size=105)
    trio = Trio.load(folders["base"], folders["base"], amateur, torch.float32)
    with running(
        model=folders["base"], method="contrastive", antiexpert=amateur, tensor_parallel_size=2
    ) as llm:
        for logprobs in (None, 2):
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in PROMPTS],
                [params_of(a, b, logprobs=logprobs) for a, b in zip(ALPHAS, BETAS)],
                use_tqdm=False,
            )
            for output, prompt, alpha, beta in zip(outputs, PROMPTS, ALPHAS, BETAS):
                tokens, _ = loop(trio, prompt, STEPS, alpha, 0.1 if beta is None else beta)
                assert list(output.outputs[0].token_ids) == tokens
