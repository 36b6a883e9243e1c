"""Each model its own prompt: token-exact against three models, whatever the scheduler does.

Own prompts need Model Runner V2; on the V1 runner only the refusal is tested.
"""

import random
from typing import Any

import pytest
import torch
from engines import GRAPHS, SMALL, V2, counted_graphs, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from proxy_vllm import ProxyLLM
from proxy_vllm.errors import UserError

BLOCK = SMALL["block_size"]
KEYS = {"expert": "proxy_expert_prompt", "antiexpert": "proxy_antiexpert_prompt"}

v2 = pytest.mark.skipif(not V2, reason="own prompts need Model Runner V2")
# What differs between a CPU and a GPU is asked of both: the second runs under CUDA graphs.
modes = pytest.mark.parametrize(
    "mode", [pytest.param({}, id="eager"), pytest.param(GRAPHS, id="graphs", marks=pytest.mark.gpu)]
)


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


def prompts_of(lengths: tuple[int | None, ...], seed: int) -> Any:
    """Random prompts: a list of ids where only the base has a length, else one for each role."""
    ids = prompt_ids([n or 1 for n in lengths], seed=seed)
    prompt = {r: p for r, n, p in zip(("base", "expert", "antiexpert"), lengths, ids) if n}
    return prompt if len(prompt) > 1 else prompt["base"]


def params_of(prompt: Any, max_tokens: int, alpha: float, **kwargs: Any) -> Any:
    params = greedy_params(max_tokens, proxy_alpha=alpha, **kwargs)
    if isinstance(prompt, dict):
        params.extra_args |= {KEYS[role]: ids for role, ids in prompt.items() if role != "base"}
    return params


def base_of(prompt: Any) -> list[int]:
    return prompt["base"] if isinstance(prompt, dict) else prompt


def check(llm, reference, prompts, alphas=None, max_tokens=12) -> list[Any]:
    """Generate greedily in one batch, and compare every token with the loop."""
    alphas = alphas or [1.0] * len(prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": base_of(p)} for p in prompts],
        [params_of(p, max_tokens, a) for p, a in zip(prompts, alphas, strict=True)],
        use_tqdm=False,
    )
    for prompt, alpha, output in zip(prompts, alphas, outputs, strict=True):
        want, _ = greedy(reference, prompt, max_tokens, alpha)
        lengths = {r: len(p) for r, p in prompt.items()} if isinstance(prompt, dict) else None
        assert list(output.outputs[0].token_ids) == want, (lengths, len(base_of(prompt)), alpha)
        assert output.prompt_token_ids == base_of(prompt)
    return outputs


LENGTHS = [
    (40, 41, None),
    (40, 39, None),
    (40, 40, None),
    (33, 33 + 3 * BLOCK, None),
    (33 + 3 * BLOCK, 33, None),
    (1, 64, None),
    (64, 1, None),
    (31, 32, 33),
    (32, 33, 31),
    (33, 31, 32),
    (1, 2, 130),
    (130, 2, 1),
    (64, 96, 32),
    (20, None, 70),
]


@v2
@modes
@pytest.mark.parametrize("budget, sequences", [(96, 8), (32, 4), (8, 2)])
def test_every_mix_of_lengths(trio, reference, budget, sequences, mode):
    """Chunks larger and smaller than the differences; the second round reuses cached blocks."""
    alphas = [1.0, 0.5, -1.0, 0.0, 2.0]
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": sequences, **mode}
    with running(**trio, own_prompts=True, **settings) as llm, counted_graphs() as graphs:
        for i in range(0, len(LENGTHS), 7):
            prompts = [prompts_of(n, seed=100 + i + j) for j, n in enumerate(LENGTHS[i : i + 7])]
            prompts.insert(3, prompts_of((45, None, None), seed=200 + i))
            mixed = [alphas[(i + j) % 5] for j in range(len(prompts))]
            check(llm, reference, prompts, mixed)
            check(llm, reference, prompts, mixed[::-1])
    # Most steps decode; a prompt is read in a few, or in one for each token of its budget.
    assert (graphs["whole"] > 12 and graphs["piecewise"] > 4) == bool(mode)


