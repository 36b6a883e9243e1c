"""Every kind of decoder, alone and mixed: windows, chunks, mixtures, latent attention, states.

Truth is the Transformers loop where plain vLLM computes what Transformers does. Elsewhere it is
three plain vLLM engines that read the answer as a prompt: every token must have been the largest of
their combined log-probabilities, which the formula leaves in the order of the logits.
"""

from importlib.util import find_spec

import pytest
import torch
from engines import RUNNER, greedy_params, prompt_ids, running
from families import VOCAB, load, make_family_trio
from reference_loop import Trio, greedy

PROMPTS = prompt_ids([3, 17, 40, 70, 100])
ALPHAS = [1.0, 0.0, 0.5, -1.5, None]
TOKENS = 16

# vLLM imports their processors of images, though text alone is read.
WITH_IMAGES = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="needs torchvision, which the CPU lock leaves out"
)

CORE = [
    ("gemma3", "gemma3"),
    ("gpt_oss", "gpt_oss"),
    ("olmo3", "olmo3"),
    ("mistral_window", "llama"),
    ("qwen3_moe", "qwen3"),
    ("deepseek_v3", "deepseek_v3"),
    ("granite4", "granite4"),
]
ON_V2 = [("gemma3", "gemma3"), ("gpt_oss", "gpt_oss"), ("granite4", "granite4")]
MORE = [
    ("llama", "mistral_window"),
    ("llama", "gemma3"),
    ("gemma2", "gemma2"),
    ("gemma4", "gemma4"),
    ("exaone4", "exaone4"),
    ("llama4", "llama4"),
    ("mixtral", "llama"),
    ("olmoe", "llama"),
    ("glm4_moe", "llama"),
    ("deepseek_v2", "deepseek_v2"),
    ("llama", "granite4"),
    ("granite4", "llama"),
    ("gemma3", "granite4"),
    ("nemotron_h", "granite4"),
    ("falcon_h1", "falcon_h1"),
    pytest.param("gemma3_wrapper", "gemma3", marks=WITH_IMAGES),
    pytest.param("mistral3_wrapper", "llama", marks=WITH_IMAGES),
]
# vLLM's own answers differ from Transformers' here.
AGAINST_VLLM = [("lfm2", "lfm2")]
MORE_AGAINST_VLLM = [("cohere2", "cohere2"), ("mamba2", "mamba2")]


def expected(
    trio: dict[str, str], prompts=PROMPTS, alphas=ALPHAS, tokens=TOKENS
) -> list[list[int]]:
    reference = Trio(*map(load, trio.values()))
    return [
        greedy(reference, prompt, tokens, 1.0 if alpha is None else alpha)[0]
        for prompt, alpha in zip(prompts, alphas)
    ]


def generate(llm, prompts=PROMPTS, alphas=ALPHAS, tokens=TOKENS) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        [greedy_params(tokens, proxy_alpha=a) for a in alphas],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def check(tmp_path, base: str, small: str, runs: int = 2, **args) -> None:
    trio = make_family_trio(tmp_path, base, small)
    want = expected(trio)
    with running(**trio, **args) as llm:
        for _ in range(runs):  # the second finds prefixes in the cache
            assert generate(llm) == want


@pytest.mark.parametrize("base, small", ON_V2 if RUNNER == "v2" else CORE)
def test_family(tmp_path, base, small):
    check(tmp_path, base, small, runs=1 if RUNNER == "v2" else 2)


@pytest.mark.slow
@pytest.mark.skipif(RUNNER == "v2", reason="minutes each in the interpreter")
@pytest.mark.parametrize("base, small", MORE)
def test_more_families(tmp_path, base, small):
    check(tmp_path, base, small)


