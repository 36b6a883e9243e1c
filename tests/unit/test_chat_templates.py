"""The named chat templates, letter by letter, and what else an option may name."""

import pytest
from transformers import AutoTokenizer

from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.chat_templates import resolve_template

SYSTEM, ASKED, SAID, AGAIN = "Be kind.", "Who? \n", "Me.", "Why?"
TURN = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}]
TURNS = [
    *TURN,
    {"role": "assistant", "content": SAID},
    {"role": "user", "content": AGAIN},
]


@pytest.fixture(scope="module")
def tokenizer(trio):
    tokenizer = AutoTokenizer.from_pretrained(trio["expert"])
    tokenizer.bos_token = "<s>"
    return tokenizer


def render(tokenizer, name, messages, **kwargs):
    kwargs = {"add_generation_prompt": True, **kwargs}
    template = resolve_template("expert", name)
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)


def test_plain(tokenizer):
    assert render(tokenizer, "plain", TURNS) == f"<s>{SYSTEM}\n\n{ASKED}\n\n{SAID}\n\n{AGAIN}"
    prefixed = render(tokenizer, "plain", TURN[1:], response_prefix="Answer:")
    assert prefixed == f"<s>{ASKED}\nAnswer:"
    told = render(tokenizer, "plain", TURN[1:], response_prefix="A", add_generation_prompt=False)
    assert told == f"<s>{ASKED}"


def test_the_papers_llama_2(tokenizer):
    """As modeling/dexperts.py of the original puts it together, for one turn."""
    prefix, suffix = "[INST]", " [/INST]"
    assert render(tokenizer, "llama-2-paper", TURN[1:]) == "<s>" + prefix + ASKED + suffix
    prefix += f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n"
    assert render(tokenizer, "llama-2-paper", TURN) == "<s>" + prefix + ASKED + suffix
    suffix += " Answer:"
    prefixed = render(tokenizer, "llama-2-paper", TURN, response_prefix="Answer:")
    assert prefixed == "<s>" + prefix + ASKED + suffix


def test_llama_2(tokenizer):
    """Meta's format: a space after [INST], the system prompt in the first turn alone."""
    assert render(tokenizer, "llama-2", TURN) == (
        f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{ASKED} [/INST]"
    )
    assert render(tokenizer, "llama-2", TURNS, response_prefix="A:") == (
        f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{ASKED} [/INST] {SAID} </s>"
        f"<s>[INST] {AGAIN} [/INST] A:"
    )


def test_a_tokenizer_without_a_beginning(trio):
    tokenizer = AutoTokenizer.from_pretrained(trio["expert"])
    assert tokenizer.bos_token is None
    assert render(tokenizer, "plain", TURN[1:]) == ASKED
    assert render(tokenizer, "llama-2", TURN[1:]) == f"[INST] {ASKED} [/INST]"


def test_files_and_jinja_itself(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}é\n", encoding="utf-8")
    assert resolve_template("expert", str(file)) == "{{ messages[0].content }}é\n"
    assert resolve_template("expert", "{% if x %}y{% endif %}") == "{% if x %}y{% endif %}"
    assert resolve_template("expert", "auto") == "auto"
    assert resolve_template("expert", None) is None


def test_what_is_none_of_these_is_one_line(tmp_path):
    binary = tmp_path / "model.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    for value, reason in (
        ("lama-2", "No such file"),
        (str(tmp_path), "Is a directory"),
        (str(binary), "not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=reason) as refused:
            resolve_template("antiexpert", value)
        message = str(refused.value)
        assert f"--antiexpert-chat-template {value!r}" in message and "\n" not in message
