"""Every sampling parameter on combined logits, all requests mixed in one batch.

The truth is the greedy Transformers loop with the parameter's definition written out here. A case
whose parameter changes nothing would pass for the wrong reason, so each is checked to matter.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import regex
import torch
from engines import RUNNER, greedy_params, prompt_ids, running
from reference_loop import Process, Trio, greedy, prompt_logits
from tiny_models import make_model

EOS = 1
VOCAB = 111
STEPS = 15
# Tokens that grammars need; xgrammar joins token texts without spaces.
SPELLED = dict(enumerate(["{", "}", '"', ":", ",", "on", "mode", "true", "false", "4", "2"], 20))
TOKENS = [SPELLED.get(i, f"w{i}") for i in range(VOCAB)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("spelled")
    small = {"hidden": 32, "heads": 1, "layers": 1, "renamed": SPELLED}
    return {
        "model": make_model(root / "base", seed=11, renamed=SPELLED),
        "expert": make_model(root / "expert", seed=12, **small),
        "antiexpert": make_model(root / "antiexpert", seed=13, **small),
    }


@pytest.fixture(scope="module")
def reference(folders) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def llm(folders):
    with running(**folders, max_num_seqs=32, max_logprobs=VOCAB) as engine:
        yield engine


# The parameters' definitions on the logits [V] of one step.


def penalised(prompt, presence=0.0, frequency=0.0, repetition=1.0) -> Process:
    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token in {*prompt, *tokens}:
            logits[token] *= 1 / repetition if logits[token] > 0 else repetition
        for token, count in Counter(tokens).items():
            logits[token] -= frequency * count + presence
        return logits

    return process


def biased(bias: dict[int, float]) -> Process:
    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token, value in bias.items():
            logits[token] += value
        return logits

    return process


def only(allowed: list[int]) -> Process:
    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(logits, -torch.inf)
        mask[allowed] = 0
        return logits + mask

    return process


def without(sequences: list[list[int]]) -> Process:
    """No listed sequence may be completed."""

    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        for *head, last in sequences:
            if tokens[len(tokens) - len(head) :] == head:
                logits[last] = -torch.inf
        return logits

    return process


def delayed(stops: list[int], min_tokens: int) -> Process:
    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) < min_tokens:
            logits[stops] = -torch.inf
        return logits

    return process


def spelled_as(pattern: str) -> Process:
    """Only tokens that a text matching ``pattern`` can go on with; the end where it matches."""

    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        text = "".join(TOKENS[t] for t in tokens)
        allowed = [
            i
            for i, token in enumerate(TOKENS)
            if i > 3 and regex.fullmatch(pattern, text + token, partial=True)
        ]
        return only(allowed + [EOS] * bool(regex.fullmatch(pattern, text)))(tokens, logits)

    return process


def chained(*steps: Process) -> Process:
    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        for step in steps:
            logits = step(tokens, logits)
        return logits

    return process


@dataclass
class Case:
    """One request: what vLLM is asked, and what the loop has to do for the same answer."""

    params: dict[str, Any]
    process: Process | None = None
    alpha: float = 1.0
    stop_ids: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=lambda: PROMPT)
    matters: bool = True


PROMPT = prompt_ids([23])[0]
JSON_SCHEMA = {
    "type": "object",
    "properties": {"mode": {"enum": [4, 42, 2]}, "on": {"type": "boolean"}},
    "required": ["mode", "on"],
    "additionalProperties": False,
}
JSON_PATTERN = r'\{"mode":(4|42|2),"on":(true|false)\}'
CHOICES = ["w5w6w7", "w5w9", "w8w7w7"]
PENALTIES = {"presence": 0.9, "frequency": 0.6, "repetition": 1.4}


def structured(**kind: Any) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**kind), "ignore_eos": False}


def make_cases(reference: Trio) -> dict[str, Case]:
    plain, _ = greedy(reference, PROMPT, STEPS)
    third, fourth = plain[2], plain[3]
    cases = {
        "alpha 1": Case({}, matters=False),
        "alpha 0": Case({}, alpha=0.0),
        "alpha -2.5": Case({}, alpha=-2.5),
        "alpha 10": Case({}, alpha=10.0),
        "presence": Case({"presence_penalty": 1.5}, penalised(PROMPT, presence=1.5)),
        "frequency": Case({"frequency_penalty": 1.2}, penalised(PROMPT, frequency=1.2)),
        "repetition": Case({"repetition_penalty": 1.8}, penalised(PROMPT, repetition=1.8)),
        "three penalties": Case(
            {f"{name}_penalty": value for name, value in PENALTIES.items()},
            penalised(PROMPT, **PENALTIES),
            alpha=0.5,
        ),
        "logit_bias": Case({"logit_bias": {9: 4.5, third: -3.0}}, biased({9: 4.5, third: -3.0})),
        "logit_bias, then penalties": Case(
            {"logit_bias": {9: 6.0}, "repetition_penalty": 1.5},
            chained(biased({9: 6.0}), penalised(PROMPT, repetition=1.5)),
        ),
        "allowed_token_ids": Case(
            {"allowed_token_ids": [7, 30, 55, 90, 110]}, only([7, 30, 55, 90, 110]), alpha=0.3
        ),
        "bad_words": Case(
            {"bad_words": [TOKENS[plain[1]], f"{TOKENS[third]} {TOKENS[fourth]}"]},
            without([[plain[1]], [third, fourth]]),
        ),
        "stop_token_ids": Case({"stop_token_ids": [fourth]}, stop_ids=[fourth]),
        "min_tokens": Case(
            {"stop_token_ids": [third], "min_tokens": 7},
            delayed([third, EOS], 7),
            stop_ids=[third],
        ),
        "end of text": Case(
            {"logit_bias": {EOS: 100.0}, "min_tokens": 3, "ignore_eos": False},
            chained(biased({EOS: 100.0}), delayed([EOS], 3)),
            stop_ids=[EOS],
        ),
        "choice": Case(
            structured(choice=CHOICES), spelled_as("|".join(CHOICES)), stop_ids=[EOS], alpha=0.5
        ),
        "regex": Case(
            structured(regex="w5(w7|w8|w9){2,4}true"),
            spelled_as("w5(w7|w8|w9){2,4}true"),
            stop_ids=[EOS],
        ),
        "json": Case(
            structured(json=JSON_SCHEMA), spelled_as(JSON_PATTERN), stop_ids=[EOS], alpha=2.0
        ),
    }
    return cases


@pytest.fixture(scope="module")
def cases(reference) -> dict[str, Case]:
    return make_cases(reference)


NAMES = [
    *("alpha 1", "alpha 0", "alpha -2.5", "alpha 10"),
    *("presence", "frequency", "repetition", "three penalties"),
    *("logit_bias", "logit_bias, then penalties", "allowed_token_ids", "bad_words"),
    *("stop_token_ids", "min_tokens", "end of text", "choice", "regex", "json"),
]


def generate(llm, requests: list[tuple[list[int], Any]]) -> list[Any]:
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [params for _, params in requests],
        use_tqdm=False,
    )


@pytest.fixture(scope="module")
def answers(llm, cases) -> dict[str, Any]:
    """All cases in one batch: a parameter of one request must not touch its neighbours."""
    assert list(cases) == NAMES
    requests = [
        (case.prompt, greedy_params(STEPS, proxy_alpha=case.alpha, **case.params))
        for case in cases.values()
    ]
    return dict(zip(cases, generate(llm, requests)))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name, answers, cases, reference):
    case = cases[name]
    want, _ = greedy(reference, case.prompt, STEPS, case.alpha, case.stop_ids, case.process)
    assert list(answers[name].outputs[0].token_ids) == want
    if case.matters:
        assert want != greedy(reference, case.prompt, STEPS)[0], "this case would prove nothing"


def test_structured_texts_obey_their_grammars(answers):
    texts = {
        name: "".join(TOKENS[t] for t in answers[name].outputs[0].token_ids if t != EOS)
        for name in ("choice", "regex", "json")
    }
    assert texts["choice"] in CHOICES
    assert regex.fullmatch("w5(w7|w8|w9){2,4}true", texts["regex"])
    value = json.loads(texts["json"])
    assert value["mode"] in (4, 42, 2)
    assert isinstance(value["on"], bool)


@pytest.mark.skipif(RUNNER == "v2", reason="vLLM's top-k/top-p kernel stops the interpreter")
@pytest.mark.parametrize("name", ["three penalties", "logit_bias", "bad_words", "json", "regex"])
@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 9, "min_p": 1.0}])
def test_filters_beside_what_needs_all_logits(name, filters, llm, cases, reference):
    """Filters that leave one token make a random draw exact, beside log-probabilities too."""
    from vllm import SamplingParams

    case = cases[name]
    tokens, steps = greedy(
        reference, case.prompt, STEPS, case.alpha, case.stop_ids, process=case.process
    )
    params = SamplingParams(
        **{"ignore_eos": True, **case.params, **filters},
        temperature=1.3,
        seed=7,
        max_tokens=STEPS,
        logprobs=2,
        extra_args={"proxy_alpha": case.alpha},
    )
    completion = generate(llm, [(case.prompt, params)])[0].outputs[0]
    assert list(completion.token_ids) == tokens
    for i, (token, logits) in enumerate(zip(tokens, steps, strict=True)):
        if "structured_outputs" in case.params:  # vLLM masks before it takes log-probabilities
            logits = case.process(tokens[:i], logits)
        assert close(completion.logprobs[i][token].logprob, logits.log_softmax(-1)[token])


def test_stop_strings(llm, reference):
    """The text ends before the stop string, or with it, and the request ends there."""
    tokens, _ = greedy(reference, PROMPT, STEPS, 0.5)
    words = [TOKENS[t] for t in tokens]
    stop = f"{words[4]} {words[5]}"
    end = next(
        i for i in range(1, STEPS + 1) if stop in " ".join(words[:i])
    )  # a number may also end earlier, inside a longer one
    whole = " ".join(words[:end])
    before = whole[: whole.index(stop)]
    outputs = generate(
        llm,
        [
            (PROMPT, greedy_params(STEPS, proxy_alpha=0.5, stop=[stop])),
            (
                PROMPT,
                greedy_params(
                    STEPS, proxy_alpha=0.5, stop=["never", stop], include_stop_str_in_output=True
                ),
            ),
        ],
    )
    for output, text in zip(outputs, (before, before + stop)):
        completion = output.outputs[0]
        assert completion.text.lstrip() == text  # a blank parts the answer from the prompt
        assert completion.finish_reason == "stop"
        assert completion.stop_reason == stop
        assert list(completion.token_ids) == tokens[:end]


ALPHAS = [1.0, 0.0, -1.5, 0.25]


def close(got: float, want: torch.Tensor) -> bool:
    return abs(got - float(want)) < 2e-4


def test_logprobs(llm, reference):
    """Of every token and of the five best: log-softmax of the request's own combination."""
    asked = [{"logprobs": 5}, {"logprobs": VOCAB}, {"logprobs": 0}, {"logprobs": 2}]
    asked[3]["repetition_penalty"] = 1.8  # log-probabilities are those before any penalty
    requests = [
        (PROMPT, greedy_params(STEPS, proxy_alpha=alpha, **fields))
        for alpha, fields in zip(ALPHAS, asked)
    ]
    processes = [None, None, None, penalised(PROMPT, repetition=1.8)]
    for output, alpha, fields, process in zip(generate(llm, requests), ALPHAS, asked, processes):
        tokens, steps = greedy(reference, PROMPT, STEPS, alpha, process=process)
        completion = output.outputs[0]
        assert list(completion.token_ids) == tokens
        for token, logits, got in zip(tokens, steps, completion.logprobs, strict=True):
            want = logits.log_softmax(-1)
            best = want.topk(fields["logprobs"]).indices.tolist()
            assert set(got) == {token, *best}
            for index, entry in got.items():
                assert close(entry.logprob, want[index])
                assert entry.rank == 1 + int((want > want[index]).sum())
    with pytest.raises(AssertionError):  # alphas are told apart by the comparison above
        assert close(0.0, want[tokens[-1]])


