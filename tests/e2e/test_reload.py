"""Weights that are loaded again while the engine lives, and engines that sleep."""

import json
from pathlib import Path

import pytest
from engines import greedy_params, prompt_ids, running
from safetensors.torch import load_file, save_file
from tiny_models import make_model

PROMPTS = prompt_ids([5, 40], seed=61)


def with_a_head_of_its_own(folder: str) -> str:
    """A checkpoint whose configuration ties the embeddings and whose weights repeat them."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert json.loads((Path(folder) / "config.json").read_text())["tie_word_embeddings"]
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tied")
    return {
        role: with_a_head_of_its_own(make_model(root / role, seed=seed, tied=True, layers=1))
        for seed, role in enumerate(("model", "expert", "antiexpert"))
    }


def answers(llm) -> list[list[int]]:
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    outputs = llm.generate(prompts, greedy_params(12, proxy_alpha=1.0), use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def heads_share(model) -> list[bool]:
    return [m.lm_head.weight is m.model.embed_tokens.weight for m in model.members()]


def test_weights_loaded_again_answer_the_same(tied):
    """Layers are without storage until the last weight is in; heads with padding are such."""
    with running(**tied) as llm:
        first = answers(llm)
        assert llm.apply_model(heads_share) == [[True] * 3]
        llm.collective_rpc("reload_weights")
        assert answers(llm) == first
        assert llm.apply_model(heads_share) == [[True] * 3]


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_answers_the_same(tied, level):
    with running(**tied, enable_sleep_mode=True) as llm:
        first = answers(llm)
        llm.sleep(level=level)
        llm.wake_up()
        if level == 2:  # vLLM throws the weights away, and wants them loaded again
            llm.collective_rpc("reload_weights")
        assert answers(llm) == first
