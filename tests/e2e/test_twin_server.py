"""A reasoning family's instruct expert over a plain base, behind a running server.

With nothing but vLLM's own options for tools and reasoning: the twin of Qwen 3 thinks, and then
calls a tool.
"""

import json
import urllib.error
import urllib.request

import openai
import pytest
from test_server import KEY, Server
from twins import THOUGHT, TOOL_CALLS, write_twins

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = ("weather", {"city": "Paris"})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen3")
    server = Server(
        write_twins("qwen3", root, answer=TOOL_CALLS["hermes"]),
        root / "log",
        *("--alpha", "1", "--reasoning-parser", "qwen3"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    )
    yield server
    server.stop()


def ask(server, **kwargs):
    fields = {"model": "steered", "messages": QUESTION, "temperature": 0, "max_tokens": 64}
    return server.client.chat.completions.create(**{**fields, **kwargs})


def test_thinks_and_calls_a_tool(server):
    (choice,) = ask(server, tools=[TOOL]).choices
    message = choice.message.model_dump()
    assert message["reasoning"].strip() == THOUGHT
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == CALL
    assert choice.finish_reason == "tool_calls" and not (choice.message.content or "").strip()

    # The tool's answer goes back into the talk, by the expert's template.
    talk = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert ask(server, messages=talk, tools=[TOOL]).choices[0].finish_reason == "tool_calls"


def test_the_same_in_a_stream(server):
    reasoning, name, arguments, content, reasons = "", "", "", "", []
    for chunk in ask(server, tools=[TOOL], stream=True):
        (choice,) = chunk.choices
        delta = choice.delta.model_dump()
        reasoning += delta.get("reasoning") or ""
        content += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            name += call["function"].get("name") or ""
            arguments += call["function"].get("arguments") or ""
        reasons.append(choice.finish_reason)
    assert (name, json.loads(arguments)) == CALL
    assert reasoning.strip() == THOUGHT and not content.strip()
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


def test_a_thought_ends_at_its_budget(server):
    """Of as many tokens as asked: the end is the expert's, which the server's parser names."""
    whole = ask(server).choices[0].message.model_dump()["reasoning"]
    (choice,) = ask(server, logprobs=True, extra_body={"thinking_token_budget": 2}).choices
    thought = choice.message.model_dump()["reasoning"]
    assert thought and whole.startswith(thought) and thought != whole
    tokens = [entry.token for entry in choice.logprobs.content]
    assert (tokens[0], tokens[3]) == ("<think>", "</think>")


def test_no_thought_where_thinking_is_off(server):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    (choice,) = ask(server, extra_body=off).choices
    message = choice.message.model_dump()
    # No tools in the request: the call is the answer's text.
    assert "weather" in message["content"] and not message.get("reasoning")
    assert choice.finish_reason == "stop" and "<|im_end|>" not in message["content"]


def test_the_other_routes_think_too(server):
    answer = server.client.responses.create(
        model="steered", input=QUESTION[0]["content"], temperature=0, max_output_tokens=64
    )
    assert answer.status == "completed"
    thoughts = [item.content[0].text for item in answer.output if item.type == "reasoning"]
    assert [thought.strip() for thought in thoughts] == [THOUGHT]
    assert "weather" in answer.output_text
    request = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
    fields = {"model": "steered", "messages": QUESTION, "max_tokens": 64, "temperature": 0}
    function = TOOL["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    message = request.post("/v1/messages", cast_to=object, body={**fields, "tools": [tool]})
    parts = {part["type"]: part for part in message["content"]}
    assert message["stop_reason"] == "tool_use", message
    assert parts["thinking"]["thinking"].strip() == THOUGHT
    assert (parts["tool_use"]["name"], parts["tool_use"]["input"]) == CALL


@pytest.mark.parametrize("content", [5, {"text": "hello"}, [5], [{"type": "text"}]])
def test_a_message_that_is_no_text_is_the_clients_fault(server, content):
    """As of plain vLLM, whose words these are."""
    body = {"model": "steered", "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 400, refused.value.read()
    assert server.status("/health") == 200
