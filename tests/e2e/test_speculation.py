"""Drafts of the expert change how many steps an answer takes, and nothing else.

Every kind of request runs in an engine without drafts, whose tokens other tests hold against
Transformers, and again with K drafts a step: the tokens must be the same ones, sampled too.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engines import GRAPHS, V2, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model

EOS = 1
STEPS = 16
SPELLED = dict(enumerate(["{", "}", '"', ":", ",", "on", "mode", "true", "false", "4", "2"], 20))
ENGINE: dict[str, Any] = {
    "disable_log_stats": False,
    "max_num_batched_tokens": 48,  # long prompts come in chunks
    "max_num_seqs": 6,
    "max_logprobs": 20,
    "max_model_len": 100,  # which two of the requests reach, one of them amid drafts
}
PROMPTS = prompt_ids([4, 30, 80], seed=41)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Base and antiexpert are one model: at alpha 1 every draft is right, elsewhere some are.

    The expert has token ids that the others lack.
    """
    root = tmp_path_factory.mktemp("speculation")
    small = {"hidden": 32, "heads": 1, "layers": 1, "renamed": SPELLED}
    small |= {"vocab": 128, "tokenizer_size": 111}
    base = make_model(root / "base", seed=1, renamed=SPELLED)
    return {
        "model": base,
        "expert": make_model(root / "expert", seed=2, **small),
        "antiexpert": base,
    }


@pytest.fixture(scope="module")
def reference(folders) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


@dataclass
class Kind:
    """One request: what it asks for, and whether the interpreter can run it."""

    name: str
    fields: dict[str, Any]
    alpha: float = 1.0
    length: int = 20

    def params(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        fields = {"max_tokens": STEPS, "ignore_eos": True, "temperature": 0.0, **self.fields}
        if "regex" in fields:
            fields["structured_outputs"] = StructuredOutputsParams(regex=fields.pop("regex"))
        return SamplingParams(extra_args={"proxy_alpha": self.alpha}, **fields)


SAMPLED = {"temperature": 1.0}
KINDS = [
    *(Kind(f"greedy {a}", {}, a, n) for a, n in [(1.0, 4), (0.5, 30), (-1.0, 90), (0.0, 9)]),
    Kind("seed", {**SAMPLED, "seed": 1}),
    Kind("seed, half", {"temperature": 0.7, "seed": 2}, 0.5, 60),
    Kind("to the limit", {"max_tokens": 40}, 0.9, 79),
    Kind("min-p", {**SAMPLED, "seed": 3, "min_p": 0.2}, 0.7),
    Kind("top-k", {**SAMPLED, "seed": 4, "top_k": 5}, 0.8),
    Kind("top-p", {**SAMPLED, "seed": 5, "top_p": 0.7}, 0.8),
    Kind("several", {**SAMPLED, "seed": 6, "n": 3}, 0.9, 40),
    Kind("log-probabilities", {"logprobs": 3}, 0.5, 33),
    Kind("sampled log-probabilities", {**SAMPLED, "seed": 7, "logprobs": 2}, 0.9),
    Kind("prompt log-probabilities", {"prompt_logprobs": 1}, 0.9, 50),
    Kind("repetition", {"repetition_penalty": 1.6}),
    Kind("presence, frequency", {"presence_penalty": 0.9, "frequency_penalty": 0.7}, 0.9),
    Kind("sampled penalties", {**SAMPLED, "seed": 8, "repetition_penalty": 1.3}, 0.9),
    Kind("bias", {"logit_bias": {17: 6.0, 42: 5.0}}, 0.9),
    Kind("bias, sampled", {**SAMPLED, "seed": 9, "logit_bias": {17: 3.0}, "min_p": 0.05}, 0.9),
    Kind("bad words", {"bad_words": ["w5", "w7 w9", "w33"]}, 0.9),
    Kind("allowed", {"allowed_token_ids": list(range(30, 60))}, 0.9),
    Kind("minimum", {"min_tokens": 7, "ignore_eos": False, "logit_bias": {EOS: 30.0}}, 0.9),
    Kind("end", {"ignore_eos": False, "logit_bias": {EOS: 5.0}}, 0.7),
    Kind("stop text", {"stop": ["w4", "true", "w9"]}, 0.9),
    Kind("stop text kept", {"stop": ["w3", "w8"], "include_stop_str_in_output": True}, 0.9),
    Kind("stop tokens", {"stop_token_ids": list(range(60, 80))}, 0.9),
    Kind("grammar", {"regex": "(on|mode){3,9}", "ignore_eos": False}, 0.9),
    Kind("sampled grammar", {**SAMPLED, "seed": 10, "regex": "[24]{2,}(true|false)"}, 1.0),
]


def answers(llm, kinds: list[Kind] = KINDS) -> dict[str, list[Any]]:
    """Tokens, texts, reasons and log-probabilities of each kind, all in one batch."""
    prompts = [prompt_ids([k.length], seed=i)[0] for i, k in enumerate(kinds)]
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], [k.params() for k in kinds], use_tqdm=False
    )
    return {
        kind.name: [
            (list(o.token_ids), o.text, o.finish_reason, o.stop_reason, scores(o.logprobs))
            for o in output.outputs
        ]
        for kind, output in zip(kinds, outputs)
    }


def scores(logprobs: Any) -> list[dict[int, Any]] | None:
    if logprobs is None:
        return None
    return [
        {t: (pytest.approx(e.logprob, abs=1e-4), e.rank) for t, e in entries.items()}
        for entries in logprobs
    ]


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, list[Any]]:
    with running(**folders, **ENGINE) as llm:
        return answers(llm)


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


K = 3


@pytest.fixture(scope="module")
def llm(folders, expected):
    """Its cache is too small for six requests, so that some are preempted."""
    with running(**folders, **ENGINE, speculative_tokens=K, num_gpu_blocks_override=10) as engine:
        yield engine


