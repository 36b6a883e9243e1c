"""Answers of an instruct expert over a plain base end by themselves, by every route.

Gemma's twin: the tokenizer's end token is ``<eos>``, and a turn ends with ``<end_of_turn>``, which
only the expert's generation_config.json names. It names an end token past the vocabulary, too.
"""

import json
from pathlib import Path

import pytest
from engines import running
from twins import ANSWER, write_twins
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from proxy_vllm.errors import UserError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
EOS, TURN, PAST = 1, 20, 100_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    trio = write_twins("gemma", tmp_path_factory.mktemp("gemma"))
    file = Path(trio["expert"], "generation_config.json")
    fields = {**json.loads(file.read_text()), "eos_token_id": [EOS, TURN, PAST], "top_k": 50}
    file.write_text(json.dumps(fields))
    return trio


@pytest.fixture(scope="module")
def llm(folders):
    with running(**folders) as llm:
        yield llm


def params(**kwargs) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **kwargs})


def chat(llm, **kwargs):
    (output,) = llm.chat(QUESTION, params(**kwargs), use_tqdm=False)
    return output.outputs[0]


def test_a_chat_ends_at_the_experts_end_token(llm):
    answer = chat(llm)
    assert answer.text == ANSWER
    assert (answer.finish_reason, answer.stop_reason) == ("stop", TURN)
    assert answer.token_ids[-1] == TURN
    # The tokenizer's own end token gives no reason, as vLLM has it of any model.
    answer = chat(llm, allowed_token_ids=[EOS])
    assert (list(answer.token_ids), answer.finish_reason) == ([EOS], "stop")
    assert answer.stop_reason is None
    answer = chat(llm, ignore_eos=True)
    assert answer.finish_reason == "length" and list(answer.token_ids).count(TURN) > 1


def test_alpha_0_keeps_the_bases_tokens(llm):
    base = chat(llm, extra_args={"proxy_alpha": 0.0})
    assert base.finish_reason == "length" and base.text.strip().startswith("one two three")


def test_a_completion_ends_too(llm):
    prompt = llm.get_tokenizer().apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
    tokens = llm.get_tokenizer().encode(prompt, add_special_tokens=False)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], params(), use_tqdm=False)
    assert output.outputs[0].stop_reason == TURN


def test_minimum_tokens_bad_words_and_their_neighbours(llm):
    """An end token past the vocabulary ends an engine here, or falls to another request."""
    alone = chat(llm)
    batch = llm.chat(
        3 * [QUESTION],
        [params(min_tokens=15), params(bad_words=["<end_of_turn>"]), params()],
        use_tqdm=False,
    )
    long, worded, plain = (list(o.outputs[0].token_ids) for o in batch)
    assert plain == list(alone.token_ids)
    assert not {EOS, TURN}.intersection(long[:15]) and len(long) >= 15
    assert TURN not in worded


def test_a_grammar_ends_the_answer(llm):
    answer = chat(llm, structured_outputs=StructuredOutputsParams(choice=["It is", "six"]))
    assert (answer.text, answer.finish_reason) == ("It is", "stop")
    assert answer.token_ids[-1] in (EOS, TURN)


def test_beams_end_at_every_end_token(llm):
    prompt = llm.get_tokenizer().apply_chat_template(
        QUESTION, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    (output,) = llm.beam_search(
        [{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=3, max_tokens=10)
    )
    best = output.sequences[0].tokens[len(prompt) :]
    assert best[-1] == TURN and llm.get_tokenizer().decode(best[:-1]) == ANSWER
    for sequence in output.sequences:
        assert not {EOS, TURN}.intersection(sequence.tokens[len(prompt) : -1])
    (output,) = llm.beam_search(
        [{"prompt_token_ids": prompt}],
        BeamSearchParams(beam_width=2, max_tokens=10, ignore_eos=True),
    )
    assert {len(s.tokens) for s in output.sequences} == {len(prompt) + 10}


def test_sampling_defaults_are_the_experts(llm):
    assert llm.get_default_sampling_params().top_k == 50


def test_a_stop_token_past_the_vocabulary_is_refused(llm):
    with pytest.raises(VLLMValidationError, match="out-of-vocab"):
        chat(llm, stop_token_ids=[PAST])
    assert chat(llm).text == ANSWER


def test_misspelled_keys_and_messages_of_another_form_are_refused(llm):
    with pytest.raises(UserError, match=r"proxyalpha in extra_args .* the name is proxy_alpha"):
        chat(llm, extra_args={"proxyalpha": 0.0})
    for messages, reason in (
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5"),
        ([*QUESTION, {"role": "user", "content": [5]}], r"messages\[1\].content is \[5\]"),
    ):
        with pytest.raises(UserError, match=reason):
            llm.chat(messages, params(), use_tqdm=False)
    assert chat(llm).text == ANSWER


def test_other_end_tokens_by_option(folders):
    with running(
        **{**folders, "tokenizer": folders["model"]},
        override_generation_config={"eos_token_id": [EOS]},
    ) as llm:
        answer = chat(llm)
        assert answer.finish_reason == "length" and list(answer.token_ids).count(TURN) > 1


@pytest.mark.parametrize("drafts", [2])
def test_drafts_end_too(tmp_path, drafts):
    """Tokens that were drafted past an end token do not reach the answer."""
    trio = write_twins("llama-3.1", tmp_path)
    with running(**trio, speculative_tokens=drafts) as llm:
        answer = chat(llm)
        eot = llm.get_tokenizer().eos_token_id
        assert (answer.text, answer.stop_reason) == (ANSWER, None)
        assert list(answer.token_ids).index(eot) == len(answer.token_ids) - 1
