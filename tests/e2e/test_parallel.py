"""Members split over two worker processes, by tensors or by layers: token-exact all the same."""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy, prompt_logits
from tiny_models import make_model

STEPS = 8
ALPHAS = [1.0, 0.0, -1.5, 0.5]
PROMPTS = prompt_ids([3, 70, 33, 12], seed=61)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Odd vocabularies, of different sizes: no shard of one member is as wide as another's."""
    root = tmp_path_factory.mktemp("parallel")
    small = {"hidden": 64, "heads": 2, "layers": 2}
    return {
        "model": make_model(root / "base", seed=1, vocab=157, hidden=128, heads=4, kv_heads=2),
        "expert": make_model(root / "expert", seed=2, vocab=131, **small),
        "antiexpert": make_model(root / "antiexpert", seed=3, vocab=203, tied=True, **small),
    }


@pytest.fixture(scope="module")
def reference(folders) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_processes(split, folders, reference, monkeypatch):
    # Two workers on one memory node: vLLM wants to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running(**folders, **{split: 2}) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in PROMPTS] * 2,
            [
                *(greedy_params(STEPS, proxy_alpha=a) for a in ALPHAS),
                *(greedy_params(2, proxy_alpha=a, logprobs=3, prompt_logprobs=1) for a in ALPHAS),
            ],
            use_tqdm=False,
        )
    for output, prompt, alpha in zip(outputs, PROMPTS, ALPHAS):
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, STEPS, alpha)[0]
    for output, prompt, alpha in zip(outputs[4:], PROMPTS, ALPHAS):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == greedy(reference, prompt, 2, alpha)[0]
        rows = prompt_logits(reference, prompt + tokens, alpha).log_softmax(-1)
        got = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for row, entries in zip(rows, got):
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