@v2
@modes
def test_without_prefix_caching(trio, reference, mode):
    prompts = [prompts_of(n, seed=300 + i) for i, n in enumerate(LENGTHS[4:9])]
    settings = {"enable_prefix_caching": False, "max_num_batched_tokens": 40, **mode}
    with running(**trio, own_prompts=True, **settings) as llm:
        check(llm, reference, [*prompts, *prompts], max_tokens=8)


@v2
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one GPU")
def test_tensor_parallel(trio, reference, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = [prompts_of(n, seed=350 + i) for i, n in enumerate(LENGTHS[3:9])]
    with running(
        **trio, own_prompts=True, tensor_parallel_size=2, max_num_batched_tokens=40
    ) as llm:
        check(llm, reference, prompts, [1.0, 0.5, -1.0, 2.0, 1.0, 0.5], max_tokens=6)


@v2
@modes
def test_random_lengths_arriving_while_others_run(trio, reference, mode):
    """Requests join in the middle of others, so prompts of one meet decodes of another."""
    rng = random.Random(7)

    def some() -> int:
        return rng.choice([1, 2, 30, 31, 32, 33, 63, 64, 65, rng.randint(1, 150)])

    prompts = [prompts_of((some(), some(), rng.choice([None, some()])), seed=i) for i in range(12)]
    prompts[4:4] = [prompts_of((some(), None, None), seed=50)]
    alphas = [rng.choice([1.0, 0.5, -1.0, 0.0]) for _ in prompts]
    lengths = [rng.randint(2, 40) for _ in prompts]
    tokens: dict[str, list[int]] = {}
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 4, **mode}
    with running(**trio, own_prompts=True, **settings) as llm:
        engine, waiting = llm.llm_engine, list(range(len(prompts)))
        while waiting or engine.has_unfinished_requests():
            if waiting and rng.random() < 0.4:
                i = waiting.pop(0)
                params = params_of(prompts[i], lengths[i], alphas[i])
                engine.add_request(str(i), {"prompt_token_ids": base_of(prompts[i])}, params)
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    for i, prompt in enumerate(prompts):
        assert tokens[str(i)] == greedy(reference, prompt, lengths[i], alphas[i])[0], i


@v2
@modes
def test_preemption(trio, reference, mode):
    """Requests that outgrow the cache are preempted, and rebuild all three caches."""
    lengths = [(30, 45, None), (35, 20, None), (28, None, 60), (31, 2, 33), (20, None, None)]
    prompts = [prompts_of(n, seed=400 + i) for i, n in enumerate(lengths)]
    with running(
        **trio,
        own_prompts=True,
        num_gpu_blocks_override=12,
        disable_log_stats=False,
        max_num_batched_tokens=32,
        **mode,
    ) as llm:
        check(llm, reference, prompts, [1.0, 0.5, -1.0, 2.0, 1.0], max_tokens=60)
        preempted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0


@pytest.fixture(scope="module")
def cached(trio):
    with running(**trio, own_prompts=True) as llm:
        yield llm


@v2
@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
@pytest.mark.parametrize("lengths", [(70, 70, 70), (70, 100, 80), (100, 70, 101)])
def test_cache_is_keyed_by_all_three_prompts(cached, reference, role, lengths):
    """Requests that agree in two prompts and differ in the first token of the third share none."""
    cached.reset_prefix_cache()
    first = prompts_of(lengths, seed=500)
    other = {**first, role: [first[role][0] % 100 + 5, *first[role][1:]]}
    assert other != first
    (cold,) = check(cached, reference, [first])
    (warm,) = check(cached, reference, [first])
    (miss,) = check(cached, reference, [other])
    assert (cold.num_cached_tokens, miss.num_cached_tokens) == (0, 0)
    # Blocks of prompt tokens of all three models are reused, counted as the base counts.
    shared = min(lengths) // BLOCK * BLOCK
    assert warm.num_cached_tokens == max(0, shared - (max(lengths) - lengths[0]))
    (plain,) = check(cached, reference, [first["base"]])
    assert plain.num_cached_tokens == 0


