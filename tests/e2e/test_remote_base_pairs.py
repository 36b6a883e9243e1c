"""Base/instruct pairs of real families over a base elsewhere, on both runners of the local engine.

Plain vLLM serves the family's base; the local engine has the expert and the antiexpert.
"""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from test_remote_base import KEY, PlainServer, report
from transformers import AutoTokenizer
from twins import ANSWER, FAMILIES, write_twins
from twins.weights import plain_transformers
from vllm import SamplingParams

QUESTION = [{"role": "user", "content": "Hello, how are you today?"}]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("smollm2", "llama-3.1", "gemma")]


# Qwen 2.5 pads the large model's columns otherwise than the small ones', and its instruct models
# have a default that no endpoint's answers can be computed with.
@pytest.mark.parametrize("name", ["qwen2.5", *MORE])
def test_chats_and_stops_and_is_exact(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXY_VLLM_BASE_API_KEY", KEY)
    family, folders = FAMILIES[name], write_twins(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    end = tokenizer.convert_tokens_to_ids(family.ends[0])
    with plain_transformers():
        trio = Trio.load(*folders.values(), dtype=torch.float32)
    vocab = min(trio.base.config.vocab_size, len(tokenizer))
    prompts, alphas = prompt_ids([5, 9, 14], vocab=vocab, seed=1), [1.0, 0.5, 2.0]
    greedily = [greedy_params(5, proxy_alpha=alpha) for alpha in alphas]

    server = PlainServer(folders.pop("model"), tmp_path / "log")
    try:
        remote = {"base_url": server.url, "base_model": "base", "base_args": {"max_questions": 8}}
        with running(model=None, **folders, **remote) as llm:
            # No parameters: sampling defaults are the expert's, as far as they can be computed.
            (chat,) = llm.chat(QUESTION, use_tqdm=False)
            cut = SamplingParams(temperature=0, max_tokens=12, stop=["Paris"])
            base = greedy_params(8, proxy_alpha=0)
            stopped, counted = llm.chat([QUESTION, QUESTION], [cut, base], use_tqdm=False)
            exact = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], greedily, use_tqdm=False
            )
            defaults = llm.get_default_sampling_params()
    finally:
        server.stop()

    answer = chat.outputs[0]
    assert (answer.text.strip(), answer.finish_reason) == (ANSWER, "stop")
    assert answer.token_ids[-1] == end
    assert len(report(chat)["certified"]) == len(answer.token_ids)
    assert defaults.repetition_penalty == 1.0
    stopped_at = stopped.outputs[0]
    assert (stopped_at.text.strip(), stopped_at.stop_reason) == ("It is", "Paris")
    assert report(stopped)["certified"] == [True] * len(stopped_at.token_ids)
    assert counted.outputs[0].text.strip().startswith("one two three")
    for ids, alpha, output in zip(prompts, alphas, exact):
        assert list(output.outputs[0].token_ids) == greedy(trio, ids, 5, alpha)[0]
        assert all(report(output)["certified"])
