"""``proxy_explain``: each member's log-probabilities from the sampler, on both runners."""

import json
from typing import Any

import pytest
import torch
from engines import V2, prompt_ids, running
from explained import assert_explained
from reference_loop import Trio
from tiny_models import make_model

PROMPTS = prompt_ids([5, 90, 20, 40], seed=61)
ALPHAS = [1.0, 0.0, -1.5, 0.5]
STEPS = 10


def params(alpha: float, top: int | None = None, **fields: Any) -> Any:
    from vllm import SamplingParams

    extra: dict[str, Any] = {"proxy_alpha": alpha}
    if top is not None:
        extra |= {"proxy_explain": True, "proxy_explain_top": top}
    fields = {"temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True, **fields}
    return SamplingParams(extra_args=extra, **fields)


def ask(llm, requests, prompts=PROMPTS):
    inputs = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    return llm.generate(inputs, requests, use_tqdm=False)


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def llm(trio):
    with running(**trio, max_logprobs=-1) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


# Greedy, seeded, with vLLM's own log-probabilities, with what needs a whole distribution.
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"logprobs": 2},
    {"temperature": 0.8, "seed": 5, "presence_penalty": 0.7, "min_tokens": 3},
]


def test_values_are_transformers_and_tokens_stay(llm, reference):
    from proxy_vllm.explain import explanations

    plain = ask(llm, [params(a, **kind) for a, kind in zip(ALPHAS, KINDS)])
    tops = [3, 1, 5, 20]
    explained = ask(llm, [params(a, t, **kind) for a, t, kind in zip(ALPHAS, tops, KINDS)])
    assert tokens_of(explained) == tokens_of(plain)
    for prompt, alpha, top, output in zip(PROMPTS, ALPHAS, tops, explained, strict=True):
        answer = output.outputs[0]
        assert_explained(explanations(answer), reference, prompt, answer.token_ids, alpha, top)
        texts = [e.chosen.token for e in explanations(answer)]
        assert [text for text in texts if text[0] != "<"] == answer.text.split()
    # What vLLM gives is as without.
    for before, after in zip(plain[2].outputs[0].logprobs, explained[2].outputs[0].logprobs):
        assert {i: p.rank for i, p in before.items()} == {i: p.rank for i, p in after.items()}
        assert [p.logprob for p in after.values()] == pytest.approx(
            [p.logprob for p in before.values()], abs=1e-5
        )


def test_rows_that_do_not_ask_are_untouched(llm):
    """In one batch with a row that asks: the same tokens, and vLLM's own log-probabilities."""
    from proxy_vllm.explain import explanations

    requests = [params(1.0), params(0.5, logprobs=1), params(0.5, logprobs=-1)]
    alone = ask(llm, requests, PROMPTS[:3])
    mixed = ask(llm, [*requests, params(0.5, 20)])
    assert tokens_of(mixed[:3]) == tokens_of(alone)
    assert mixed[0].outputs[0].logprobs is None
    for i in (1, 2):
        assert explanations(mixed[i].outputs[0]) == []
        for a, b in zip(alone[i].outputs[0].logprobs, mixed[i].outputs[0].logprobs, strict=True):
            assert a.keys() == b.keys() and len(a) <= (2 if i == 1 else 111)
    assert len(explanations(mixed[3].outputs[0])) == STEPS


def test_several_answers_and_a_stop_string(llm, reference):
    from proxy_vllm.explain import explanations

    (output,) = ask(llm, [params(0.5, 2, n=3, temperature=1.0, seed=1)], PROMPTS[:1])
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    for answer in output.outputs:
        assert_explained(explanations(answer), reference, PROMPTS[0], answer.token_ids, 0.5, 2)
    # Without a seed they share their parameters.
    (output,) = ask(llm, [params(0.5, 2, n=2, temperature=1.0)], PROMPTS[:1])
    assert [len(explanations(answer)) for answer in output.outputs] == [STEPS] * 2

    (output,) = ask(llm, [params(0.5, 2)], PROMPTS[:1])
    word = output.outputs[0].text.split()[4]
    (output,) = ask(llm, [params(0.5, 2, stop=[word])], PROMPTS[:1])
    answer = output.outputs[0]
    assert answer.stop_reason == word
    assert [e.chosen.token_id for e in explanations(answer)] == answer.token_ids


def test_what_cannot_be_asked(llm):
    from proxy_vllm.errors import UserError

    bad: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"proxy_explain": "yes"}, {}, "true or false"),
        ({"proxy_explain": True, "proxy_explain_top": 21}, {}, "1 .. 20"),
        ({"proxy_explain": True, "proxy_explain_top": 1.5}, {}, "whole number"),
        ({"proxy_explain_top": 3}, {}, "nothing without proxy_explain"),
        ({"explain": True}, {}, "the name is proxy_explain"),
        ({"proxy_explain": True}, {"flat_logprobs": True, "logprobs": 1}, "flat_logprobs"),
    ]
    for extra, fields, message in bad:
        request = params(1.0, **fields)
        request.extra_args = extra
        with pytest.raises(UserError, match=message):
            ask(llm, [request], PROMPTS[:1])
    assert llm.llm_engine.get_num_unfinished_requests() == 0


