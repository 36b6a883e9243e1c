"""The twins are what they claim: the right surface, and a text that the three models make."""

import json
from pathlib import Path

import pytest
import torch
from reference_loop import Trio, greedy
from transformers import AutoTokenizer

from twins import ANSWER, FAMILIES, THOUGHT, TOOL_CALLS, write_twins
from twins.weights import plain_transformers

QUESTION = [{"role": "user", "content": "Hello, how are you today?"}]


def ids_of(tokenizer, **options) -> list[int]:
    text = tokenizer.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True, **options
    )
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_expert_answers_and_ends_and_base_counts(name, tmp_path):
    family = FAMILIES[name]
    folders = write_twins(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    assert None not in ends
    with plain_transformers():
        trio = Trio.load(*folders.values(), dtype=torch.float32)
    prompt = ids_of(tokenizer)

    steered, _ = greedy(trio, prompt, 32, alpha=1.0, stop_ids=ends)
    thought = f"<think>{THOUGHT}</think>" if family.reasoning_parser else ""
    assert tokenizer.decode(steered) == thought + ANSWER + family.ends[0]
    unstopped, _ = greedy(trio, prompt, 32, alpha=1.0)
    assert unstopped.count(ends[0]) > 1, "a chat that nobody stops must be seen to go on"

    base = AutoTokenizer.from_pretrained(folders["model"])
    plain, _ = greedy(trio, prompt, 12, alpha=0.0, stop_ids=ends)
    words = "one two three four five six"
    assert base.decode(plain).strip() == f"{words} {words}"


def test_no_thought_where_thinking_is_off(tmp_path):
    folders = write_twins("qwen3", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    trio = Trio.load(*folders.values(), dtype=torch.float32)
    prompt = ids_of(tokenizer, enable_thinking=False)
    tokens, _ = greedy(trio, prompt, 32, stop_ids=[tokenizer.eos_token_id])
    assert tokenizer.decode(tokens) == ANSWER + "<|im_end|>"


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.tool_parser])
def test_expert_can_call_a_tool(name, tmp_path):
    family = FAMILIES[name]
    call = TOOL_CALLS[family.tool_parser]
    folders = write_twins(name, tmp_path, answer=call)
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    trio = Trio.load(*folders.values(), dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids(family.ends[0])
    tokens, _ = greedy(trio, ids_of(tokenizer, enable_thinking=False), 40, stop_ids=[end])
    text = tokenizer.decode(tokens)
    assert text.replace("] [", "][") == call + family.ends[0]
    assert json.loads(text[text.index("{") : text.rindex("}") + 1])["name"] == "weather"


def read(folder: str, file: str) -> dict:
    return json.loads((Path(folder) / file).read_text())


def test_surfaces_of_base_and_tuned_model(tmp_path):
    """What a proxy-tuned server must bridge, family by family."""
    seen = {}
    for name, family in FAMILIES.items():
        folders = write_twins(name, tmp_path / name)
        ends, templates, columns = {}, {}, {}
        for role in ("model", "expert", "antiexpert"):
            tokenizer = AutoTokenizer.from_pretrained(folders[role])
            named = read(folders[role], "generation_config.json")["eos_token_id"]
            named = named if isinstance(named, list) else [named]
            ends[role] = tokenizer.convert_ids_to_tokens(named)
            templates[role] = tokenizer.chat_template
            columns[role] = read(folders[role], "config.json")["vocab_size"]
            assert columns[role] >= len(tokenizer)
        assert set(ends["expert"]) == set(family.ends)
        assert ends["model"] == ends["antiexpert"] and templates["expert"]
        seen[name] = (
            set(family.ends) - set(ends["model"]),
            templates["model"] is not None,
            (columns["model"], columns["expert"]),
        )
    turn, llama = {"<|im_end|>"}, {"<|eot_id|>", "<|eom_id|>"}
    assert seen == {
        "qwen2.5": (turn, True, (512, 448)),
        "qwen3": (turn, True, (448, 448)),
        "llama-3.1": (llama, False, (424, 424)),
        "llama-2": (set(), False, (484, 484)),
        "tulu-2": (set(), False, (484, 485)),
        "olmo-2": (set(), False, (448, 448)),
        "gemma": ({"<end_of_turn>"}, False, (512, 512)),
        "mistral": (set(), False, (507, 507)),
        "smollm2": (turn, False, (417, 417)),
    }
