"""Requests against an endpoint whose whole distribution the test knows; no engine."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from fake_base import KEY, VOCAB, FakeBase, logprobs, serving, shift
from vllm import SamplingParams

from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.endpoint import Endpoint
from proxy_vllm.remote_base.sampling import check_parameters
from proxy_vllm.remote_base.settings import RemoteBase
from proxy_vllm.remote_base.steering import Steering
from proxy_vllm.remote_base.usage import BaseUnavailable

PROMPT = [40, 41, 42]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("PROXY_VLLM_BASE_API_KEY", KEY)


def settings(url: str, **more) -> RemoteBase:
    return RemoteBase(**{"url": url, "model": "base", "timeout": 2.0, "retries": 3, **more})


def truth(params: SamplingParams, count: int, prompt=PROMPT) -> list[int]:
    """The steered greedy answer from whole distributions, penalties and biases included."""
    output: list[int] = []
    for _ in range(count):
        scores = logprobs([*prompt, *output]) + shift([*prompt, *output])
        for token, bias in (params.logit_bias or {}).items():
            scores[token] += bias
        for token in set(output):
            scores[token] -= params.presence_penalty
            scores[token] -= params.frequency_penalty * output.count(token)
        output.append(int(scores.argmax()))
    return output


def answer(base: FakeBase, params: SamplingParams, count: int, prompts=(PROMPT,), **more):
    """The choices of each prompt, the endpoint and its requests' steering."""

    async def run(url: str):
        endpoint = Endpoint(settings(url, **more), base.tokenizer, VOCAB)
        try:
            endpoint.settings = await endpoint.probe()

            async def pair(ids):
                await asyncio.sleep(0)
                return shift(list(ids))

            async def draft(ids, count):
                # An expert that is right about half of the time.
                output = truth(params, count, list(ids))
                return [t if (len(ids) + i) % 2 else 7 for i, t in enumerate(output)]

            async def one(prompt):
                steering = Steering(endpoint, pair, draft, params, prompt, VOCAB, seed=7)
                return [c async for c in steering.choices(count)], steering

            return await asyncio.gather(*map(one, prompts), return_exceptions=True), endpoint
        finally:
            await endpoint.close()

    with serving(base) as url:
        return asyncio.run(run(url))


GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_exact_mode_is_exact(k):
    prompts = [[i, i + 1] for i in range(12)]
    base = FakeBase()
    answers, endpoint = answer(base, GREEDY, 12, prompts, top_logprobs=k, max_questions=6)
    questions = 0
    for prompt, (choices, steering) in zip(prompts, answers):
        assert [c.token for c in choices] == truth(GREEDY, 12, prompt)
        assert all(c.certified for c in choices)
        questions += steering.usage.questions
        # A trip for each correction of the base, and the first one.
        output = [c.token for c in choices]
        own = [int(logprobs([*prompt, *output[:i]]).argmax()) for i in range(11)]
        corrections = sum(a != b for a, b in zip(output[:11], own))
        assert steering.usage.trips == corrections + 1
    assert questions > 0 if k < 20 else True
    assert base.keys == {f"Bearer {KEY}"}
    assert endpoint.guard.usage.calls == sum(base.calls.values())


@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_k_mode_certifies_nothing_wrong_and_bounds_the_mass(k):
    prompts = [[i, i + 1] for i in range(12)]
    answers, _ = answer(FakeBase(), GREEDY, 12, prompts, mode="top-k", top_logprobs=k)
    certified = 0
    for prompt, (choices, steering) in zip(prompts, answers):
        output: list[int] = []
        for choice in choices:
            ids = [*prompt, *output]
            scores = logprobs(ids) + shift(ids)
            if choice.certified:
                assert choice.token == scores.argmax()
                certified += 1
            probs = np.exp(scores - scores.max())
            probs /= probs.sum()
            outside = ~np.isin(np.arange(VOCAB), choice.ids)
            assert probs[outside].sum() <= choice.cut_mass + 1e-6
            output.append(choice.token)
        assert steering.usage.questions == 0
    assert certified > 0


def test_an_answer_that_is_not_wanted_any_more_closes_the_stream():
    base = FakeBase()

    async def run(url: str) -> None:
        endpoint = Endpoint(settings(url, mode="top-k"), base.tokenizer, VOCAB)
        await endpoint.probe()

        async def pair(ids):
            return np.zeros(VOCAB)  # never overrules the base

        steering = Steering(endpoint, pair, None, GREEDY, PROMPT, VOCAB, seed=0)
        choices = steering.choices(100_000)
        await anext(choices)
        await choices.aclose()
        deadline = time.monotonic() + 20
        while not base.closed_early and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await endpoint.close()

    with serving(base) as url:
        asyncio.run(run(url))
    assert base.closed_early == 1