@v2
def test_cache_ends_where_generated_tokens_begin(cached, reference):
    """A model that is behind writes generated tokens into blocks that the scheduler holds for full.

    Requests with one set of prompts that answer differently must not meet in such a block.
    """
    cached.reset_prefix_cache()
    prompt = prompts_of((40, 130, None), seed=510)
    together = check(cached, reference, [prompt] * 4, [1.0, -1.0, 0.5, 0.0], max_tokens=70)
    assert len({tuple(o.outputs[0].token_ids) for o in together}) == 4
    later = check(cached, reference, [prompt] * 2, [2.0, 1.0], max_tokens=70)
    assert {o.num_cached_tokens for o in later} == {0}


@v2
def test_a_longer_prompt_reuses_the_common_beginning(cached, reference):
    """Also the generated tokens of an earlier turn, where all prompts grow alike."""
    cached.reset_prefix_cache()
    turn = prompts_of((64, 64, None), seed=520)
    (first,) = check(cached, reference, [turn], max_tokens=40)
    said = list(first.outputs[0].token_ids) + prompt_ids([9], seed=521)[0]
    following = {role: ids + said for role, ids in turn.items()}
    (second,) = check(cached, reference, [following])
    assert second.num_cached_tokens == 96


@v2
def test_several_answers_to_one_request(cached, reference):
    """Every sampled token has the probability that the three models give it after the others."""
    prompt = prompts_of((40, 75, 20), seed=530)
    params = params_of(prompt, 40, 0.5)
    params = SamplingParams(
        n=3,
        temperature=1.5,
        seed=3,
        max_tokens=40,
        logprobs=0,
        extra_args=params.extra_args,
        ignore_eos=True,
    )
    (output,) = cached.generate([{"prompt_token_ids": prompt["base"]}], params, use_tqdm=False)
    answers = [list(o.token_ids) for o in output.outputs]
    assert len({tuple(a) for a in answers}) == 3
    for tokens, answer in zip(answers, output.outputs, strict=True):

        def forced(done: list[int], logits: torch.Tensor, tokens: list[int] = tokens):
            return torch.nn.functional.one_hot(torch.tensor(tokens[len(done)]), len(logits))

        same, steps = greedy(reference, prompt, 40, 0.5, process=forced)
        assert same == tokens
        for token, logits, got in zip(tokens, steps, answer.logprobs, strict=True):
            want = float(logits.log_softmax(-1)[token])
            assert got[token].logprob == pytest.approx(want, abs=2e-4)


@v2
def test_penalties_see_the_tokens_of_the_base_prompt(cached, reference):
    """The padding adds no token to those that a repetition penalty pushes down."""
    prompt = prompts_of((5, 60, None), seed=540)
    (output,) = cached.generate(
        [{"prompt_token_ids": prompt["base"]}],
        params_of(prompt, 20, 1.0, repetition_penalty=1.8),
        use_tqdm=False,
    )

    def penalise(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen = sorted({*prompt["base"], *generated})
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        return logits

    want, _ = greedy(reference, prompt, 20, 1.0, process=penalise)
    assert list(output.outputs[0].token_ids) == want


@v2
def test_logprobs_of_sampled_tokens(cached, reference):
    prompt = prompts_of((33, 12, 60), seed=550)
    (output,) = cached.generate(
        [{"prompt_token_ids": prompt["base"]}],
        params_of(prompt, 6, 0.5, logprobs=2),
        use_tqdm=False,
    )
    tokens, steps = greedy(reference, prompt, 6, 0.5)
    assert list(output.outputs[0].token_ids) == tokens
    for token, logits, got in zip(tokens, steps, output.outputs[0].logprobs, strict=True):
        assert got[token].logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=2e-4)


@v2
def test_the_longest_prompt_meets_the_length_limit(cached, reference):
    """256 positions: an expert prompt of 250 tokens leaves room for 6, whatever the base holds."""
    prompt = prompts_of((10, 250, None), seed=560)
    (output,) = cached.generate(
        [{"prompt_token_ids": prompt["base"]}], params_of(prompt, 30, 1.0), use_tqdm=False
    )
    assert list(output.outputs[0].token_ids) == greedy(reference, prompt, 6, 1.0)[0]
    assert output.outputs[0].finish_reason == "length"


