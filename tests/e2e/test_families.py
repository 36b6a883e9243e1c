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
    ("qwen3", "qwen3_moe"),
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
    ("llama", "gpt_oss"),
    ("deepseek_v2", "deepseek_v2"),
    ("llama", "granite4"),
    ("granite4", "llama"),
    ("gemma3", "granite4"),
    ("nemotron_h", "granite4"),
    ("falcon_h1", "falcon_h1"),
    pytest.param("gemma3_wrapper", "gemma3", marks=WITH_IMAGES),
    pytest.param("mistral3_wrapper", "llama", marks=WITH_IMAGES),
]
SLOW = pytest.mark.slow
ON_V1_ALONE = pytest.mark.skipif(RUNNER == "v2", reason="V2 has its own below, or has no compiler")
# vLLM's own answers differ from Transformers' here.
AGAINST_VLLM = [
    pytest.param("lfm2", {}, marks=SLOW if RUNNER == "v2" else ()),
    pytest.param("cohere2", {"enable_prefix_caching": False}, marks=SLOW),
    pytest.param("mamba2", {"enable_prefix_caching": False}, marks=SLOW),
]
# For plain vLLM: without its rotary kernel, which is wrong for some of these on a CPU.
NATIVE = {"custom_ops": ["none"]}


def expected(
    trio: dict[str, str], prompts=PROMPTS, alphas=ALPHAS, tokens=TOKENS
) -> list[list[int]]:
    reference = Trio(*map(load, trio.values()))
    return [
        greedy(reference, prompt, tokens, 1.0 if alpha is None else alpha)[0]
        for prompt, alpha in zip(prompts, alphas)
    ]


def outputs_of(llm, prompts=PROMPTS, alphas=ALPHAS, tokens=TOKENS, n=1) -> list:
    """Greedy outputs; ``n`` answers to one prompt are the same."""
    # vLLM refuses several greedy answers, and draws those of which one token is left.
    drawn = {"n": n, "temperature": 1.0, "top_k": 1} if n > 1 else {}
    outputs = llm.generate(
        [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts],
        [greedy_params(tokens, proxy_alpha=a, **drawn) for a in alphas],
        use_tqdm=False,
    )
    for output in outputs:
        assert len(output.outputs) == n
        assert len({tuple(answer.token_ids) for answer in output.outputs}) == 1
    return outputs


def generate(llm, *args, **kwargs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs_of(llm, *args, **kwargs)]