def test_full_vocabulary_is_exact_without_questions():
    ((choices, steering),), _ = answer(FakeBase(), GREEDY, 8, top_logprobs=-1)
    assert [c.token for c in choices] == truth(GREEDY, 8)
    assert steering.usage.questions == 0
    assert all(c.cut_mass == 0 for c in choices)


def test_drafts_change_no_token_and_save_trips():
    prompts = [[i, i + 1] for i in range(8)]
    drafted, _ = answer(FakeBase(), GREEDY, 12, prompts, drafts=3, max_questions=6)
    plain, _ = answer(FakeBase(), GREEDY, 12, prompts, max_questions=6)
    for prompt, (choices, _) in zip(prompts, drafted):
        assert [c.token for c in choices] == truth(GREEDY, 12, prompt)
    trips = [sum(s.usage.trips for _, s in answers) for answers in (drafted, plain)]
    assert trips[0] < trips[1]


@pytest.mark.parametrize("biased_rows", [False, True])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_rows_of_drafts_come_with_their_question_answered(k, biased_rows):
    prompts = [[i, i + 1] for i in range(8)]
    base = FakeBase(biased_rows=biased_rows)
    settings = {"top_logprobs": k, "max_questions": 6}
    drafted, endpoint = answer(base, GREEDY, 12, prompts, drafts=6, **settings)
    assert endpoint.settings.compares != biased_rows
    plain, _ = answer(FakeBase(), GREEDY, 12, prompts, **settings)
    for prompt, (choices, _) in zip(prompts, drafted):
        output: list[int] = []
        assert all(c.certified for c in choices)
        assert [c.token for c in choices] == truth(GREEDY, 12, prompt)
        for choice in choices:
            scores = logprobs([*prompt, *output]) + shift([*prompt, *output])
            probs = np.exp(scores - np.logaddexp.reduce(scores))
            assert probs[~np.isin(np.arange(VOCAB), choice.ids)].sum() <= choice.cut_mass + 1e-6
            output.append(choice.token)
    questions = [sum(s.usage.questions for _, s in answers) for answers in (drafted, plain)]
    if not biased_rows:
        assert questions[0] < questions[1] / 2


PENALTIES = SamplingParams(
    temperature=0, presence_penalty=0.7, frequency_penalty=0.3, logit_bias={5: 9.0, 6: -50.0}
)


@pytest.mark.parametrize("drafts", [0, 4])
def test_penalties_and_biases_are_part_of_the_shift(drafts):
    params = PENALTIES
    ((choices, _),), _ = answer(FakeBase(), params, 10, top_logprobs=5, drafts=drafts)
    assert [c.token for c in choices] == truth(params, 10)
    assert 5 in [c.token for c in choices]


@pytest.mark.parametrize("changes", [{"ask_ids": None, "max_biases": 40}, {"max_biases": 0}])
def test_either_way_of_asking_is_exact(monkeypatch, changes):
    """The endpoint compares by biases, in parts; or it tells log-probabilities by id."""
    import proxy_vllm.remote_base.endpoint as endpoint

    plain = endpoint.get_dialect
    monkeypatch.setattr(endpoint, "get_dialect", lambda name: replace(plain(name), **changes))
    ((choices, steering),), _ = answer(FakeBase(), GREEDY, 10, top_logprobs=3, max_questions=12)
    assert [c.token for c in choices] == truth(GREEDY, 10)
    assert steering.usage.questions > 0


@pytest.mark.parametrize("changes", [{"ask_ids": None}, {"max_biases": 0}])
def test_one_of_a_few_tokens_that_the_endpoint_does_not_report(monkeypatch, changes):
    """The paper's case, multiple choice from one token, with choices outside the top."""
    import proxy_vllm.remote_base.endpoint as endpoint

    plain = endpoint.get_dialect
    monkeypatch.setattr(endpoint, "get_dialect", lambda name: replace(plain(name), **changes))
    allowed = np.argsort(logprobs(PROMPT))[:4].tolist()
    scores = logprobs(PROMPT) + shift(PROMPT)
    best = max(allowed, key=lambda token: scores[token])
    params = SamplingParams(temperature=0, allowed_token_ids=allowed)
    ((choices, steering),), _ = answer(FakeBase(), params, 1, top_logprobs=5)
    assert [(c.token, c.certified) for c in choices] == [(best, True)]
    assert not np.isnan(choices[0].logprobs).any() and steering.usage.questions == 1
    # Where nobody is asked again, nothing is made up.
    (failed,), _ = answer(FakeBase(), params, 1, top_logprobs=5, mode="top-k")
    assert isinstance(failed, BaseUnavailable)
    assert "none of the tokens that this request allows" in str(failed)