@v2
def test_a_prompt_for_each_model_offline(cached, reference):
    """Text and ids, the missing antiexpert reads the base's, and all three alike is no special."""
    words = {r: " ".join(f"w{i}" for i in p) for r, p in prompts_of((9, 50, 4), seed=570).items()}
    ids = {role: [int(w[1:]) for w in text.split()] for role, text in words.items()}
    prompts = [
        words,
        {"base": words["base"], "expert": ids["expert"]},
        {"base": ids["base"], "antiexpert": words["antiexpert"]},
        {"base": ids["base"], "expert": words["base"]},
        words["base"],
    ]
    wanted = [
        ids,
        {r: ids[r] for r in ("base", "expert")},
        {r: ids[r] for r in ("base", "antiexpert")},
        ids["base"],
        ids["base"],
    ]
    outputs = cached.generate(prompts, greedy_params(8), use_tqdm=False)
    for output, prompt in zip(outputs, wanted, strict=True):
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, 8, 1.0)[0]
        assert output.prompt_token_ids == ids["base"]
    (single,) = cached.generate(words, greedy_params(8), use_tqdm=False)
    assert list(single.outputs[0].token_ids) == greedy(reference, ids, 8, 1.0)[0]


@v2
@pytest.mark.parametrize(
    "prompt, fields, message",
    [
        ({"base": [5] * 256, "expert": [5]}, {}, "the base's prompt has 256 tokens"),
        ({"base": "w5 " * 256, "expert": [5]}, {}, "the base's prompt has 256 tokens"),
        ({"base": [5], "expert": [5] * 256}, {}, "the expert's prompt has 256 tokens"),
        ({"base": [5], "antiexpert": [5] * 300}, {}, "the antiexpert's prompt has 300 tokens"),
        ({"base": [5], "expert": []}, {}, "the expert's prompt is empty"),
        ({"base": [5], "expert": [5, 111]}, {}, "token id 111, but its vocabulary ends at 110"),
        ({"base": [5], "expert": [5, -1]}, {}, "no list of token ids"),
        ({"base": [5], "expert": 3.5}, {}, "no list of token ids"),
        ({"expert": [5]}, {}, "needs a `base`"),
        ({"base": [5], "exprt": [5]}, {}, "exprt"),
        ({"base": [5], "expert": [6]}, {"prompt_logprobs": 1}, "prompt_logprobs with own prompts"),
    ],
)
def test_refusals_name_the_culprit_and_harm_nobody(cached, reference, prompt, fields, message):
    good = prompts_of((20, 40, None), seed=580)
    params = [greedy_params(4), greedy_params(4, **fields)]
    with pytest.raises(UserError, match=message) as error:
        cached.generate([good, prompt], params, use_tqdm=False)
    assert "\n" not in str(error.value)
    assert not cached.llm_engine.has_unfinished_requests()
    check(cached, reference, [good], max_tokens=4)


@v2
def test_what_would_lose_own_prompts_refuses_them(cached, reference):
    """Beam search makes requests of its own, and a cut would be the base's alone."""
    own = prompts_of((20, 40, None), seed=585)
    with pytest.raises(UserError, match="use generate"):
        cached.beam_search([own["base"], own], BeamSearchParams(beam_width=2, max_tokens=2))
    cut = {"truncate_prompt_tokens": 8}
    with pytest.raises(UserError, match="truncate_prompt_tokens"):
        cached.generate(own, greedy_params(2), tokenization_kwargs=cut, use_tqdm=False)
    assert not cached.llm_engine.has_unfinished_requests()
    # What the refusal names works, and beams of one prompt for all go on working.
    check(cached, reference, [own], max_tokens=4)
    params = BeamSearchParams(beam_width=1, max_tokens=4, ignore_eos=True)
    (beams,) = cached.beam_search([{"prompt_token_ids": own["base"]}], params)
    want, _ = greedy(reference, own["base"], 4, 1.0)
    assert beams.sequences[0].tokens[len(own["base"]) :] == want


