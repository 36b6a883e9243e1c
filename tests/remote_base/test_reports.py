"""Where the report of an answer is found: no engine, vLLM's own outputs."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

from proxy_vllm.remote_base.answers import report_in_answers
from proxy_vllm.remote_base.reports import REPORT_KEY, Report, Reports
from proxy_vllm.remote_base.steering import Choice
from proxy_vllm.remote_base.usage import Usage
from proxy_vllm.server.extra_fields import CarryingChat, CarryingCompletion


def a_choice(certified: bool, cut_mass: float) -> Choice:
    return Choice(5, certified, cut_mass, np.array([5]), np.zeros(1))


def test_a_report_is_a_copy_of_what_was_so_far():
    reports, report = Reports({}, None), Report()
    report.add(a_choice(True, 0.123456))
    first = reports.field("a", report, Usage(trips=1, tokens=1))[REPORT_KEY]
    report.add(a_choice(False, 1.0))
    second = reports.field("a", report, Usage(trips=1, tokens=2))[REPORT_KEY]
    assert (first["certified"], first["cut_mass"]) == ([True], [0.123])
    assert (second["certified"], second["cut_mass"]) == ([True, False], [0.123, 1.0])
    assert second["usage"]["tokens_a_trip"] == 2.0


def test_answers_to_one_prompt_bring_each_others_reports():
    class Parent:
        n = 2

    parent = Parent()
    states = {
        f"{i}_x": SimpleNamespace(parent_req=parent, request_index=i) for i in range(parent.n)
    }
    reports, first, second = Reports(states, None), Report(), Report()
    first.add(a_choice(True, 0))
    assert reports.field("0_x", first, Usage())[REPORT_KEY][1] is None
    second.add(a_choice(False, 0))
    listed = reports.field("1_x", second, Usage())[REPORT_KEY]
    assert [r["certified"] for r in listed] == [[True], [False]]


def output(reports, finished=True):
    return SimpleNamespace(kv_transfer_params={REPORT_KEY: reports} if reports else None)


def event(index: int, finish_reason: str | None) -> str:
    choice = {"index": index, "text": '"finish_reason":"', "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]}, separators=(',', ':'))}\n\n"


class Completions(OpenAIServingCompletion):
    """vLLM's, with the parts taken out that need an engine."""

    def __init__(self):
        self.of_vllm = True

    async def completion_stream_generator(self, request, engine_inputs, results, **kwargs):
        async for prompt, _ in results:
            for i in range(request.n):
                yield event(prompt * request.n + i, None)
                yield event(prompt * request.n + i, "stop")
        yield "data: [DONE]\n\n"

    def request_output_to_completion_response(self, batch, request):
        return SimpleNamespace(kv_transfer_params=batch[0].kv_transfer_params)


def test_each_choice_of_a_stream_ends_with_its_report(monkeypatch):
    for name in ("completion_stream_generator", "request_output_to_completion_response"):
        monkeypatch.setattr(OpenAIServingCompletion, name, vars(Completions)[name])
    state = SimpleNamespace(
        openai_serving_completion=Completions(),
        openai_serving_chat=OpenAIServingChat.__new__(OpenAIServingChat),
    )
    report_in_answers(state)
    serving = state.openai_serving_completion
    assert isinstance(serving, CarryingCompletion) and serving.of_vllm
    assert isinstance(state.openai_serving_chat, CarryingChat)
    report_in_answers(state)
    assert state.openai_serving_completion is serving

    request = SimpleNamespace(n=2)
    outputs = [output([{"certified": [i]}, {"certified": [i + 1]}]) for i in (0, 2)]

    async def results():
        for prompt, found in enumerate(outputs):
            yield prompt, found

    async def read():
        stream = serving.completion_stream_generator(request, [], results(), model_name="m")
        return [event async for event in stream]

    *events, done = asyncio.run(read())
    assert done == "data: [DONE]\n\n"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    ended = [c for c in chunks if c["choices"][0]["finish_reason"] is not None]
    assert [c["kv_transfer_params"]["proxy"] for c in ended] == [
        {"certified": [i]} for i in range(4)
    ]
    assert not any("kv_transfer_params" in c for c in chunks if c not in ended)

    whole = serving.request_output_to_completion_response(outputs, request)
    assert whole.kv_transfer_params == {"proxy": [{"certified": [i]} for i in range(4)]}
    one = serving.request_output_to_completion_response(
        [output({"certified": [7]})], SimpleNamespace(n=None)
    )
    assert one.kv_transfer_params == {"proxy": {"certified": [7]}}