def test_logprobs_of_named_tokens(llm, reference):
    named = [3, 50, 110]
    params = greedy_params(4, proxy_alpha=0.5, logprob_token_ids=named)
    tokens, steps = greedy(reference, PROMPT, 4, 0.5)
    completion = generate(llm, [(PROMPT, params)])[0].outputs[0]
    assert list(completion.token_ids) == tokens
    for token, logits, got in zip(tokens, steps, completion.logprobs, strict=True):
        want = logits.log_softmax(-1)
        assert set(got) == {*named, token}
        assert all(close(entry.logprob, want[index]) for index, entry in got.items())


@pytest.mark.parametrize("rows", [1024, 24])
def test_prompt_logprobs(rows, llm, reference, monkeypatch):
    """Over prompts that take several prefill chunks, each with its own alpha.

    Once the model combines the logits of a chunk at once, once in parts of 24 rows.
    """
    llm.reset_prefix_cache()
    monkeypatch.setattr("proxy_vllm.composite.model._LOGIT_ROWS", rows)
    prompts = prompt_ids([150, 23, 64, 65], seed=3)
    requests = [
        (prompt, greedy_params(2, proxy_alpha=alpha, prompt_logprobs=3))
        for prompt, alpha in zip(prompts, ALPHAS)
    ]
    for output, prompt, alpha in zip(generate(llm, requests), prompts, ALPHAS):
        want = prompt_logits(reference, prompt, alpha).log_softmax(-1)
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, 2, alpha)[0]
        got = output.prompt_logprobs
        assert len(got) == len(prompt)
        assert got[0] is None
        for row, token, entries in zip(want, prompt[1:], got[1:]):
            assert set(entries) == {token, *row.topk(3).indices.tolist()}
            assert all(close(entry.logprob, row[index]) for index, entry in entries.items())
