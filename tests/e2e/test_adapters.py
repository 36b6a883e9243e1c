"""Experts as LoRA adapters, a mix of them in one batch, against loops with merged experts."""

import gc
from typing import Any

import psutil
import pytest
from adapter_files import merge
from engines import RUNNER, greedy_params, prompt_ids, running
from explained import assert_explained, log_probabilities
from reference_loop import Trio, greedy
from tiny_adapters import make_adapted
from tiny_models import make_model

from proxy_vllm.batch.generator import BatchGenerator
from proxy_vllm.batch.request import LineOptions

PROMPTS = prompt_ids([7, 30, 75, 12], seed=81)
STEPS = 12

# Adapter, prompt, alpha.
Case = tuple[str | None, int, float]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Any]:
    return make_adapted(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def truth(small):
    """What the loop answers with an adapter's merged model as the expert; None for the base."""
    import torch

    known: dict = {}
    trios = {
        name: Trio.load(small["base"], folder, small["plain"], torch.float32)
        for name, folder in (*small["merged"].items(), (None, small["plain"]))
    }

    def answer(name: str | None, prompt: int, alpha: float) -> list[int]:
        key = (name, prompt, 0.0 if name is None else alpha)
        if key not in known:
            known[key] = greedy(trios[name], PROMPTS[prompt], STEPS, key[2])[0]
        return known[key]

    return answer


def ask(llm, cases: list[Case]) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": PROMPTS[prompt]} for _, prompt, _ in cases],
        [greedy_params(STEPS, proxy_alpha=alpha) for *_, alpha in cases],
        lora_request=[llm.adapters.get(name) for name, *_ in cases],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


CASES: list[Case] = [
    (None, 0, 3.0),
    ("safety", 0, 1.0),
    ("code", 0, 1.0),
    ("terse", 1, 0.5),
    ("safety", 2, -1.5),
    (None, 2, 1.0),
    ("code", 1, 0.5),
    ("code", 3, 0.0),
]


def adapted(small) -> dict[str, Any]:
    """Arguments of an engine with fewer slots than adapters."""
    return {
        "model": small["base"],
        "antiexpert": small["plain"],
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 3,
        "lora_modules": small["adapters"],
    }


def test_any_mix_of_adapters_and_alphas(small, truth):
    """Two slots for three adapters, so that they also change places; prompts in chunks."""
    with running(**adapted(small)) as llm:
        assert llm.apply_model(shared_layers) == [SHARED]
        want = [truth(*case) for case in CASES]
        assert len({tuple(tokens) for tokens in want}) == len(CASES)
        assert ask(llm, CASES) == want
        # Again, from the prefix cache, which must keep adapters apart.
        assert ask(llm, CASES[::-1]) == want[::-1]
        check_lines(llm, want)


SHARED = {"gate_up_proj": True, "qkv_proj": True, "embed_tokens": True, "keys": False}


def shared_layers(model) -> dict[str, bool]:
    """Which layers of the expert, inside their adapters, are those of the antiexpert."""
    own, other = model.expert.model, model.antiexpert.model
    pairs = {
        "gate_up_proj": (own.layers[0].mlp.gate_up_proj, other.layers[0].mlp.gate_up_proj),
        "qkv_proj": (own.layers[0].self_attn.qkv_proj, other.layers[0].self_attn.qkv_proj),
        "embed_tokens": (own.embed_tokens, other.embed_tokens),
    }
    shared = {name: mine.base_layer is theirs for name, (mine, theirs) in pairs.items()}
    return {**shared, "keys": own.layers[0].self_attn.attn is other.layers[0].self_attn.attn}


def check_lines(llm, want: list[list[int]]) -> None:
    """The same as lines of a file, some in OpenAI's format, and names that there are not."""
    sampling = {"temperature": 0, "max_tokens": STEPS, "ignore_eos": True}
    lines = []
    for number, (name, prompt, alpha) in enumerate(CASES):
        lines.append({"prompt": PROMPTS[prompt], "proxy_alpha": alpha, "lora": name, **sampling})
        if number % 2:
            lines[-1] = openai_line(name or llm.model_config.model, PROMPTS[prompt], alpha)
    lines += [{"prompt": "w5", "lora": "rude"}, openai_line("gpt-4", [5], 1.0)]
    results = list(BatchGenerator(llm, LineOptions(token_ids=True)).run(enumerate(lines, start=1)))
    *good, unknown, unserved = results
    assert "lora is 'rude': --lora-modules names safety, code, terse" in unknown.error
    assert unserved.openai
    assert "body.model is 'gpt-4', which does not exist: there are" in unserved.error
    for result, case, tokens in zip(good, CASES, want, strict=True):
        assert result.error is None
        output = result.output
        if result.openai:
            output = output["response"]["body"]
            assert output["model"] == case[0] or case[0] is None
            output = output["choices"][0]
        else:
            assert output.get("lora") == case[0]
        assert output["token_ids"] == tokens


def openai_line(model: str, prompt: list[int], alpha: float) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": STEPS}
    body |= {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"proxy_alpha": alpha}}
    return {"custom_id": model, "method": "POST", "url": "/v1/completions", "body": body}


