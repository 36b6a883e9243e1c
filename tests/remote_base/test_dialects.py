"""Every dialect reads its example, and names of tokens find their ids, or say why not."""

import json
from pathlib import Path

import pytest
from fake_base import tokenizer

from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.dialects import (
    DIALECTS,
    Reported,
    get_dialect,
    read_choice,
    request_body,
)
from proxy_vllm.remote_base.token_names import TokenNames, UnknownToken

EXAMPLES = Path(__file__).parent / "examples"
ROOT = Path(__file__).resolve().parents[2]
# Tested against the server itself. Of the others nobody had a key: their examples are written after
# the providers' API references, and what these tests show of them is how we read those references.
SEEN = {"vllm", "llama-cpp-python"}
NAMES = {
    "token_id": [7042, 260],
    "id": [7042, 260],
    "bytes": [b" Paris", b" the"],
    "text": [" Paris", " the"],
}


@pytest.mark.parametrize("name", DIALECTS)
def test_the_example_is_read(name):
    dialect = DIALECTS[name]
    data = json.loads((EXAMPLES / f"{name}.json").read_text())
    (reported,) = read_choice(dialect, data["choices"][0])
    names = NAMES[dialect.naming]
    assert reported.token == names[0]
    assert [entry for entry, _ in reported.top] == names
    assert reported.top[0][1] == pytest.approx(-0.26, abs=0.01)


def test_the_documentation_says_which_dialects_were_seen():
    text = (ROOT / "docs" / "remote_base.md").read_text()
    rows = {
        line.split("`")[1]: line
        for line in text.splitlines()
        if line.startswith("| `") and "--" not in line[:5]
    }
    for name in DIALECTS:
        assert ("a real server" in rows[name]) == (name in SEEN), name
        assert ("never asked" in rows[name]) == (name not in SEEN), name


def test_a_body_is_in_the_form_of_its_route():
    body = request_body(DIALECTS["openai-chat"], "m", "Why?", 1, 20)
    assert body["messages"] == [{"role": "user", "content": "Why?"}]
    assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 20, 0)
    body = request_body(DIALECTS["vllm"], "m", [1, 2], 3, 5, logprob_token_ids=[4])
    assert (body["prompt"], body["logprobs"], body["logprob_token_ids"]) == ([1, 2], 5, [4])
    with pytest.raises(UserError, match="--base-dialect mine is not known: use auto, vllm"):
        get_dialect("mine")


def test_names_become_ids():
    names = TokenNames(tokenizer(), 300)
    ids = tokenizer()("a word260").input_ids
    assert names.id_of(names_of(ids[0])) == ids[0]
    assert names.id_of(" word260") == 260
    assert names.id_of(b" word260") == 260
    assert names.id_of(17) == 17
    # Pieces of a character: by their bytes one id, by the text that stands for all of them none.
    (piece,) = (i for i in range(256) if tokenizer().convert_ids_to_tokens(i) == "Ã")
    assert names.id_of(b"\xc3") == names.id_of("bytes:\\xc3") == piece
    with pytest.raises(UnknownToken, match=r"may be 1[0-9]+ of its tokens"):
        names.id_of("\ufffd")
    with pytest.raises(UnknownToken, match="' nothing' is none of its tokens"):
        names.id_of(" nothing")


def names_of(index: int) -> str:
    return tokenizer().decode([index])


def test_a_row_says_whether_likelier_tokens_may_be_missing():
    names = TokenNames(tokenizer(), 300)
    whole = names.row(Reported("a", [("a", -0.5), ("b", -2.0)]), 300)
    assert whole.ceiling == -2.0 and len(whole.ids) == 2
    part = names.row(Reported("a", [("a", -0.5), ("\ufffd", -1.0), ("b", -2.0)]), 300)
    assert part.ceiling == 0.0 and len(part.ids) == 2
    filled = names.row(Reported("a", [("a", -0.5), ("!", -9999.0)]), 300)
    assert filled.ceiling == 0.0 and len(filled.ids) == 1
