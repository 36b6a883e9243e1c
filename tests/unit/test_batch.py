"""Streams of requests through an engine that is scripted, so that its timing is known."""

import random
import threading

import pytest
from scripted_llm import PROXY, ScriptedLLM, lines

from proxy_vllm.batch.generator import BatchGenerator
from proxy_vllm.batch.request import LineOptions, parse_request
from proxy_vllm.errors import UserError


def texts(results):
    return [r.output["text"] if r.output else None for r in results]


def test_results_come_in_input_order_each_as_soon_as_it_can():
    llm = ScriptedLLM(max_num_seqs=8)
    seen = [(r.output["text"], llm.steps) for r in BatchGenerator(llm).run(lines(2, 9, 1, 4, 12))]
    # P1 does not wait for the others; P3 and P4 wait for P2 alone.
    assert seen == [("P1", 2), ("P2", 9), ("P3", 9), ("P4", 9), ("P5", 12)]


def test_random_lengths_keep_the_order_and_never_run_the_engine_empty():
    rng = random.Random(0)
    llm = ScriptedLLM(max_num_seqs=4)
    steps = [rng.randint(1, 30) for _ in range(300)]
    results = list(BatchGenerator(llm).run(lines(*steps)))
    assert texts(results) == [f"P{i}" for i in range(1, 301)]
    assert [r.completion_tokens for r in results] == steps
    assert llm.most_live == 8 and llm.empty_steps == 0
    # Sequences beside one another all the time, not one batch after another.
    assert llm.steps < 1.2 * sum(steps) / 8


def test_input_is_read_only_as_far_as_there_is_room():
    read = 0

    def endless():
        nonlocal read
        for read in range(1, 10**9):
            yield read, {"prompt": "x", "max_tokens": 1000 if read == 1 else 1}

    results = BatchGenerator(ScriptedLLM(), max_running=4, max_held=20).run(endless())
    next(results)  # line 1 holds all others back for 1000 steps
    assert read == 20
    results.close()


def test_sequences_count_not_requests():
    llm = ScriptedLLM()
    items = [(i, {"prompt": "x", "n": 3, "max_tokens": 2}) for i in range(1, 9)]
    results = list(BatchGenerator(llm, max_running=6).run(items))
    assert llm.most_live == 6
    assert [len(r.output["outputs"]) for r in results] == [3] * 8
    assert results[0].output == {
        "id": 1,
        "outputs": [{"text": "X", "finish_reason": "length", "completion_tokens": 2}] * 3,
        "prompt_tokens": 1,
        "completion_tokens": 6,
        "proxy_alpha": 1.5,
    }


def test_bad_lines_harm_no_other():
    llm = ScriptedLLM(failing=["p6"])
    items = [
        *lines(3, 1),
        (3, {"prompt": "too long"}),
        (4, UserError("not JSON")),
        (5, {"id": "five", "prompt": "poison"}),
        (6, {"prompt": "p6", "max_tokens": 1}),
        (7, {"id": [], "prompt": "x"}),
        (8, {"id": "eight", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
    ]
    results = list(BatchGenerator(llm).run(items))
    assert [(r.number, r.id) for r in results] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, None),
        (5, "five"),
        (6, 6),
        (7, None),
        (8, "eight"),
    ]
    assert texts(results) == ["P1", "P2", None, None, None, None, None, "HI"]
    reasons = [r.error for r in results if r.error]
    assert reasons[:3] == ["the prompt is longer than the model", "not JSON", "cannot be sent"]
    assert not llm.live


def test_stop_on_error_reads_no_further_and_finishes_what_runs():
    read = []
    items = [*lines(5, 9), (3, UserError("bad")), *((i, {"prompt": "x"}) for i in range(4, 99))]
    source = (read.append(item[0]) or item for item in items)
    results = list(BatchGenerator(ScriptedLLM(), stop_on_error=True).run(source))
    assert texts(results) == ["P1", "P2", None] and read == [1, 2, 3]


def test_leaving_early_empties_the_engine():
    llm = ScriptedLLM()
    results = BatchGenerator(llm).run(lines(1, 50, 50))
    next(results)
    assert llm.live
    results.close()
    assert not llm.live


def test_a_source_that_waits_for_an_answer_gets_it():
    """A pipe whose other end sends a line only when the one before is answered."""
    answered = threading.Semaphore(1)

    def conversation():
        for item in lines(3, 2, 1):
            assert answered.acquire(timeout=20)
            yield item

    results = []
    for result in BatchGenerator(ScriptedLLM()).run(conversation(), background=True):
        results.append(result)
        answered.release()
    assert texts(results) == ["P1", "P2", "P3"]


def test_a_failing_source_fails_the_run():
    def broken():
        yield 1, {"prompt": "x"}
        raise UserError("cannot read on")

    with pytest.raises(UserError, match="cannot read on"):
        list(BatchGenerator(ScriptedLLM()).run(broken(), background=True))