@pytest.mark.skipif(RUNNER == "v2", reason="the products on a CPU do not depend on the runner")
def test_adapters_of_another_expert_and_drafts(small, tmp_path):
    """With an expert of its own, a request without an adapter is steered by that one.

    All slots are taken here, and vLLM's products on a CPU would give such rows the last one's.
    """
    import torch

    expert = make_model(tmp_path / "expert", seed=4, heads=2, kv_heads=1, layers=2)
    experts = {name: merge(tmp_path / name, expert, a) for name, a in small["adapters"].items()}
    trios = {
        name: Trio.load(small["base"], folder, small["plain"], torch.float32)
        for name, folder in ((None, expert), *experts.items())
    }
    cases: list[Case] = [("safety", 0, 1.0), (None, 0, 1.0), ("code", 1, 0.5), (None, 2, -1.0)]
    with running(
        model=small["base"],
        expert=expert,
        antiexpert=small["plain"],
        enable_lora=True,
        max_loras=2,
        speculative_tokens=2,
        lora_modules={name: small["adapters"][name] for name in ("safety", "code")},
    ) as llm:
        got = ask(llm, cases)
    for tokens, (name, prompt, alpha) in zip(got, cases, strict=True):
        assert tokens == greedy(trios[name], PROMPTS[prompt], STEPS, alpha)[0], name


def test_drafts_are_those_of_the_requests_adapter(small):
    """Where base and antiexpert are one model, alpha 1 is the expert alone: every draft holds."""
    with running(
        model=small["plain"],
        antiexpert=small["plain"],
        enable_lora=True,
        max_loras=2,
        speculative_tokens=3,
        disable_log_stats=False,
        lora_modules={name: small["adapters"][name] for name in ("safety", "code")},
    ) as llm:
        ask(llm, [("safety", 0, 1.0), ("code", 1, 1.0), ("safety", 2, 1.0), ("code", 3, 1.0)])
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    # The last draft of an answer may come too late to be taken.
    assert counts["vllm:spec_decode_num_accepted_tokens"] >= 0.9 * drafted > 0