def test_a_base_that_is_surer_than_biases_keep_apart_wins_no_comparison(monkeypatch):
    import proxy_vllm.remote_base.steering as steering

    monkeypatch.setattr(steering, "_BIAS", 2.0)
    unlikely = np.argsort(logprobs(PROMPT))[:60]
    unlikely = unlikely[np.argsort(shift(PROMPT)[unlikely])]
    near = int(np.argmin(np.diff(shift(PROMPT)[unlikely])))
    allowed = unlikely[near : near + 2].tolist()
    scores = logprobs(PROMPT) + shift(PROMPT)
    params = SamplingParams(temperature=0, allowed_token_ids=allowed)
    ((choices, asked),), _ = answer(FakeBase(), params, 1, top_logprobs=5)
    assert [c.token for c in choices] == [max(allowed, key=lambda token: scores[token])]
    assert asked.usage.questions == 2  # by biases, and then by ids


def test_draws_follow_the_steered_distribution():
    from scipy.stats import chisquare

    params = SamplingParams(temperature=1.0)
    scores = logprobs(PROMPT) + shift(PROMPT)
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    counts = np.zeros(VOCAB)

    async def run(url: str) -> None:
        endpoint = Endpoint(settings(url, top_logprobs=-1), FakeBase().tokenizer, VOCAB)
        await endpoint.probe()
        row = await endpoint.row(PROMPT, Steering.__dataclass_fields__["usage"].default_factory())
        from proxy_vllm.remote_base.bounds import SteeredRow
        from proxy_vllm.remote_base.sampling import draw

        steered = SteeredRow(row, shift(PROMPT))
        for seed in range(4000):
            counts[draw(steered, params, np.random.default_rng([seed, 0]))] += 1
        await endpoint.close()

    with serving(FakeBase()) as url:
        asyncio.run(run(url))
    often = probs * 4000 >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probs[often], probs[~often].sum()) * 4000
    assert chisquare(observed, expected).pvalue > 1e-4


def test_a_drawn_token_says_what_its_distribution_left_out():
    params = SamplingParams(temperature=1.0, seed=3)
    ((exact, steering),), _ = answer(FakeBase(), params, 6, top_logprobs=5, max_questions=6)
    assert steering.usage.questions > 0
    ((rough, _),), _ = answer(FakeBase(), params, 6, top_logprobs=5, mode="top-k")
    assert sum(c.cut_mass for c in exact) < sum(c.cut_mass for c in rough)


@pytest.mark.parametrize(
    "faults", [[429], [500, 503], ["hang"], [408, 429, 500]], ids=lambda f: str(f)
)
def test_calls_that_fail_are_tried_again(faults):
    base = FakeBase([None, None, *faults])  # the first two calls are the check at the start
    ((choices, _),), _ = answer(base, GREEDY, 6, timeout=1.0)
    assert [c.token for c in choices] == truth(GREEDY, 6)


@pytest.mark.timeout(60)
def test_more_conversations_than_trips_at_once():
    """Each has a stream open while it asks about a token."""
    prompts = [[i, i + 1] for i in range(8)]
    answers, _ = answer(FakeBase(), GREEDY, 8, prompts, concurrency=2, top_logprobs=1)
    for prompt, (choices, _) in zip(prompts, answers):
        assert [c.token for c in choices] == truth(GREEDY, 8, prompt)


