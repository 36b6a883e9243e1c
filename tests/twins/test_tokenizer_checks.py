"""Which tokenizers may be combined: what real pairs differ in passes, wrong text is refused."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from proxy_vllm.checks.tokenizers import check_tokenizers, is_placeholder
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.validate import member_configs
from twins import FAMILIES, Surface, write_twins
from twins.byte_level import LLAMA30_TOKENS, LLAMA31_TOKENS
from twins.distilled import DISTILLED, R1, same_ids

LLAMA = FAMILIES["llama-3.1"]


def surface(of: Surface, **changes) -> Surface:
    return dataclasses.replace(of, **changes)


def names(old: tuple[str, ...], new: tuple[str, ...]) -> dict[str, str]:
    return {a: b for a, b in zip(old, new) if a != b}


def configs(folders: dict[str, str], **own):
    proxy = ProxyConfig(folders["expert"], folders["antiexpert"], **own)
    return member_configs({"model": folders["model"], "dtype": "float32"}, proxy), proxy


def check(folders: dict[str, str], **own) -> None:
    check_tokenizers(*configs(folders, **own))


@pytest.fixture
def told():
    """What the check logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.proxy_vllm.checks.tokenizers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("name", FAMILIES)
def test_real_families_pass_in_silence(name, tmp_path, told):
    check(write_twins(name, tmp_path))
    assert told == []


def test_one_family_in_two_versions(tmp_path, told):
    """Llama 3 counts its reserved tokens otherwise than 3.1; Qwen 3 names padding of Qwen 2.5."""
    older = names(LLAMA31_TOKENS, LLAMA30_TOKENS)
    llama = dataclasses.replace(LLAMA, base=surface(LLAMA.base, renamed=older))
    check(write_twins(llama, tmp_path / "llama"))
    assert len(told) == 1 and "'<|eom_id|>'" in told[0] and "'<|python_tag|>'" in told[0]

    qwen = write_twins("qwen2.5", tmp_path / "qwen2.5")
    qwen["expert"] = write_twins("qwen3", tmp_path / "qwen3")["expert"]
    check(qwen)


def test_a_reserved_token_given_a_use(tmp_path, told):
    renamed = {"<|reserved_special_token_3|>": "<|tool|>"}
    tuned = surface(LLAMA.tuned, renamed=renamed)
    check(write_twins("llama-3.1", tmp_path, tuned=tuned))
    assert len(told) == 1 and "'<|tool|>'" in told[0] and "expert" in told[0]


def test_tokens_past_the_bases_vocabulary(tmp_path):
    """ChatML added to Llama 2; its chats are for own prompts, and surface/ says so."""
    llama = FAMILIES["llama-2"]
    tuned = surface(llama.tuned, more=("<|im_start|>", "<|im_end|>"))
    folders = write_twins(llama, tmp_path, tuned=tuned)
    check(folders)
    sizes = [
        json.loads((Path(folders[r]) / "config.json").read_text())["vocab_size"]
        for r in ("model", "expert")
    ]
    assert sizes[1] == sizes[0] + 2


def refused(folders: dict[str, str], **own) -> str:
    with pytest.raises(UserError) as error:
        check(folders, **own)
    return str(error.value)


def test_other_words_are_refused(tmp_path):
    llama = write_twins("llama-3.1", tmp_path / "llama")
    smol = write_twins("smollm2", tmp_path / "smol")
    line = refused({**llama, "expert": smol["expert"]})
    for part in ("base and expert", "disagree on", "0: '!' / '<|endoftext|>'", "of one family"):
        assert part in line
    assert "--tokenizer-map" not in line


def test_a_token_with_another_meaning_is_refused(tmp_path):
    """Two special tokens changed places: each would be taken for the other."""
    swap = {"<|start_header_id|>": "<|end_header_id|>", "<|end_header_id|>": "<|start_header_id|>"}
    folders = write_twins(LLAMA, tmp_path / "a")
    swapped = dataclasses.replace(LLAMA, base=surface(LLAMA.base, renamed=swap))
    folders["antiexpert"] = write_twins(swapped, tmp_path / "b")["antiexpert"]
    line = refused(folders)
    assert "base and antiexpert disagree on 2 token ids" in line
    assert "'<|start_header_id|>' / '<|end_header_id|>'" in line and "--tokenizer-map" in line