@pytest.mark.parametrize("drafts", [None, 2], ids=["plain", "drafts"])
def test_explained_answers(small, drafts):
    """Each with its own expert's values: greedy, several answers, vLLM's log-probabilities."""
    import torch

    from proxy_vllm.explain import explanations

    kinds: list[tuple[str | None, float, dict[str, Any]]] = [
        ("safety", 1.0, {}),
        ("code", 0.5, {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": 2}),
        (None, 1.0, {"logprobs": 1}),
        ("terse", -0.5, {"temperature": 0.8, "seed": 5, "presence_penalty": 0.7}),
    ]
    names = [name for name, *_ in kinds]

    def trio_of(name: str | None) -> Trio:
        expert = small["merged"].get(name, small["plain"])
        return Trio.load(small["base"], expert, small["plain"], torch.float32)

    with running(**adapted(small) | {"max_loras": 3}, speculative_tokens=drafts) as llm:

        def answers(top: int | None) -> list:
            params = [greedy_params(STEPS, proxy_alpha=a, **kind) for _, a, kind in kinds]
            for each in params:
                each.extra_args |= {} if top is None else {"proxy_explain": True}
            return llm.generate(
                [{"prompt_token_ids": ids} for ids in PROMPTS],
                params,
                lora_request=[llm.adapters.get(name) for name in names],
                use_tqdm=False,
            )

        plain, found = answers(None), answers(5)
        adapters = [llm.adapters.get(name) for name in names]
        params = [greedy_params(STEPS, proxy_alpha=a) for _, a, _ in kinds]
        shown = llm.explain(PROMPTS, params, lora_request=adapters, use_tqdm=False)
        (chat,) = llm.explain(
            [{"role": "user", "content": "w7"}],
            params[0],
            lora_request=adapters[0],
            use_tqdm=False,
        )
    assert [answer.lora for answer in (*shown, chat)] == [*names, "safety"]
    for prompt, (name, alpha, _), answer in zip(PROMPTS, kinds, shown, strict=True):
        tokens = [token.chosen.token_id for token in answer.tokens]
        assert_explained(answer.tokens, trio_of(name), prompt, tokens, alpha, 5)
    for prompt, (name, alpha, kind), before, output in zip(PROMPTS, kinds, plain, found):
        trio = trio_of(name)
        assert len(output.outputs) == kind.get("n", 1)
        for old, answer in zip(before.outputs, output.outputs, strict=True):
            assert answer.token_ids == old.token_ids
            assert_explained(explanations(answer), trio, prompt, answer.token_ids, alpha, 5)
            steered = log_probabilities(trio, prompt, list(answer.token_ids), alpha)["steered"]
            for at, shown in enumerate(answer.logprobs or []):
                for token, value in shown.items():
                    assert abs(value.logprob - steered[at, token]) < 1e-4


@pytest.mark.slow
def test_two_ranks(small, truth, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running(**adapted(small), tensor_parallel_size=2) as llm:
        assert ask(llm, CASES) == [truth(*case) for case in CASES]


@pytest.mark.slow
@pytest.mark.skipif(RUNNER == "v2", reason="Dynamo cannot trace Triton's interpreter")
def test_compiled(small, truth, tmp_path, monkeypatch):
    """Steps of other sizes and adapters than those that were traced; one without any adapter."""
    from vllm.config import CompilationMode

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with running(**adapted(small), enforce_eager=False) as llm:
        # Of the worker too, which is in this process: vLLM itself compiles none with adapters.
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        assert mode == CompilationMode.DYNAMO_TRACE_ONCE
        for cases in (CASES[:1], CASES[1:2], CASES, CASES[3:5]):
            assert ask(llm, cases) == [truth(*case) for case in cases]


@pytest.mark.slow
def test_a_thousand_loads_leave_nothing_behind(small, truth):
    from vllm.lora.request import LoRARequest

    paths = list(small["adapters"].values())
    with running(**adapted(small)) as llm:
        engine, process = llm.llm_engine, psutil.Process()
        for number in range(1, 1001):
            engine.add_lora(LoRARequest(f"load-{number}", 100 + number, paths[number % 3]))
            if number % 3 == 0:
                assert engine.remove_lora(100 + number)
            if number % 250 == 0:
                assert ask(llm, CASES) == [truth(*case) for case in CASES]
            if number == 250:
                gc.collect()
                before = process.memory_info().rss
        assert len(engine.list_loras()) <= 3
        gc.collect()
        assert process.memory_info().rss - before < 8 << 20
