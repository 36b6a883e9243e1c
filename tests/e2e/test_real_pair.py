"""The real SmolLM2-135M-Instruct over a base's surface chats, streams, calls a tool and stops.

With no option beyond ``BASE --expert E --antiexpert A`` (and the CPU's sizes); see smollm2.py.
"""

import json
import subprocess
import sys

import openai
import pytest
from engines import running
from smollm2 import BASE_END, INSTRUCT_END, write_pair
from test_server import Server

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "strict": True,  # without it vLLM binds the arguments to no schema
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def server(pair, tmp_path_factory):
    server = Server(
        pair,
        tmp_path_factory.mktemp("server") / "log",
        *("--alpha", "1", "--kv-cache-memory-bytes", str(256 << 20)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--log-level", "INFO"),
    )
    yield server
    server.stop()


def ask(server, **kwargs):
    fields = {"model": "steered", "messages": QUESTION, "temperature": 0, "max_tokens": 64}
    return server.client.chat.completions.create(**{**fields, **kwargs})


def test_an_answer_ends_by_itself(server):
    answer = ask(server, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert choice.finish_reason == "stop" and "Paris" in choice.message.content
    assert choice.token_ids[-1] == INSTRUCT_END and "<|im" not in choice.message.content
    assert choice.stop_reason is None
    log = server.log_path.read_text()
    (line,) = [line for line in log.splitlines() if "Users meet" in line]
    assert "the expert's chat template" in line
    assert f"'<|im_end|>' ({INSTRUCT_END}) of expert, '<|endoftext|>' ({BASE_END}) of base" in line

    streamed, reasons = "", []
    for chunk in ask(server, stream=True):
        streamed += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert streamed == choice.message.content and reasons[-1] == "stop"


def test_the_bases_end_token_ends_too(server):
    answer = ask(server, logit_bias={str(BASE_END): 100})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == BASE_END


def test_tools(server):
    """The choice is forced: so small a model is not relied upon to make it."""
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        answer = ask(server, tools=[TOOL], tool_choice=choice)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        arguments = json.loads(call.function.arguments)
        assert isinstance(arguments, dict), (choice, answer)
        assert arguments["city"] in ("Paris", "Rome")


def test_the_other_routes(server):
    answer = server.client.responses.create(
        model="steered", input=QUESTION[0]["content"], temperature=0, max_output_tokens=64
    )
    assert answer.status == "completed" and "Paris" in answer.output_text
    request = openai.OpenAI(base_url=server.url, api_key=server.client.api_key, max_retries=0)
    message = request.post(
        "/v1/messages",
        cast_to=object,
        body={"model": "steered", "messages": QUESTION, "max_tokens": 64, "temperature": 0},
    )
    assert message["stop_reason"] == "end_turn" and "Paris" in message["content"][0]["text"]


def test_offline_and_in_a_file(pair, tmp_path):
    with running(**pair, kv_cache_memory_bytes=256 << 20) as llm:
        params = llm.get_default_sampling_params()
        params.temperature, params.max_tokens = 0.0, 64
        (output,) = llm.chat(QUESTION, params, use_tqdm=False)
    want = output.outputs[0]
    assert (want.finish_reason, want.token_ids[-1]) == ("stop", INSTRUCT_END)

    lines, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text(json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": 64}))
    subprocess.run(
        [
            *(sys.executable, "-m", "proxy_vllm.cli.main", "generate", pair["model"]),
            *("--expert", pair["expert"], "--antiexpert", pair["antiexpert"], "--dtype", "float32"),
            *("-i", str(lines), "-o", str(answers), "--max-model-len", "256", "--enforce-eager"),
            *("--kv-cache-memory-bytes", str(256 << 20)),
        ],
        check=True,
    )
    answer = json.loads(answers.read_text())
    assert (answer["finish_reason"], answer["text"]) == ("stop", want.text)
