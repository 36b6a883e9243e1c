"""Engines of other kinds on the pretended device: block tables, states, methods, adapters, drafts.

As in `test_engine.py`: tokens are the Transformers loop's, and nothing waits or mixes devices.
"""

import pytest
import torch
from engines import greedy_params, prompt_ids
from families import load, make_family_trio
from reference_loop import Trio, greedy
from sampled_reference import PROMPTS, TOKENS, expected_tokens, params, tokens_of
from tiny_models import make_methods_models

from pretended_device import machine
from pretended_device.test_engine import assert_quiet
from pretended_device.work import watch

STEPS = 6


@pytest.mark.parametrize(
    "base, small, args",
    [
        ("gemma3", "gemma3", {"kv_cache_tables": "one"}),
        ("gemma3", "gemma3", {"kv_cache_tables": "several"}),
        ("gemma3", "gemma3", {"speculative_tokens": 2, "max_num_batched_tokens": 128}),
        ("granite4", "granite4", {}),
        ("granite4", "granite4", {"own_prompts": True}),
        ("deepseek_v3", "deepseek_v3", {}),
    ],
)
def test_families(tmp_path, base, small, args):
    folders = make_family_trio(tmp_path, base, small)
    prompts, alphas = prompt_ids([3, 40, 70]), [1.0, 0.0, -1.5]
    if args.get("own_prompts"):
        own = prompt_ids([9, 70, 1, 40, 3, 33], seed=6)
        prompts = [
            {"base": p, "expert": own[i], "antiexpert": own[3 + i]} for i, p in enumerate(prompts)
        ]
    given = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    asked = [greedy_params(STEPS, proxy_alpha=alpha) for alpha in alphas]
    trio = Trio(*map(load, folders.values()))
    want = [greedy(trio, p, STEPS, alpha)[0] for p, alpha in zip(prompts, alphas)]
    with machine.engine(**folders, **args) as (llm, _):
        for _ in range(2):  # the second time from the prefix cache
            with watch() as seen:
                outputs = llm.generate(given, asked, use_tqdm=False)
            assert tokens_of(outputs) == want
            assert_quiet(seen)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return make_methods_models(tmp_path_factory.mktemp("methods"))


def test_implausible_tokens(models):
    from e2e.test_methods import ALPHAS, BETAS, loop, params_of
    from e2e.test_methods import PROMPTS as OWN

    base = models["base"]
    trio = Trio.load(base, base, models["amateur"], torch.float32)
    want = [
        loop(trio, prompt, 12, alpha, 0.1 if beta is None else beta)[0]
        for prompt, alpha, beta in zip(OWN, ALPHAS, BETAS)
    ]
    prompts = [{"prompt_token_ids": p} for p in OWN]
    members = {"model": base, "method": "contrastive", "antiexpert": models["amateur"]}
    with machine.engine(**members) as (llm, _):
        for logprobs in (None, 3):
            asked = [params_of(a, b, logprobs=logprobs) for a, b in zip(ALPHAS, BETAS)]
            with watch() as seen:
                outputs = llm.generate(prompts, asked, use_tqdm=False)
            assert tokens_of(outputs) == want
            assert_quiet(seen)


def test_guidance(models):
    base = models["base"]
    prompts, negatives = prompt_ids([20, 5, 33], seed=95), prompt_ids([7, 40, 3], seed=96)
    asked = [
        greedy_params(STEPS, extra_args={"guidance_scale": 2.0, "proxy_negative_prompt": negative})
        for negative in negatives
    ]
    want = [
        greedy(Trio.load(*[base] * 3, torch.float32), {"base": p, "antiexpert": n}, STEPS, 1.0)[0]
        for p, n in zip(prompts, negatives)
    ]
    with machine.engine(model=base, method="cfg") as (llm, _), watch() as seen:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
    assert tokens_of(outputs) == want
    assert_quiet(seen)


def test_adapters(tmp_path):
    from tiny_adapters import make_adapted
    from vllm.lora.request import LoRARequest

    small = make_adapted(tmp_path)
    names = ["safety", "code", None, "terse"]
    alphas, prompts = [1.0, 0.5, 1.0, -1.0], prompt_ids([5, 33, 12, 70], seed=3)
    ids = {name: i + 1 for i, name in enumerate(filter(None, names))}
    adapters = [n and LoRARequest(n, ids[n], small["adapters"][n]) for n in names]
    want = [
        greedy(
            Trio.load(
                small["base"], small["merged"][n] if n else small["plain"], small["plain"],
                torch.float32,
            ),
            prompt, STEPS, alpha if n else 0.0,
        )[0]
        for n, prompt, alpha in zip(names, prompts, alphas)
    ]  # fmt: skip
    asked = [greedy_params(STEPS, proxy_alpha=alpha) for alpha in alphas]
    given = [{"prompt_token_ids": p} for p in prompts]
    members = {"model": small["base"], "antiexpert": small["plain"]}
    with machine.engine(**members, enable_lora=True, max_loras=3) as (llm, _):
        llm.generate(given, asked, lora_request=adapters, use_tqdm=False)  # loads them
        with watch() as seen:
            outputs = llm.generate(given, asked, lora_request=adapters, use_tqdm=False)
    assert tokens_of(outputs) == want
    assert_quiet(seen)


def test_drafts_beside_all_that_needs_a_distribution(trio):
    """Penalties, log-probabilities, a grammar and a thinking budget, each on some rows."""
    from e2e.test_sampling_features import penalised
    from e2e.test_thinking_budget import REASONING, budgeted
    from vllm.sampling_params import StructuredOutputsParams

    expected = expected_tokens(trio)
    rows = [0, 1, 2, 0, 4, 0, 0]
    more: list[dict] = [
        {},
        {"logprobs": 2},
        {},
        {"repetition_penalty": 1.5},
        {},
        {"structured_outputs": StructuredOutputsParams(choice=["w5w6w7", "w8w7w7"])},
        {"thinking_token_budget": 2},
    ]
    more[5]["ignore_eos"] = False
    prompts = [PROMPTS[row] for row in rows]
    prompts[6] = [*PROMPTS[0], 40]
    reference = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    thought = greedy(reference, prompts[6], TOKENS, 1.0, process=budgeted(prompts[6], 2))[0]
    repeating = penalised(PROMPTS[0], repetition=1.5)
    less = greedy(reference, PROMPTS[0], TOKENS, 1.0, process=repeating)[0]
    assert less != expected[0]
    asked = [params(row, **fields) for row, fields in zip(rows, more)]
    settings = {"speculative_tokens": 2, "max_num_batched_tokens": 128}
    given = [{"prompt_token_ids": p} for p in prompts]
    with (
        machine.engine(**trio, **settings, reasoning_config=REASONING) as (llm, _),
        watch() as seen,
    ):
        outputs = llm.generate(given, asked, use_tqdm=False)
    tokens = tokens_of(outputs)
    for at in (0, 1, 2, 4):
        assert tokens[at] == expected[rows[at]]
    assert (tokens[3], tokens[6]) == (less, thought)
    assert "".join(outputs[5].outputs[0].text.split()) in ("w5w6w7", "w8w7w7")
    assert_quiet(seen)