def preemptions(llm) -> float:
    """So far, of an engine with ``disable_log_stats=False``."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def check(tmp_path, base: str, small: str, **args) -> None:
    trio = make_family_trio(tmp_path, base, small)
    want = expected(trio)
    # Hits fall on common multiples of the block sizes of all tables, here up to 128. Alone, its
    # steps have one token.
    (long,) = prompt_ids([140], seed=8)
    (tokens,) = expected(trio, [long], [1.0], 4)
    with running(**trio, **args) as llm:
        assert generate(llm) == want
        again = outputs_of(llm, tokens=4, n=2)
        assert [list(o.outputs[0].token_ids) for o in again] == [answer[:4] for answer in want]
        first, second = (outputs_of(llm, [long], [1.0], 4)[0] for _ in range(2))
        caching = llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        assert (first.num_cached_tokens, second.num_cached_tokens > 0) == (0, caching)
        assert [list(o.outputs[0].token_ids) for o in (first, second)] == [tokens, tokens]


@pytest.mark.parametrize("base, small", ON_V2 if RUNNER == "v2" else CORE)
def test_family(tmp_path, base, small):
    check(tmp_path, base, small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "base, small", MORE + [f for f in CORE if RUNNER == "v2" and f not in ON_V2]
)
def test_more_families(tmp_path, base, small):
    check(tmp_path, base, small)


def combined(trio: dict[str, str], answers: list[list[int]], **args) -> list[torch.Tensor]:
    """What three plain engines make of each answer: ``[tokens, V]`` combined log-probabilities."""
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    whole = [{"prompt_token_ids": p + a} for p, a in zip(PROMPTS, answers)]
    views = []
    for folder in trio.values():
        plain = {"compilation_config": NATIVE, **args}
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
        alone = [generate(llm, [p], [a])[0] for p, a in zip(PROMPTS, ALPHAS)]
        assert alone == answers
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    for answer, rows in zip(answers, combined(trio, answers, **args)):
        chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        # Prefill and decode round differently: a choice may lie within that of the largest.
        assert float((rows.max(1).values - chosen).max()) < 1e-3


@pytest.mark.parametrize("family, args", AGAINST_VLLM)
def test_family_against_three_engines(tmp_path, family, args):
    check_against_vllm(tmp_path, family, family, **args)


# On a CPU vLLM runs these in bfloat16 alone, in which its own prefill and decode differ, for Qwen3-
# Next by up to 4.6 in a combined log-probability: engines that read an answer are no truth for one
# that writes it. Engines that write are, where the formula leaves one model.
GATED_DELTA = ["qwen3_next", pytest.param("qwen3_5", marks=WITH_IMAGES)]


@pytest.mark.slow
@pytest.mark.parametrize("family", GATED_DELTA)
def test_one_model_is_left_of_gated_delta_rules(tmp_path, family):
    from vllm import LLM

    trio = make_family_trio(tmp_path, family, family)
    base, expert, antiexpert = trio.values()

    def plain(folder: str) -> list[list[int]]:
        with running(LLM, model=folder, dtype="bfloat16") as llm:
            return generate(llm, alphas=[None] * len(PROMPTS))

    def left(alpha: float, **members: str) -> list[list[int]]:
        with running(model=base, dtype="bfloat16", **members) as llm:
            return generate(llm, alphas=[alpha] * len(PROMPTS))

    assert left(0.0, expert=expert, antiexpert=antiexpert) == plain(base)
    assert left(1.0, expert=expert, antiexpert=base) == plain(expert)
    assert left(-1.0, expert=base, antiexpert=antiexpert) == plain(antiexpert)


CROSSINGS = [
    pytest.param({"tensor_parallel_size": 2}, id="two ranks by tensors", marks=ON_V1_ALONE),
    pytest.param({"kv_cache_tables": "one"}, id="one table"),
    pytest.param({"kv_cache_tables": "several"}, id="several tables"),
    pytest.param({"enforce_eager": False}, id="compiled", marks=ON_V1_ALONE),
]


@pytest.mark.slow
@pytest.mark.parametrize("args", CROSSINGS)
@pytest.mark.parametrize("family", ["gemma3", "granite4"])
def test_families_under_other_settings(tmp_path, family, args, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # for two workers on one memory node
    check(tmp_path, family, family, **args)


@pytest.mark.slow
@ON_V1_ALONE
def test_windows_over_two_ranks_by_layers(tmp_path, monkeypatch):
    """vLLM (0.32.0) does not load Granite 4 so."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    check(tmp_path, "gemma3", "gemma3", pipeline_parallel_size=2)


# Requests that outgrow their blocks while their answers are written.
GROWING = prompt_ids([30, 35, 28, 31, 20], seed=7)
FEW_BLOCKS = {
    "windows in one table": ("gemma3", {"kv_cache_tables": "one", "num_gpu_blocks_override": 12}),
    "windows in several": ("gemma3", {"kv_cache_tables": "several", "num_gpu_blocks_override": 44}),
    "states": ("granite4", {"num_gpu_blocks_override": 30}),
}


def check_few_blocks(llm, prompts, want: list[list[int]], alphas=ALPHAS) -> None:
    assert generate(llm, prompts, alphas, tokens=len(want[0])) == want
    assert preemptions(llm) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family, args", FEW_BLOCKS.values(), ids=FEW_BLOCKS.keys())
def test_preempted_requests_of_families(tmp_path, family, args):
    trio = make_family_trio(tmp_path, family, family)
    want = expected(trio, GROWING, tokens=60)
    with running(**trio, max_model_len=128, disable_log_stats=False, **args) as llm:
        check_few_blocks(llm, GROWING, want)


@pytest.mark.parametrize(
    "small",
    [
        "gemma3",
        pytest.param("mistral_window", marks=pytest.mark.slow),
    ],
)
def test_drafts_of_members_with_windows(tmp_path, small):
    check(tmp_path, "gemma3", small, speculative_tokens=2)