@pytest.mark.parametrize(
    "line, message",
    [
        ({}, "prompt or messages"),
        ({"prompt": "x", "messages": [{"role": "user"}]}, "prompt or messages"),
        ({"prompt": ""}, "prompt is ''"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": [5, "6"]}, "prompt holds '6'"),
        ({"prompt": [5, True]}, "prompt holds True"),
        ({"prompt": {}}, "prompt.base is needed"),
        ({"prompt": {"base": None, "expert": "x"}}, "prompt.base is needed"),
        ({"prompt": {"base": "x", "exprt": "y"}}, "prompt.exprt is not a known field"),
        ({"prompt": {"base": "x", "expert": ""}}, "prompt.expert is ''"),
        ({"prompt": {"base": {"base": "x"}}}, "prompt.base is {'base': 'x'}"),
        ({"prompt": {"base": "x", "antiexpert": [5, 1.5]}}, "prompt.antiexpert holds 1.5"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": ["hi"]}, "messages holds 'hi'"),
        ({"prompt": "x", "max_tokns": 5}, "max_tokns is not a known field"),
        ({"prompt": "x", "output_kind": 1}, "output_kind is not a known field"),
        ({"prompt": "x", "id": 1.5}, "id is 1.5"),
        ({"prompt": "x", "id": True}, "id is True"),
        ({"prompt": "x", "temperature": "1"}, "temperature is '1'.* number"),
        ({"prompt": "x", "temperature": True}, "temperature is True.* number"),
        ({"prompt": "x", "temperature": -1}, "temperature must be non-negative"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature is inf.*finite"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens is 2.5.* integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": "x", "seed": 2**64}, "seed is 18446744073709551616.*64 bits"),
        ({"prompt": "x", "stop": ["a", 1]}, "stop is "),
        ({"prompt": "x", "stop": [""]}, "stop cannot contain an empty string"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias is "),
        ({"prompt": "x", "structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"prompt": "x", "structured_outputs": {"regex": 1}}, "structured_outputs is "),
        ({"prompt": "x", "n": 2, "temperature": 0}, "n must be 1"),
        ({"prompt": "x", "proxy_alpha": 11}, "proxy_alpha is 11: it must lie in"),
        ({"prompt": "x", "proxy_member": "tuned"}, "proxy_member is 'tuned': there are base"),
        ({"prompt": "x", "proxy_member": "expert", "proxy_alpha": 1}, "proxy_alpha: proxy_member"),
        ({"prompt": "x", "proxy_alpha": "1"}, "proxy_alpha is '1': it must be a number"),
        ({"prompt": "x", "proxy_alpha": float("nan")}, "proxy_alpha is nan.*finite"),
    ],
)
def test_a_refusal_names_the_field(line, message):
    with pytest.raises(UserError, match=message):
        parse_request(1, line, PROXY)


def test_fields_reach_the_sampling_parameters():
    request = parse_request(
        7,
        {
            "prompt": [5, 6],
            "id": None,  # null counts as absent
            "top_p": None,
            "temperature": 1,
            "stop": "end",
            "logit_bias": {"3": -1},
            "structured_outputs": {"regex": "a+"},
            "proxy_alpha": 0,
            "extra_args": {"mine": 1},
        },
        PROXY,
        LineOptions({"top_p": 0.5, "temperature": 0.3}),
    )
    params = request.params
    assert (request.id, request.prompt, request.alpha) == (7, [5, 6], 0.0)
    assert (params.top_p, params.temperature, params.stop) == (0.5, 1.0, ["end"])
    assert params.logit_bias == {3: -1.0} and params.structured_outputs.regex == "a+"
    assert params.extra_args == {"proxy_alpha": 0.0, "mine": 1}


def test_a_member_alone_has_no_alpha():
    request = parse_request(1, {"prompt": "x", "proxy_member": "expert"}, PROXY)
    assert request.alpha is None and request.params.extra_args == {"proxy_member": "expert"}
    body = {**CHAT, "vllm_xargs": {"proxy_member": "antiexpert"}}
    request = parse_request(1, {**BODY, "body": body}, PROXY)
    assert request.alpha is None and request.params.extra_args == {"proxy_member": "antiexpert"}


def test_a_prompt_for_each_model():
    """Null counts as absent, also where a column of a table has structs."""
    prompt = {"base": "x", "expert": [5, 6], "antiexpert": None}
    request = parse_request(1, {"prompt": prompt}, PROXY)
    assert request.prompt == {"base": "x", "expert": [5, 6]}


def test_the_servers_alpha_holds_where_a_line_names_none():
    assert parse_request(1, {"prompt": "x"}, PROXY).alpha == 1.5


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_options_of_a_chat_and_defaults_of_a_job():
    options = LineOptions(
        {"chat_template_kwargs": {"enable_thinking": False, "x": 1}, "temperature": 0.5},
        keep_fields=True,
    )
    request = parse_request(
        1, {**CHAT, "chat_template_kwargs": {"x": 2}, "mine": [1]}, PROXY, options
    )
    assert request.chat == {"chat_template_kwargs": {"enable_thinking": False, "x": 2}}
    assert request.kept == {"mine": [1]} and request.params.temperature == 0.5
    request = parse_request(1, {**CHAT, "continue_final_message": True}, PROXY)
    assert request.chat == {"continue_final_message": True, "add_generation_prompt": False}
    # A prompt is read as it is, whatever the job says about chats.
    assert parse_request(1, {"prompt": "x"}, PROXY, options).chat == {}
    form = {"type": "json_object"}
    request = parse_request(1, {"prompt": "x", "response_format": form}, PROXY)
    assert request.params.structured_outputs.json_object


BODY = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "x", "tools": []}, "tools is for messages"),
        ({**CHAT, "chat_template_kwargs": 5}, "chat_template_kwargs is 5"),
        ({**CHAT, "tools": [{"type": "x"}]}, "tools is "),
        ({**CHAT, "continue_final_message": "yes"}, "continue_final_message is 'yes'"),
        ({**CHAT, "continue_final_message": True, "add_generation_prompt": True}, "excludes"),
        ({**CHAT, "response_format": {"type": "yaml"}}, "response_format is "),
        ({**BODY, "body": CHAT, "custom_id": None}, "custom_id is None"),
        ({**BODY, "body": CHAT, "method": "GET"}, "method is 'GET'"),
        ({**BODY, "body": CHAT, "url": "/v1/embeddings"}, "url is '/v1/embeddings'"),
        ({**BODY, "body": CHAT, "prompt": "x"}, "prompt is not a known field"),
        ({**BODY, "body": "x"}, "body must be an object"),
        ({**BODY, "body": {"messages": 5}}, "body: "),
        ({**BODY, "body": {**CHAT, "stream": True}}, "body.stream is for the server"),
        ({**BODY, "body": {**CHAT, "proxy_alpha": 1}}, "proxy_alpha belongs in vllm_xargs"),
        ({**BODY, "body": {**CHAT, "vllm_xargs": {"proxy_alpha": 99}}}, "proxy_alpha is 99"),
        ({**BODY, "body": {**CHAT, "temperature": -1}}, "temperature must be non-negative"),
        ({**BODY, "url": "/v1/completions", "body": {"prompt": ["a", "b"]}}, "holds 2 prompts"),
    ],
)
def test_a_refusal_of_a_chat_or_an_openai_line_names_the_field(line, message):
    with pytest.raises(UserError, match=message):
        parse_request(1, line, PROXY)