def combined(trio: dict[str, str], answers: list[list[int]], **args) -> list[torch.Tensor]:
    """What three plain engines make of each answer: ``[tokens, V]`` combined log-probabilities."""
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    whole = [{"prompt_token_ids": p + a} for p, a in zip(PROMPTS, answers)]
    views = []
    for folder in trio.values():
        # Without vLLM's rotary kernel, which is wrong for some of these on a CPU.
        plain = {"compilation_config": {"custom_ops": ["none"]}, **args}
        with running(LLM, model=folder, max_logprobs=-1, **plain) as llm:
            outputs = llm.generate(whole, params, use_tqdm=False)
        view = []
        for prompt, output in zip(PROMPTS, outputs):
            rows = output.prompt_logprobs[len(prompt) :]
            view.append(torch.tensor([[row[t].logprob for t in range(VOCAB)] for row in rows]))
        views.append(view)
    alphas = [1.0 if alpha is None else alpha for alpha in ALPHAS]
    return [b + a * (e - x) for a, b, e, x in zip(alphas, *views)]


def check_against_vllm(tmp_path, base: str, small: str, **args) -> None:
    trio = make_family_trio(tmp_path, base, small)
    with running(**trio, **args) as llm:
        answers = generate(llm)
        assert generate(llm) == answers
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    for answer, rows in zip(answers, combined(trio, answers, **args)):
        chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        # Prefill and decode round differently: a choice may lie within that of the largest.
        assert float((rows.max(1).values - chosen).max()) < 1e-3


@pytest.mark.skipif(RUNNER == "v2", reason="on V1 alone")
@pytest.mark.parametrize("base, small", AGAINST_VLLM)
def test_family_against_three_engines(tmp_path, base, small):
    check_against_vllm(tmp_path, base, small)


@pytest.mark.slow
@pytest.mark.skipif(RUNNER == "v2", reason="on V1 alone")
@pytest.mark.parametrize("base, small", MORE_AGAINST_VLLM)
def test_more_families_against_three_engines(tmp_path, base, small):
    check_against_vllm(tmp_path, base, small, enable_prefix_caching=False)


CROSSINGS = {
    "few blocks": {"num_gpu_blocks_override": 40, "max_model_len": 128},
    "two ranks by tensors": {"tensor_parallel_size": 2},
    "one table": {"kv_cache_tables": "one"},
    "several tables": {"kv_cache_tables": "several"},
    "compiled": {"enforce_eager": False},
}


@pytest.mark.slow
@pytest.mark.skipif(RUNNER == "v2", reason="minutes each in the interpreter")
@pytest.mark.parametrize("args", CROSSINGS.values(), ids=CROSSINGS.keys())
@pytest.mark.parametrize("family", ["gemma3", "granite4"])
def test_families_under_other_settings(tmp_path, family, args, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # for two workers on one memory node
    check(tmp_path, family, family, **args)


@pytest.mark.slow
@pytest.mark.skipif(RUNNER == "v2", reason="minutes each in the interpreter")
def test_windows_over_two_ranks_by_layers(tmp_path, monkeypatch):
    """vLLM (0.32.0) does not load Granite 4 so."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    check(tmp_path, "gemma3", "gemma3", pipeline_parallel_size=2)


@pytest.mark.skipif(RUNNER != "v2", reason="own prompts need Model Runner V2")
def test_own_prompts_with_windows(tmp_path):
    """Members with two windows, each reading a prompt of its own, and few blocks for them."""
    trio = make_family_trio(tmp_path, "gemma3", "gemma3")
    ids = prompt_ids([40, 70, 20, 70, 33, 50], seed=7)
    prompts = [{"base": ids[i], "expert": ids[i + 1], "antiexpert": ids[i + 2]} for i in (0, 3)]
    reference = Trio(*map(load, trio.values()))
    want = [greedy(reference, prompt, TOKENS, 1.0)[0] for prompt in prompts]
    with running(**trio, own_prompts=True) as llm:
        outputs = llm.generate(prompts, greedy_params(TOKENS, proxy_alpha=1.0), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == want