def assert_same(got: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    wrong = [name for name in expected if got[name] != expected[name]]
    assert not wrong, {name: (got[name], expected[name]) for name in wrong[:3]}


def test_every_kind_of_request_is_answered_as_without_drafts(llm, expected):
    assert_same(answers(llm), expected)
    assert_same(answers(llm), expected)  # prompts are in the cache now
    assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


def test_requests_with_alpha_0_draft_nothing(llm, expected):
    _, grown = run(llm, [0.0] * 3)
    assert grown["draft_tokens"] == 0
    _, grown = run(llm, [0.0, 1.0, 0.0])
    assert 0 < grown["draft_tokens"] <= K * -(-STEPS // (K + 1))


def test_streamed_tokens_are_those_of_the_answer(llm, expected):
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    chosen = {i: k for i, k in enumerate(KINDS) if k.name in ("seed", "stop text", "greedy 1.0")}
    for i, kind in chosen.items():
        params = kind.params()
        params.output_kind = RequestOutputKind.DELTA
        prompt = {"prompt_token_ids": prompt_ids([kind.length], seed=i)[0]}
        engine.add_request(kind.name, prompt, params)
    pieces: dict[str, list[Any]] = {kind.name: [] for kind in chosen.values()}
    while engine.has_unfinished_requests():
        for output in engine.step():
            pieces[output.request_id].append(output.outputs[0])
    for name, got in pieces.items():
        ids, text, reason, stop, _ = expected[name][0]
        assert [t for piece in got for t in piece.token_ids] == ids
        assert "".join(piece.text for piece in got) == text
        assert (got[-1].finish_reason, got[-1].stop_reason) == (reason, stop)
    assert len(pieces["greedy 1.0"]) <= -(-STEPS // (K + 1)) + 1


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


@pytest.mark.skipif(not V2, reason="the V1 runner drafts greedily: its noise has no positions")
def test_sampled_drafts_are_drawn_with_the_noise_of_the_tokens(llm):
    from vllm import SamplingParams

    before = counters(llm)
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=STEPS, ignore_eos=True) for i in range(3)
    ]
    llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    after = counters(llm)
    drafted = after["draft_tokens"] - before["draft_tokens"]
    assert after["accepted_tokens"] - before["accepted_tokens"] == drafted > 0


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


@pytest.mark.skipif(not V2, reason="own prompts need Model Runner V2")
def test_each_model_its_own_prompt(trio):
    """The expert is ahead of the base or behind it; its drafts go on from where it is."""
    from test_own_prompts import LENGTHS, check, prompts_of

    reference = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    prompts = [
        prompts_of(n, seed=100 + i) for i, n in enumerate([*LENGTHS[3:12], (45, None, None)])
    ]
    alphas = [1.0, 0.5, -1.0, 0.0, 2.0] * 2
    with running(**trio, own_prompts=True, speculative_tokens=2, max_num_batched_tokens=32) as llm:
        check(llm, reference, prompts, alphas, max_tokens=8)
        check(llm, reference, prompts, alphas[::-1], max_tokens=8)


@pytest.mark.skipif(V2, reason="as long as all other tests on this runner")
def test_drafts_a_step_as_they_pay(folders, expected):
    with running(**folders, **ENGINE, speculative_tokens="auto") as llm:
        assert_same(answers(llm), expected)
        assert counters(llm)["accepted_tokens"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", [3, "auto"])
def test_under_cuda_graphs(folders, expected, drafts):
    """Members compiled, verification and the loop of drafts as graphs."""
    with running(**folders, **{**ENGINE, **GRAPHS}, speculative_tokens=drafts) as llm:
        assert_same(answers(llm), expected)
        assert_same(answers(llm), expected)
        assert counters(llm)["accepted_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 2, 4, 7, "auto"])
def test_any_number_of_drafts(folders, expected, drafts):
    with running(**folders, **ENGINE, speculative_tokens=drafts) as llm:
        assert_same(answers(llm), expected)
        assert_same(answers(llm), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False, "max_num_batched_tokens": 16},
        {"max_num_seqs": 16, "max_num_batched_tokens": 256},
        {"max_model_len": 64},
        {"num_gpu_blocks_override": 6},
    ],
    ids=["chunks", "wide", "limit", "blocks"],
)
def test_any_settings(folders, settings):
    limit = settings.get("max_model_len", 100)
    kinds = [k for k in KINDS if k.length < limit]
    settings = {**ENGINE, **settings}
    with running(**folders, **settings) as llm:
        expected = answers(llm, kinds)
    with running(**folders, **settings, speculative_tokens=4) as llm:
        assert_same(answers(llm, kinds), expected)
        assert_same(answers(llm, kinds), expected)


@pytest.mark.slow
def test_an_expert_without_some_of_the_tokens(folders, tmp_path):
    small = {"hidden": 32, "heads": 1, "layers": 1, "renamed": SPELLED, "vocab": 90}
    trio = {**folders, "expert": make_model(tmp_path / "expert", seed=2, **small)}
    with running(**trio, **ENGINE) as llm:
        expected = answers(llm)
    with running(**trio, **ENGINE, speculative_tokens=3) as llm:
        assert_same(answers(llm), expected)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one GPU")
def test_two_ranks(folders, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    small = {"hidden": 64, "heads": 2, "layers": 1, "renamed": SPELLED}
    trio = {**folders, "expert": make_model(tmp_path / "expert", seed=2, **small)}
    with running(**trio, **ENGINE) as llm:
        expected = answers(llm)
    with running(**trio, **ENGINE, speculative_tokens=3, tensor_parallel_size=2) as llm:
        assert_same(answers(llm), expected)