def test_explained_answers_and_the_command(llm, trio, reference, tmp_path, monkeypatch, capsys):
    """``ProxyLLM.explain`` and ``proxy-vllm explain``, on the engine of this file."""
    from proxy_vllm.cli.main import main
    from proxy_vllm.explain import totals

    requests = [params(a) for a in ALPHAS]
    plain = ask(llm, requests)
    inputs = [*PROMPTS[:3], {"prompt_token_ids": PROMPTS[3]}]
    explained = llm.explain(inputs, requests, top=2, use_tqdm=False)
    for prompt, alpha, output, found in zip(PROMPTS, ALPHAS, plain, explained, strict=True):
        answer = list(output.outputs[0].token_ids)
        assert_explained(found.tokens, reference, prompt, answer, alpha, 2)
        assert (found.text, found.alpha) == (output.outputs[0].text, alpha)
    assert totals(explained).tokens == 4 * STEPS
    assert totals(explained[1:2]).changed == 0  # at alpha 0 nothing is
    chat = [{"role": "user", "content": "w7 w8"}]
    (found,) = llm.explain(chat, params(1.0), use_tqdm=False)
    assert len(found.tokens) == STEPS and "w7" in found.prompt

    lines = [
        {"prompt": PROMPTS[0], "id": "first", "proxy_alpha": 0.5},
        {"messages": chat, "ignore_eos": True},
        {"prompt": "w9 w10", "n": 2, "temperature": 1},
    ]
    source, page, values = (tmp_path / name for name in ("in.jsonl", "out.html", "out.jsonl"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("proxy_vllm.cli.explain.start_llm", lambda arguments: llm)
    monkeypatch.setattr("proxy_vllm.cli.explain.end_with_engines", lambda: None)
    command = [
        *("explain", trio["model"], "--expert", trio["expert"], "--antiexpert", trio["antiexpert"]),
        *("-i", str(source), "-o", str(page), "--json", str(values), "--temperature", "0"),
        *("--max-tokens", "6"),
    ]
    main(command)
    assert "4 answers" in capsys.readouterr().err
    assert "DecompressionStream" in page.read_text()
    answers = [json.loads(line) for line in values.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["first", 2, 3, 3]
    first = ask(llm, [params(0.5, max_tokens=6, ignore_eos=False)], PROMPTS[:1])[0].outputs[0]
    assert [t["token_id"] for t in answers[0]["proxy_explain"]] == list(first.token_ids)
    assert answers[0]["proxy_alpha"] == 0.5 and answers[0]["text"] == first.text

    source.write_text('{"prompt": "w5", "proxy_alpha": "x"}\n')
    for options, message in (
        ([], "--overwrite replaces"),
        (["--overwrite"], "line 1: proxy_alpha"),
        (["--overwrite", "--top", "21"], "--top is 21"),
        (["--overwrite", "-o", "-"], "- is none"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *options])
        assert message in capsys.readouterr().err


# Other engines from here on: they end what vLLM's processes share with the engine of this file.
@pytest.mark.parametrize("drafts", [None, 2], ids=["plain", "drafts"])
def test_members_of_other_sizes_and_drafts(tmp_path, drafts):
    """Tokens that a small member lacks have no value; drafts are explained as they count."""
    from proxy_vllm.explain import explanations

    small = {"hidden": 32, "heads": 1, "layers": 1, "tokenizer_size": 99}
    folders = {
        "model": make_model(tmp_path / "base", seed=1, vocab=128, tokenizer_size=128),
        "expert": make_model(tmp_path / "expert", seed=2, vocab=140, **small),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, vocab=111, **small),
    }
    if drafts:
        folders["antiexpert"] = folders["model"]  # at alpha 1 every draft holds
        folders["expert"] = make_model(tmp_path / "third", seed=4, vocab=128, hidden=32, heads=1)
    trio = Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)
    # Over the base's columns, as the formula reads it.
    trio.expert.lm_head = _Cut(trio.expert.lm_head, 128)
    alphas = [1.0, 0.3, -0.2] if drafts else [0.3, 0.0, -0.4]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 2}, {"logprobs": 1}]
    with running(**folders, speculative_tokens=drafts, max_logprobs=20) as llm:
        plain = ask(llm, [params(a, **k) for a, k in zip(alphas, kinds)], PROMPTS[:3])
        found = ask(llm, [params(a, 4, **k) for a, k in zip(alphas, kinds)], PROMPTS[:3])
        assert tokens_of(found) == tokens_of(plain)
        for prompt, alpha, output in zip(PROMPTS, alphas, found):
            answer = output.outputs[0]
            assert_explained(explanations(answer), trio, prompt, answer.token_ids, alpha, 4)


class _Cut(torch.nn.Module):
    def __init__(self, head: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.head, self.width = head, width

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)[..., : self.width]


@pytest.mark.skipif(not V2, reason="own prompts need Model Runner V2")
def test_own_prompts(trio, reference):
    from proxy_vllm.explain import explanations

    prompt = {"base": PROMPTS[0], "expert": PROMPTS[2], "antiexpert": PROMPTS[1][:30]}
    with running(**trio, own_prompts=True) as llm:
        (output,) = ask(llm, [params(0.7, 3)], [prompt])
        answer = output.outputs[0]
        assert_explained(explanations(answer), reference, prompt, answer.token_ids, 0.7, 3)


@pytest.mark.skipif(not V2, reason="once is enough: both runners share what ranks exchange")
def test_two_ranks(trio, reference, monkeypatch):
    """Ranks exchange candidates and sums, not logits."""
    from proxy_vllm.explain import explanations

    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running(**trio, tensor_parallel_size=2) as llm:
        outputs = ask(llm, [params(0.5, 3), params(1.0, 1), params(1.0)], PROMPTS[:3])
        for prompt, alpha, top, output in zip(PROMPTS, (0.5, 1.0), (3, 1), outputs):
            answer = output.outputs[0]
            assert_explained(explanations(answer), reference, prompt, answer.token_ids, alpha, top)
