"""A prompt for each model in files and tables of prompts, against the three-model loop."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from engines import SMALL, V2, prompt_ids
from reference_loop import Trio, greedy
from test_generate import command, run_in_process
from transformers import AutoTokenizer

from proxy_vllm.demo import model_path

pytestmark = pytest.mark.skipif(not V2, reason="own prompts need Model Runner V2")

TOKENS = 6
SETTINGS = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
SHORT, MIDDLE, LONG = prompt_ids([4, 40, 75], seed=700)
# What each line asks, and the token ids that the three models then read.
LINES = [
    ({"prompt": {"base": MIDDLE, "expert": LONG}}, {"base": MIDDLE, "expert": LONG}),
    ({"prompt": SHORT}, SHORT),
    (
        {"prompt": {"base": "w5 w6", "expert": "user w5 w6 assistant", "antiexpert": SHORT}},
        {"base": [5, 6], "expert": [2, 5, 6, 3], "antiexpert": SHORT},
    ),
    ({"prompt": {"base": LONG, "expert": None, "antiexpert": "w7"}, "proxy_alpha": -1.0},
     {"base": LONG, "antiexpert": [7]}),
    ({"prompt": {"base": SHORT}}, SHORT),
    (
        {"messages": [{"role": "user", "content": "w8 w9"}], "proxy_alpha": 0.5},
        {"base": [8, 9], "expert": [2, 8, 9, 3], "antiexpert": [8, 9]},
    ),
]  # fmt: skip
BAD = [
    ({"prompt": {"base": [5], "expert": [5] * 256}}, "the expert's prompt has 256 tokens"),
    ({"prompt": {"base": [5], "antiexpert": [111]}}, "the antiexpert's prompt holds token id 111"),
    ({"prompt": {"base": [5], "exprt": [6]}}, "prompt.exprt is not a known field"),
    ({"prompt": {"base": [5], "expert": [6]}, "prompt_logprobs": 1}, "prompt_logprobs with own"),
]


@pytest.fixture(scope="module")
def expected(trio) -> list[list[int]]:
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    return [greedy(models, ids, TOKENS, line.get("proxy_alpha", 1.0))[0] for line, ids in LINES]


def base_length(ids) -> int:
    return len(ids["base"] if isinstance(ids, dict) else ids)


def write(path, lines) -> None:
    path.write_text("".join(json.dumps({**line, **SETTINGS}) + "\n" for line in lines))


def test_lines_of_a_file(trio, expected, tmp_path):
    """Good and bad lines in turn; `skip` reports the bad ones and answers the others."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line for line, _ in LINES]
    for i, (line, _) in enumerate(BAD):
        lines.insert(2 * i, line)
    write(source, lines)
    options = (
        "--own-prompts", "--base-chat-template", "plain", "--expert-chat-template", "auto",
        "--token-ids", "--on-error", "skip",
    )  # fmt: skip
    assert run_in_process(*command(trio, source, target, *options)) == 1
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r["token_ids"] for r in results] == expected
    assert [r["prompt_tokens"] for r in results] == [base_length(ids) for _, ids in LINES]
    errors = [json.loads(x) for x in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [e["line"] for e in errors] == [1, 3, 5, 7]
    for error, (_, message) in zip(errors, BAD, strict=True):
        assert message in error["error"]


def test_an_engine_without_them_ends_at_such_a_line_and_says_the_way_out(trio, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [LINES[1][0], LINES[0][0]])
    assert run_in_process(*command(trio, source, target)) == 2
    said = capsys.readouterr().err
    assert "in.jsonl:2: " in said and "--own-prompts" in said
    assert len(target.read_text().splitlines()) == 1


def test_rows_of_a_table(trio, expected):
    """A column of structs, with nulls where a row has no prompt of that model's own."""
    pa = pytest.importorskip("pyarrow")
    from vllm.distributed import cleanup_dist_env_and_memory

    from proxy_vllm.batch.ray_generator import ProxyGenerator

    chosen = [0, 3, 4, 5]
    rows = [
        {"prompt": {"base": MIDDLE, "expert": LONG, "antiexpert": None}},
        {"prompt": {"base": LONG, "expert": None, "antiexpert": [7]}, "proxy_alpha": -1.0},
        {"prompt": {"base": SHORT, "expert": None, "antiexpert": None}},
        {"messages": LINES[5][0]["messages"], "proxy_alpha": 0.5},
        {"prompt": {"base": SHORT, "expert": [111], "antiexpert": None}},
    ]
    generator = ProxyGenerator(
        **trio, **SMALL, sampling=SETTINGS, token_ids=True, own_prompts=True,
        base_chat_template="plain", expert_chat_template="auto",
    )  # fmt: skip
    try:
        columns = {n: [row.get(n) for row in rows] for n in ("prompt", "messages", "proxy_alpha")}
        *answers, bad = generator(pa.table(columns)).to_pylist()
    finally:
        generator._generator.close()
        cleanup_dist_env_and_memory()
    assert [a["token_ids"] for a in answers] == [expected[i] for i in chosen]
    assert [a["prompt_tokens"] for a in answers] == [base_length(LINES[i][1]) for i in chosen]
    assert "the expert's prompt holds token id 111" in bad["error"]


def test_the_example_in_the_readme(tmp_path):
    """Its command on its lines: what the loop says, and what the text says."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    section = readme.split("## A prompt for each model", 1)[1].split("\n## ", 1)[0]
    block = section.split("```sh\n", 1)[1].split("```", 1)[0]
    lines = re.search(r"<<'END'\n(.*?)END\n", block, re.S).group(1)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines)
    run = block.split("proxy-vllm ", 1)[1].replace("$models", str(model_path("base").parent))
    argv = shlex.split(run.replace("\\\n", " "))
    argv[argv.index("-i") + 1], argv[argv.index("-o") + 1] = str(source), str(target)
    small = ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "4"]
    assert run_in_process(*argv, *small) == 0
    said = [json.loads(line)["text"].strip() for line in target.read_text().splitlines()]

    models = Trio.load(*map(str, map(model_path, ("base", "expert", "antiexpert"))), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path("base"))
    for text, line in zip(said, lines.splitlines(), strict=True):
        prompt = json.loads(line)["prompt"]
        prompts = prompt if isinstance(prompt, dict) else {"base": prompt}
        ids = {role: tokenizer(text).input_ids for role, text in prompts.items()}
        tokens, _ = greedy(models, ids, 32, 1.0, [tokenizer.eos_token_id])
        assert text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert text in section
    assert len(set(said)) == 2 and said[0] == said[2]