def test_a_distilled_family_needs_a_map(tmp_path):
    folders = write_twins(R1, tmp_path)
    line = refused(folders)
    assert f"disagree on {len(DISTILLED)} token ids" in line and "--tokenizer-map" in line
    assert "'<|im_start|>' / '<｜User｜>'" in line
    same = same_ids(folders)
    check(folders, tokenizer_map={"expert": same})
    left_out = same.popitem()[0]
    assert "disagree on 1 token ids" in refused(folders, tokenizer_map={"expert": same})
    as_json = {str(index): index for index in [*same, left_out]}
    check(folders, tokenizer_map={"expert": as_json})


def test_maps_that_cannot_be(tmp_path):
    folders = write_twins("llama-3.1", tmp_path)
    for ids, tells in (
        ({5: 4000}, "expert 5 -> 4000: the base's vocabulary ends at 423"),
        ({4000: 5}, "expert 4000 -> 5: the expert's vocabulary ends at 423"),
        ({5: 7, 6: 7}, "two of its ids one of the base's"),
        ({-1: 7}, "negative"),
        ({"a": 7}, "not ids to ids"),
        # Words for words: the displaced ones would stand for each other.
        ({300: 301, 301: 302}, "disagree on"),
    ):
        assert tells in refused(folders, tokenizer_map={"expert": ids})
    with pytest.raises(UserError, match="tokenizer map is"):
        ProxyConfig("e", "a", tokenizer_map={"base": {1: 1}})
    told = ProxyConfig("e", "a", tokenizer_map={"expert": {"1": 2}}).to_dict()
    assert ProxyConfig.from_dict(json.loads(json.dumps(told))).tokenizer_map == {"expert": {1: 2}}


def test_ids_that_a_map_drives_out_find_a_place():
    moved = ProxyConfig("e", "a", tokenizer_map={"expert": {5: 7, 7: 9, 3: 3, 8: 2}}).moved_tokens
    assert moved("expert") == {5: 7, 7: 9, 8: 2, 2: 5, 9: 8}
    assert moved("antiexpert") == {}


PLACEHOLDERS = [
    r"<|reserved_special_token_5|>",
    r"<unused12>",
    r"<|extra_id_3|>",
    r"<extra_id_0>",
    r"[control_12]",
    r"<SPECIAL_12>",
    r"<reserved_102>",
    r"[unused1]",
    r"<|dummy_0|>",
    r"<|placeholder1|>",
    r"<filler_token_1>",
    r"<|extra_0|>",
    r"<|reserved_token_1|>",
    r"<｜place▁holder▁no▁5｜>",
    r"<|unused_5|>",
]
TOKENS = [
    r"<|im_end|>",
    r"<|eom_id|>",
    r"<0x0A>",
    r"<|fim_prefix|>",
    r"w7",
    r"[control]",
    r"<jupyter_code>",
    r"[5]",
    r"<2mass>",
    r"<|start_header_id|>",
    r"reserved_5",
    r"<h1>",
    r"<|user_1|>",
    r"unused5",
]


def test_placeholders():
    assert [t for t in PLACEHOLDERS if not is_placeholder(t)] == []
    assert [t for t in TOKENS if is_placeholder(t)] == []


def test_text_for_a_mapped_member_becomes_the_bases_ids(tmp_path):
    """Prompts of each model's own: text is tokenised by the member and read in the base's ids."""
    from types import SimpleNamespace

    from proxy_vllm.own_prompts.member_prompts import MemberPrompts

    folders = write_twins("smollm2", tmp_path)
    members, proxy = configs(folders, tokenizer_map={"expert": {1: 2, 2: 1}})
    prompts = object.__new__(MemberPrompts)
    prompts.proxy, prompts.configs = proxy, members
    prompts.base_config = SimpleNamespace(skip_tokenizer_init=False, max_model_len=512)
    assert prompts.ids("expert", "<|im_start|><|im_end|>") == [2, 1]
    assert prompts.ids("antiexpert", "<|im_start|><|im_end|>") == [1, 2]
    assert prompts.ids("expert", [1, 2]) == [1, 2]
