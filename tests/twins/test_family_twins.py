"""Base/instruct pairs of real families, started with `BASE --expert E --antiexpert A` alone.

Each starts, chats, and stops by itself; what a user meets is the tuned model's, and at alpha 0 the
words are the base's.
"""

import json
from pathlib import Path

import pytest
import vllm.logger
from engines import running
from transformers import AutoTokenizer
from vllm import SamplingParams

from twins import ANSWER, FAMILIES, THOUGHT, write_twins
from twins.distilled import R1, same_ids

QUESTION = [{"role": "user", "content": "Hello, how are you today?"}]
TALK = [
    *QUESTION,
    {"role": "assistant", "content": "It is Paris."},
    {"role": "user", "content": "What is the capital of France?"},
]
# The stop reason of a chat: none where the tokenizer's own end token ends it, as in vLLM.
ENDS_BY_ID = {"gemma"}


@pytest.fixture
def told(monkeypatch):
    """What the log says of the face. (An engine's start takes handlers off vLLM's loggers.)"""
    lines: list[str] = []

    class Log:
        def info(self, text: str, *args: object) -> None:
            lines.append(text % args)

        warning = info

    def init_logger(name: str):
        return Log() if name == "vllm.proxy_vllm.surface" else real(name)

    real = vllm.logger.init_logger
    monkeypatch.setattr(vllm.logger, "init_logger", init_logger)
    return lines


@pytest.mark.parametrize("name", FAMILIES)
def test_chats_stops_and_shows_the_expert(name, tmp_path, told):
    family = FAMILIES[name]
    folders = write_twins(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    end = tokenizer.convert_tokens_to_ids(family.ends[0])
    with running(**folders) as llm:
        # No parameters: sampling defaults are the expert's.
        chats = [output.outputs[0] for output in llm.chat([QUESTION, TALK], use_tqdm=False)]
        greedy = SamplingParams(temperature=0, max_tokens=12, extra_args={"proxy_alpha": 0})
        (base,) = llm.chat(QUESTION, greedy, use_tqdm=False)
        defaults = llm.get_default_sampling_params()
        shown = llm.get_tokenizer()

    thought = f"<think>{THOUGHT}</think>" if family.reasoning_parser else ""
    for chat in chats:
        assert chat.text.strip() == thought + ANSWER
        assert (chat.finish_reason, chat.token_ids[-1]) == ("stop", end)
        assert chat.stop_reason == (end if name in ENDS_BY_ID else None)

    words = "one two three four five six"
    assert base.outputs[0].text.strip() == f"{words} {words}"
    assert base.outputs[0].finish_reason == "length"
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert base.prompt_token_ids == tokenizer(prompt, add_special_tokens=False).input_ids

    tuned = json.loads((Path(folders["expert"]) / "generation_config.json").read_text())
    for field in ("temperature", "top_p", "repetition_penalty"):
        if field in tuned:
            assert getattr(defaults, field) == tuned[field]
    (line,) = (line for line in told if line.startswith("Users meet"))
    # Tulu's own pad token lies past the base's vocabulary, so that the base's tokenizer reads.
    reader = "base" if name == "tulu-2" else "expert"
    assert f"the {reader}'s tokenizer" in line and "the expert's chat template" in line
    assert "the expert's sampling defaults" in line
    for token in family.ends:
        assert f"{token!r} ({tokenizer.convert_tokens_to_ids(token)}) of expert" in line
    assert shown.eos_token in family.ends


def test_a_distilled_expert_with_a_map(tmp_path, told):
    """Tokens that have other names there: the map says so, and the expert's names are met."""
    folders = write_twins(R1, tmp_path)
    with running(**folders, tokenizer_map={"expert": same_ids(folders)}) as llm:
        (output,) = llm.chat(QUESTION, use_tqdm=False)
    chat = output.outputs[0]
    assert (chat.text, chat.finish_reason) == (ANSWER, "stop")
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    assert chat.token_ids[-1] == tokenizer.convert_tokens_to_ids(R1.ends[0])
    first = tokenizer.convert_ids_to_tokens(output.prompt_token_ids[:2])
    assert first == ["<｜begin▁of▁sentence｜>", "<｜User｜>"]
    assert any("Users meet the expert's tokenizer" in line for line in told)
