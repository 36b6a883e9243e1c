"""Members that differ from each other: vocabulary, dtype, quantization."""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model

STEPS = 16
ALPHAS = [1.0, 0.0, -1.5]
PROMPTS = prompt_ids([5, 40, 70], seed=51)
SMALL = {"hidden": 32, "heads": 1, "layers": 1}


def ask(llm, prompts=PROMPTS, alphas=ALPHAS, **fields):
    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        [greedy_params(STEPS, proxy_alpha=a, **fields) for a in alphas],
        use_tqdm=False,
    )


VOCABULARIES = {
    "small members with more columns": (111, 128, 140),
    "members that lack columns": (300, 111, 99),
    "one with more, one with fewer": (128, 140, 111),
}


@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_vocabularies_of_different_sizes(tmp_path, sizes):
    """Extra columns are cut, missing ones shift nothing, and the base's size rules.

    The base's tokens past the small vocabularies are generated too, and read by the small members
    as their token 0.
    """
    base, expert, antiexpert = sizes
    trio = {
        "model": make_model(tmp_path / "base", seed=1, vocab=base, tokenizer_size=99),
        "expert": make_model(
            tmp_path / "expert", seed=2, vocab=expert, tokenizer_size=99, **SMALL
        ),
        "antiexpert": make_model(
            tmp_path / "antiexpert", seed=3, vocab=antiexpert, tokenizer_size=99, **SMALL
        ),
    }
    prompts = prompt_ids([5, 40, 70], vocab=base, seed=52)
    reference = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    seen = set()
    with running(**trio) as llm:
        assert llm.llm_engine.model_config.get_vocab_size() == base
        for output, prompt, alpha in zip(ask(llm, prompts, logprobs=0), prompts, ALPHAS):
            tokens, steps = greedy(reference, prompt, STEPS, alpha)
            assert list(output.outputs[0].token_ids) == tokens
            for token, logits, got in zip(tokens, steps, output.outputs[0].logprobs):
                want = float(logits.log_softmax(-1)[token])
                assert got[token].logprob == pytest.approx(want, abs=2e-4)
            seen.update(tokens)
    if base > min(expert, antiexpert):
        assert any(token >= min(expert, antiexpert) for token in seen), "proves nothing"
