"""The fused sampler inside vLLM: token-exact against a Transformers loop with float64 sampling."""

import os

import pytest
import torch
from engines import prompt_ids, running
from reference_loop import Trio

pytestmark = pytest.mark.skipif(
    os.environ.get("PROXY_VLLM_CPU_RUNNER", "v1") != "v2" and not torch.cuda.is_available(),
    reason="the fused sampler belongs to Model Runner V2 (PROXY_VLLM_CPU_RUNNER=v2)",
)

TOKENS = 12
ROWS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.7, "seed": 12, "top_p": 0.8},
    {"temperature": 1.3, "seed": 13, "top_k": 5},
    {"temperature": 1.0, "seed": 14, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.9, "seed": 15, "min_p": 0.1},
    {"temperature": 1.0, "seed": -3, "top_k": 1},
]
ALPHAS = [1.0, 0.5, -1.0, 0.0, 2.0, 1.0, 1.5]
PROMPTS = prompt_ids([3, 9, 33, 70, 5, 20, 12], seed=5)


def params(row: dict, alpha: float, **more):
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, extra_args={"proxy_alpha": alpha}, **row, **more
    )


@torch.inference_mode()
def sampled_by_reference(trio: Trio, prompt: list[int], row: dict, alpha: float) -> list[int]:
    """Decode without any cache; the noise is keyed by the position of the last token read."""
    from proxy_vllm.kernels import reference

    ids = list(prompt)
    for _ in range(TOKENS):
        logits = [m(torch.tensor([ids])).logits[:, -1] for m in trio.models()]
        token = reference.sample(
            *logits,
            torch.tensor([alpha]),
            torch.tensor([row["temperature"]]),
            torch.tensor([row.get("seed", 0)]),
            torch.tensor([len(ids) - 1]),
            top_k=torch.tensor([row.get("top_k", 0)]),
            top_p=torch.tensor([row.get("top_p", 1.0)]),
            min_p=torch.tensor([row.get("min_p", 0.0)]),
        )
        ids.append(int(token))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(trio) -> list[list[int]]:
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    return [sampled_by_reference(models, p, r, a) for p, r, a in zip(PROMPTS, ROWS, ALPHAS)]


def generate(llm, sampling) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_mixed_batch_equals_reference(trio, expected, tensor_parallel_size, monkeypatch):
    # Two workers on a machine of one memory node: vLLM wants to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join("01"[:tensor_parallel_size]))
    with running(**trio, tensor_parallel_size=tensor_parallel_size) as llm:
        got = generate(llm, [params(r, a) for r, a in zip(ROWS, ALPHAS)])
    assert got == expected


def test_special_rows_leave_the_others_on_the_fused_path(trio, expected, monkeypatch):
    import proxy_vllm.sampler as sampler

    fused_rows = []
    fused = sampler.proxy_sample

    def counted(base, *args, **kwargs):
        fused_rows.append(base.shape[0])
        return fused(base, *args, **kwargs)

    monkeypatch.setattr(sampler, "proxy_sample", counted)
    sampling = [params(r, a) for r, a in zip(ROWS, ALPHAS)]
    # Logprobs do not change what is drawn; vLLM's sampler must draw the same from the same noise.
    sampling[1] = params(ROWS[1], ALPHAS[1], logprobs=3)
    sampling[5] = params(ROWS[5], ALPHAS[5], logprobs=0)
    with running(**trio) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert len(fused_rows) >= TOKENS
    for i, output in enumerate(outputs):
        asked = sampling[i].logprobs
        if asked is None:
            assert output.outputs[0].logprobs is None
        else:
            for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs):
                assert token in step and len(step) >= max(asked, 1)


def test_tokens_drawn_from_head_weights(trio, expected, monkeypatch):
    """Rows without filters, once below and once above the batch that the option names."""
    import proxy_vllm.heads as heads

    calls = []
    fused = heads.fused_head_sample

    def counted(hidden, *args, **kwargs):
        calls.append(hidden[0].shape[0])
        return fused(hidden, *args, **kwargs)

    monkeypatch.setattr(heads, "fused_head_sample", counted)
    with running(**trio, fused_head_max_batch=2) as llm:
        for rows in ([0, 1], [0, 1, 0]):
            outputs = llm.generate(
                [{"prompt_token_ids": PROMPTS[i]} for i in rows],
                [params(ROWS[i], ALPHAS[i]) for i in rows],
                use_tqdm=False,
            )
            assert [list(o.outputs[0].token_ids) for o in outputs] == [expected[i] for i in rows]
    assert len(calls) >= TOKENS and max(calls) <= 2


def test_batch_of_special_rows_only(trio, expected):
    plain = [0, 1, 5]  # vLLM's own top-k and top-p kernel does not run in the interpreter
    with running(**trio) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": PROMPTS[i]} for i in plain],
            [params(ROWS[i], ALPHAS[i], logprobs=1) for i in plain],
            use_tqdm=False,
        )
    assert [list(o.outputs[0].token_ids) for o in outputs] == [expected[i] for i in plain]


def test_shards_of_members_padded_to_other_vocabularies(tmp_path, monkeypatch):
    """vLLM pads 111 columns to 128 and 200 to 256: two ranks split them at 64 and at 128."""
    from reference_loop import greedy
    from tiny_models import make_model

    small = {"heads": 2, "kv_heads": 1, "layers": 1, "vocab": 200, "tokenizer_size": 111}
    trio = {
        "model": make_model(tmp_path / "base", seed=1),
        "expert": make_model(tmp_path / "expert", seed=2, **small),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, **small),
    }
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    row = {"temperature": 0.0}
    want = [greedy(models, p, TOKENS, a)[0] for p, a in zip(PROMPTS, ALPHAS)]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running(**trio, tensor_parallel_size=2) as llm:
        assert generate(llm, [params(row, a) for a in ALPHAS]) == want
        # Logprobs take the other path: one gathered distribution.
        assert generate(llm, [params(row, a, logprobs=2) for a in ALPHAS]) == want