@v2
def test_what_comes_past_admission_ends_with_an_error(cached, reference):
    """A request added to the engine itself, with prompts that nobody checked."""
    good = prompts_of((20, 40, None), seed=590)
    engine = cached.llm_engine
    for i, bad in enumerate(("text", [5] * 400, [], [1.5], [5, 111], {"a": 1})):
        params = greedy_params(8, proxy_alpha=1.0)
        params.extra_args["proxy_expert_prompt"] = bad
        engine.add_request(f"bad{i}", {"prompt_token_ids": good["base"]}, params)
    params = params_of(good, 8, 1.0)
    engine.add_request("good", {"prompt_token_ids": good["base"]}, params)
    ended = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                ended[output.request_id] = output.outputs[0]
    assert list(ended.pop("good").token_ids) == greedy(reference, good, 8, 1.0)[0]
    assert len(ended) == 6
    assert {(o.finish_reason, tuple(o.token_ids)) for o in ended.values()} == {("error", ())}


@pytest.mark.skipif(V2, reason="the V1 runner's refusal")
def test_the_v1_runner_refuses_and_names_the_way_out(trio):
    with running(**trio) as llm:
        for prompt, extra in (
            ({"base": [5, 6], "expert": [7]}, {}),
            ("w5 w6", {"proxy_expert_prompt": [7]}),
        ):
            params = greedy_params(4, proxy_alpha=1.0)
            params.extra_args |= extra
            with pytest.raises(UserError, match="PROXY_VLLM_CPU_RUNNER=v2"):
                llm.generate([prompt], params, use_tqdm=False)
        assert llm.generate(["w5 w6"], greedy_params(4), use_tqdm=False)[0].outputs
    with pytest.raises(UserError, match=r"chat template .*PROXY_VLLM_CPU_RUNNER=v2"):
        ProxyLLM(**trio, expert_chat_template="plain")


@v2
def test_other_drafters_exclude_own_prompts(trio):
    drafts = {"method": "ngram", "num_speculative_tokens": 2}
    with pytest.raises(UserError, match="--speculative-config excludes"):
        ProxyLLM(**trio, speculative_config=drafts, own_prompts=True)


@v2
def test_an_engine_that_was_not_set_up_for_them_says_so(trio, reference):
    with running(**trio) as llm:
        with pytest.raises(UserError, match="--own-prompts"):
            llm.generate([{"base": [5], "expert": [6]}], greedy_params(4), use_tqdm=False)
        check(llm, reference, [prompts_of((20, None, None), seed=3)], max_tokens=4)


MESSAGES = [
    {"role": "system", "content": "w9 w10"},
    {"role": "user", "content": [{"type": "text", "text": "w11 w12 w13"}]},
]


def ids_of(text: str) -> list[int]:
    special = {"user": 2, "assistant": 3}
    return [special.get(w) or (int(w[1:]) if w[1:].isdigit() else 0) for w in text.split()]


@v2
def test_chat_renders_each_role_by_its_own_template(trio, reference, tmp_path):
    """The tokenizers know user, assistant and wN; every other word reads as token 0."""
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}w20 {{ m.content }} {% endfor %}w21")
    texts = {
        "base": "w9 w10 w11 w12 w13",
        "expert": "system w9 w10 user w11 w12 w13 assistant",
        "antiexpert": "w20 w9 w10 w20 w11 w12 w13 w21",
    }
    templates = {"base": "plain", "expert": "auto", "antiexpert": str(own)}
    with running(**trio, **{f"{r}_chat_template": t for r, t in templates.items()}) as llm:
        (output,) = llm.chat(MESSAGES, greedy_params(8), use_tqdm=False)
        prompt = {role: ids_of(text) for role, text in texts.items()}
        assert output.prompt_token_ids == prompt["base"]
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, 8, 1.0)[0]
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        with pytest.raises(UserError, match="read text only"):
            llm.chat(image, greedy_params(4), use_tqdm=False)