def test_an_openai_line():
    body = {**CHAT, "max_tokens": 7, "vllm_xargs": {"proxy_alpha": 0.5}, "seed": 3}
    options = LineOptions({"max_tokens": 256, "temperature": 0.25, "seed": 9})
    request = parse_request(1, {**BODY, "body": body}, PROXY, options)
    assert (request.id, request.alpha, request.messages) == ("a", 0.5, CHAT["messages"])
    params = request.params
    assert (params.max_tokens, params.temperature, params.seed) == (7, 0.25, 3)
    assert params.extra_args == {"proxy_alpha": 0.5}
    text = {"url": "/v1/completions", "body": {"prompt": [[5, 6]]}}
    request = parse_request(1, {**BODY, **text}, PROXY, options)
    assert (request.prompt, request.params.max_tokens, request.params.seed) == ([5, 6], 256, 9)


def test_a_foreign_model_of_a_line_is_said_and_not_refused(monkeypatch):
    import vllm.logger

    from proxy_vllm.batch.request import LineOptions

    said: list[str] = []

    class Log:
        def warning_once(self, text: str, *values: object) -> None:
            said.append(text % values)

    monkeypatch.setattr(vllm.logger, "init_logger", lambda name: Log())
    options = LineOptions(served=("steered", "other"))
    for name in (None, "steered", "other"):
        assert options.adapter_of_model(name) is None
    assert not said
    assert options.adapter_of_model("gpt-4o") is None
    (line,) = said
    assert "gpt-4o" in line and "steered answers them" in line


def test_lines_name_adapters():
    options = LineOptions(adapters=("safety",), served=("steered",))
    assert parse_request(1, {"prompt": "w5", "lora": "safety"}, PROXY, options).lora == "safety"
    assert parse_request(1, {"prompt": "w5"}, PROXY, options).lora is None
    with pytest.raises(UserError, match="lora is 'rude': --lora-modules names safety"):
        parse_request(1, {"prompt": "w5", "lora": "rude"}, PROXY, options)
    with pytest.raises(UserError, match="no adapters"):
        parse_request(1, {"prompt": "w5", "lora": "safety"}, PROXY)
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "w5", "model": "safety"}}
    assert parse_request(1, line, PROXY, options).lora == "safety"
    for model, adapters in (("steered", ("safety",)), ("gpt-4", None)):
        line["body"]["model"] = model
        known = LineOptions(adapters=adapters, served=("steered",))
        assert parse_request(1, line, PROXY, known).lora is None
    with pytest.raises(UserError, match=r"body\.model is 'gpt-4', which does not exist"):
        parse_request(1, line, PROXY, options)