OWN = [
    ("gemma3", "gemma3", {"num_gpu_blocks_override": 12}),
    ("granite4", "granite4", {"num_gpu_blocks_override": 30}),
    pytest.param("llama", "granite4", {"num_gpu_blocks_override": 16}, marks=pytest.mark.slow),
    pytest.param("granite4", "llama", {"num_gpu_blocks_override": 30}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", "gemma3", {"num_gpu_blocks_override": 12}, marks=pytest.mark.slow),
    pytest.param("llama4", "llama4", {"num_gpu_blocks_override": 12}, marks=pytest.mark.slow),
    pytest.param(
        "deepseek_v3", "deepseek_v3", {"num_gpu_blocks_override": 12}, marks=pytest.mark.slow
    ),
    pytest.param("falcon_h1", "falcon_h1", {"num_gpu_blocks_override": 30}, marks=pytest.mark.slow),
]


@pytest.mark.skipif(RUNNER != "v2", reason="own prompts need Model Runner V2")
@pytest.mark.parametrize("base, small, args", OWN)
def test_own_prompts_with_few_blocks(tmp_path, base, small, args):
    """Each model reads a prompt of its own, beside a request of one prompt, and is preempted."""
    trio = make_family_trio(tmp_path, base, small)
    lengths = [(30, 45, 1), (35, 20, 28), (28, 2, 60), (31, 2, 33), (20, 20, 20)]
    ids = iter(prompt_ids([n for three in lengths for n in three], seed=7))
    prompts = [{role: next(ids) for role in ("base", "expert", "antiexpert")} for _ in lengths]
    prompts[-1] = prompts[-1]["base"]
    want = expected(trio, prompts, tokens=44)
    settings = {"max_model_len": 128, "max_num_batched_tokens": 32, "disable_log_stats": False}
    with running(**trio, own_prompts=True, **settings, **args) as llm:
        check_few_blocks(llm, prompts, want)


# Truth for those of which Transformers is none, where the formula leaves one model: what plain vLLM
# answers to that model's prompt.
@pytest.mark.slow
@pytest.mark.skipif(RUNNER != "v2", reason="own prompts need Model Runner V2")
@pytest.mark.parametrize(
    "family, dtype, args",
    [
        ("lfm2", "float32", {"compilation_config": NATIVE}),
        ("mamba2", "float32", {"enable_prefix_caching": False}),
        ("qwen3_next", "bfloat16", {}),
    ],
    ids=["lfm2", "mamba2", "qwen3_next"],
)
def test_one_model_is_left_of_own_prompts(tmp_path, family, dtype, args):
    from vllm import LLM

    trio = make_family_trio(tmp_path, family, family)
    base, expert, antiexpert = trio.values()
    first, second, third = (prompt_ids(n, seed=7) for n in ([30, 20, 3], [70, 20, 41], [1, 50, 3]))

    def plain(folder: str, prompts: list[list[int]]) -> list[list[int]]:
        with running(LLM, model=folder, dtype=dtype, **args) as llm:
            return generate(llm, prompts, [None] * len(prompts))

    def left(alpha: float, *prompts: list[list[int]], **members: str) -> list[list[int]]:
        roles = ("base", "expert", "antiexpert")
        asked = [dict(zip(roles, three)) for three in zip(*prompts)]
        with running(model=base, dtype=dtype, own_prompts=True, **members) as llm:
            return generate(llm, asked, [alpha] * len(asked))

    steered = left(0.0, first, second, third, expert=expert, antiexpert=antiexpert)
    assert steered == plain(base, first)
    steered = left(1.0, first, second, first, expert=expert, antiexpert=base)
    assert steered == plain(expert, second)
    steered = left(-1.0, first, first, third, expert=base, antiexpert=antiexpert)
    assert steered == plain(antiexpert, third)


@pytest.mark.slow
@pytest.mark.skipif(RUNNER != "v2", reason="V1 has its own above")
@pytest.mark.parametrize(
    "base, small, split",
    [
        ("gemma3", "gemma3", "tensor_parallel_size"),
        # vLLM cannot give two ranks one KV head of gpt-oss, which the small one has.
        ("gpt_oss", "gemma3", "tensor_parallel_size"),
        ("granite4", "granite4", "tensor_parallel_size"),
        ("gemma3", "gemma3", "pipeline_parallel_size"),
        ("gpt_oss", "gpt_oss", "pipeline_parallel_size"),
    ],
)
def test_families_over_two_ranks_on_v2(tmp_path, base, small, split, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    check(tmp_path, base, small, **{split: 2})
