"""`proxy-vllm generate` on lines in OpenAI's batch format and on chats with their options."""

import json

import pytest
import torch
from engines import SMALL
from reference_loop import Trio, greedy
from transformers import AutoTokenizer
from twins import THOUGHT, TOOL_CALLS, write_twins

from proxy_vllm.cli.main import main
from proxy_vllm.envs import cpu_runner

pytestmark = pytest.mark.skipif(
    cpu_runner() == "v2", reason="what files hold does not depend on the runner"
)

QUESTION = [{"role": "user", "content": "Hello, how are you today?"}]
CALL = TOOL_CALLS["hermes"]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
YES_OR_NO = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {"enum": ["yes", "no"]}},
}


def openai(custom_id, url="/v1/chat/completions", **body):
    line = {"custom_id": custom_id, "method": "POST", "url": url}
    return {**line, "body": {"model": "any", "temperature": 0, **body}}


LINES = [
    {"id": "thinks", "messages": QUESTION, "chat_template_kwargs": {"enable_thinking": True}},
    {"id": "by default", "messages": QUESTION, "row": {"of": "mine"}},
    {
        "id": "goes on",
        "messages": [*QUESTION, {"role": "assistant", "content": "I am"}],
        "continue_final_message": True,
        "max_tokens": 4,
    },
    {"id": "tools", "messages": QUESTION, "tools": TOOLS, "max_tokens": 1},
    # vLLM's reasoning parser lets a form hold once a thought has ended, as it has in these chats.
    {"id": "formed", "messages": QUESTION, "response_format": YES_OR_NO},
    openai("calls", messages=QUESTION, tools=TOOLS, tool_choice="auto"),
    openai(
        "thinks too", messages=QUESTION, chat_template_kwargs={"enable_thinking": True},
        vllm_xargs={"proxy_alpha": 1.0},
    ),
    openai("formed too", messages=QUESTION, response_format=YES_OR_NO),
    openai("base", messages=QUESTION, max_completion_tokens=5, vllm_xargs={"proxy_alpha": 0},
           logprobs=True, top_logprobs=2),
    openai("text", "/v1/completions", prompt="Yes or no?", max_tokens=6),
    openai("too far", messages=QUESTION, vllm_xargs={"proxy_alpha": 99}),
]  # fmt: skip


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    return write_twins("qwen3", tmp_path_factory.mktemp("qwen3"), answer=CALL)


@pytest.fixture(scope="module")
def answers(trio, tmp_path_factory):
    """The answers of one run over ``LINES``, by id, and what was refused."""
    from vllm.distributed import cleanup_dist_env_and_memory

    folder = tmp_path_factory.mktemp("files")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    engine = {**SMALL, "max_num_batched_tokens": 512}
    del engine["enforce_eager"]
    with pytest.raises(SystemExit) as stop:
        main(
            ["generate", trio["model"], "--expert", trio["expert"]]
            + ["--antiexpert", trio["antiexpert"], "-i", str(source), "-o", str(target)]
            + [f"--{name.replace('_', '-')}={value}" for name, value in engine.items()]
            + ["--enforce-eager", "--temperature", "0", "--max-tokens", "40", "--keep-fields"]
            + ["--line-defaults", '{"chat_template_kwargs": {"enable_thinking": false}}']
            + ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
            + ["--on-error", "skip", "--token-ids", "--served-model-name", "steered"]
        )
    cleanup_dist_env_and_memory()
    assert stop.value.code == 1
    errors = [json.loads(x) for x in (folder / "out.jsonl.errors.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r.get("custom_id", r["id"]) for r in rows] == [
        line.get("custom_id", line.get("id")) for line in LINES[:-1]
    ]
    return {row.get("custom_id", row["id"]): row for row in rows}, errors


def loop(trio, messages, max_tokens, alpha=1.0, **options):
    """Token ids that the three Transformers models give for a chat, by the expert's template."""
    tokenizer = AutoTokenizer.from_pretrained(trio["expert"])
    options = {"add_generation_prompt": True, "enable_thinking": False, **options}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return tokenizer, greedy(models, ids, max_tokens, alpha, [end])[0]


def test_options_of_a_chat_reach_the_template(trio, answers):
    found, _ = answers
    assert THOUGHT in found["thinks"]["text"]
    assert found["by default"]["text"] == CALL.strip()
    assert found["by default"]["row"] == {"of": "mine"}
    for name, options in (
        ("thinks", {"enable_thinking": True}),
        ("goes on", {"add_generation_prompt": False, "continue_final_message": True}),
        ("tools", {"tools": TOOLS}),
    ):
        line = next(line for line in LINES if line.get("id") == name)
        messages, most = line["messages"], line.get("max_tokens", 40)
        _, tokens = loop(trio, messages, most, **options)
        assert found[name]["token_ids"] == tokens, name
    assert found["formed"]["text"] in ('"yes"', '"no"')


def test_openai_lines_are_answered_as_by_the_server(trio, answers):
    from vllm.entrypoints.launchers.run_batch import BatchRequestOutput
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    found, errors = answers
    bodies = {}
    for line in LINES[:-1]:
        if name := line.get("custom_id"):
            row = found[name]
            assert (row["error"], row["response"]["status_code"]) == (None, 200)
            bodies[name] = row["response"]["body"]
            assert bodies[name]["model"] == "steered"  # and not "any", which the lines say
            if name != "text":
                assert BatchRequestOutput.model_validate(row).custom_id == name

    choice = bodies["calls"]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"])
    message = bodies["thinks too"]["choices"][0]["message"]
    assert THOUGHT in message["reasoning"] and THOUGHT not in message["content"]
    assert bodies["formed too"]["choices"][0]["message"]["content"] in ('"yes"', '"no"')

    tokenizer, tokens = loop(trio, QUESTION, 5, alpha=0.0)
    body = bodies["base"]
    assert body["choices"][0]["message"]["content"] == tokenizer.decode(tokens)
    assert body["usage"]["completion_tokens"] == len(tokens)
    assert body["choices"][0]["finish_reason"] == "length"
    assert all(len(t["top_logprobs"]) == 2 for t in body["choices"][0]["logprobs"]["content"])
    text = CompletionResponse.model_validate(bodies["text"])
    assert text.usage.completion_tokens == 6 and text.choices[0].text

    (error,) = errors
    assert (error["custom_id"], error["response"]["status_code"]) == ("too far", 400)
    assert "proxy_alpha is 99" in error["error"]["error"]["message"]