def test_a_stream_that_breaks_off_goes_on():
    base = FakeBase(faults=[None, None, "cut"])
    # A bias by which the base is never overruled, so that only the cut ends its stream.
    own = list(PROMPT)
    for _ in range(8):
        own.append(int(logprobs(own).argmax()))
    params = SamplingParams(temperature=0, logit_bias={t: 100.0 for t in own[3:]})
    ((choices, _),), _ = answer(base, params, 4)
    assert [c.token for c in choices] == truth(params, 4)
    assert base.faults == []


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ([500] * 3, "it answered 500"),
        ([401], "it answered 401"),
        (["json"], "not in the form of vllm"),
        (["form"], "not in the form of vllm"),
    ],
)
def test_a_call_that_fails_for_good_fails_its_request_alone(faults, reason):
    base = FakeBase(faults=[None, None, *faults])
    (failed, *others), _ = answer(base, GREEDY, 1, [PROMPT, [1, 2]], concurrency=1, retries=2)
    results = [failed, *others]
    errors = [r for r in results if isinstance(r, BaseUnavailable)]
    answered = [r for r in results if isinstance(r, tuple)]
    assert len(errors) == 1 and len(answered) == 1
    assert reason in str(errors[0])
    assert KEY not in str(errors[0])


def test_the_circuit_opens_and_closes():
    base = FakeBase(faults=[None, None, *[500] * 6])

    async def run(url: str):
        endpoint = Endpoint(settings(url, retries=0), base.tokenizer, VOCAB)
        await endpoint.probe()
        endpoint.guard.pause = 0.5
        from proxy_vllm.remote_base.usage import Usage

        errors = []
        for _ in range(8):
            try:
                await endpoint.row(PROMPT, Usage())
            except BaseUnavailable as error:
                errors.append(str(error))
        asked = sum(base.calls.values())
        await asyncio.sleep(0.6)
        with pytest.raises(BaseUnavailable):  # one call tries, and fails
            await endpoint.row(PROMPT, Usage())
        await asyncio.sleep(0.6)
        await endpoint.row(PROMPT, Usage())
        await endpoint.close()
        return errors, asked

    with serving(base) as url:
        errors, asked = asyncio.run(run(url))
    assert asked == 2 + 5
    assert "not asked for another" in errors[-1]


def test_limits_stop_before_more_is_spent():
    results, endpoint = answer(FakeBase(), GREEDY, 30, max_calls=6)
    assert isinstance(results[0], BaseUnavailable)
    assert "limit of 6 calls" in str(results[0])
    assert endpoint.guard.usage.calls == 6
    results, endpoint = answer(FakeBase(), GREEDY, 30, max_cost=1e-4, price="1,2")
    assert "limit of 0.0001 dollars" in str(results[0])


def test_an_endpoint_that_reports_fewer_is_believed_only_as_far():
    ((choices, _),), _ = answer(FakeBase(limit=2), GREEDY, 8, max_questions=8)
    assert [c.token for c in choices] == truth(GREEDY, 8)
    ((choices, _),), endpoint = answer(FakeBase(top=5), GREEDY, 8, max_questions=8)
    assert endpoint.top == 5
    assert [c.token for c in choices] == truth(GREEDY, 8)


@pytest.mark.parametrize("k", [1, 5])
def test_rows_that_the_endpoint_spoiled_certify_nothing_wrong(k):
    ((choices, _),), _ = answer(FakeBase(spoil=True), GREEDY, 12, top_logprobs=k, max_questions=8)
    assert [c.token for c in choices] == truth(GREEDY, 12)


def test_the_wrong_tokenizer_is_named():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    other = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="!"))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()

    async def run(url: str) -> None:
        wrong = PreTrainedTokenizerFast(tokenizer_object=other)
        endpoint = Endpoint(settings(url), wrong, VOCAB)
        try:
            await endpoint.probe()
        finally:
            await endpoint.close()

    with serving(FakeBase()) as url, pytest.raises(UserError, match="--base-tokenizer"):
        asyncio.run(run(url))


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": -1}, "logprobs=-1"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(params, name):
    with pytest.raises(UserError, match=name):
        check_parameters(SamplingParams(**params))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"url": "host:8000"}, "a URL is needed"),
        ({"url": "https://u:p@host/v1"}, "PROXY_VLLM_BASE_API_KEY"),
        ({"model": ""}, "--base-model"),
        ({"mode": "fast"}, "exact or top-k"),
        ({"top_logprobs": 0}, "at least 1"),
        ({"max_cost": 1.0}, "--price"),
        ({"price": "cheap"}, "PROMPT,COMPLETION"),
    ],
)
def test_bad_settings_are_one_line(more, message):
    with pytest.raises(UserError, match=message) as refused:
        settings("http://127.0.0.1/v1", **more) if "url" not in more else settings(**more)
    assert "\n" not in str(refused.value)
