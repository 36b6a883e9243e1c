"""`proxy-vllm generate` on a real engine, against the Transformers loop and across a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from engines import SMALL, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import CHAT_TEMPLATE
from transformers import AutoTokenizer

from proxy_vllm.batch.generator import BatchGenerator
from proxy_vllm.batch.request import LineOptions
from proxy_vllm.envs import cpu_runner

EOS = 1
ALPHAS = [1.0, 0.0, -1.5, None]


def greedy_lines(count, max_tokens):
    """Lines as text, token ids and messages, their alphas mixed, and each one's token ids."""
    tokenizer_ids = prompt_ids([3 + (7 * i) % 40 for i in range(count)], seed=5)
    lines = []
    for i, ids in enumerate(tokenizer_ids):
        line = {"id": f"line-{i}", "max_tokens": max_tokens - i % 5, "temperature": 0}
        words = " ".join(f"w{token}" for token in ids)
        if i % 3 == 0:
            line["prompt"] = ids
        elif i % 3 == 1:
            line["prompt"] = words
        else:
            line["messages"] = [{"role": "user", "content": words}]
        if (alpha := ALPHAS[i % len(ALPHAS)]) is not None:
            line["proxy_alpha"] = alpha
        lines.append(line)
    return lines


def load(trio):
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


def reference(models, tokenizer, line):
    """Prompt length, token ids and text that the three-model loop gives for a line."""
    if "messages" in line:
        ids = tokenizer.apply_chat_template(
            line["messages"], chat_template=CHAT_TEMPLATE, add_generation_prompt=True
        )["input_ids"]
    elif isinstance(line["prompt"], str):
        ids = tokenizer(line["prompt"]).input_ids
    else:
        ids = line["prompt"]
    stop = () if line.get("ignore_eos") else (EOS,)
    tokens, _ = greedy(models, ids, line["max_tokens"], line.get("proxy_alpha", 1.0), stop)
    # A text goes on from its prompt: the space between the two is the text's.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode([*ids, *tokens], skip_special_tokens=True).removeprefix(before)
    return len(ids), tokens, text


def test_lines_against_the_reference_loop_with_bad_ones_among_them(trio):
    lines = greedy_lines(16, 12)
    bad = {
        3: ({"prompt": [7] * 300}, "maximum context length is 256 tokens"),
        6: ({"prompt": "w5", "proxy_alpha": 1000}, "proxy_alpha is 1000"),
        7: ({"prompt": [111]}, "out of vocabulary"),
        9: ({"prompt": "w5", "stop_token_ids": [5000]}, "5000"),
    }
    items, good = [], iter(lines)
    for number in range(1, len(lines) + len(bad) + 1):
        items.append((number, bad[number][0] if number in bad else next(good)))
    with running(**trio) as llm:
        # Fewer sequences at once than lines: later ones enter while earlier ones run.
        generator = BatchGenerator(llm, LineOptions(token_ids=True), max_running=5)
        results = list(generator.run(items))
        assert not llm.llm_engine.has_unfinished_requests()
    assert [r.number for r in results] == list(range(1, 21))
    models, tokenizer = load(trio), AutoTokenizer.from_pretrained(trio["model"])
    for result, (number, line) in zip(results, items):
        if number in bad:
            assert bad[number][1] in result.error and result.output is None
            continue
        length, tokens, text = reference(models, tokenizer, line)
        assert result.output == {
            "id": line["id"],
            "text": text,
            "finish_reason": "stop" if tokens[-1] == EOS else "length",
            "token_ids": tokens,
            "prompt_tokens": length,
            "completion_tokens": len(tokens),
            "proxy_alpha": line.get("proxy_alpha", 1.0),
        }


def test_logprobs_and_several_texts(trio):
    item = {"prompt": "w5 w6", "max_tokens": 4, "ignore_eos": True, "proxy_alpha": 0.5}
    items = [
        (1, {**item, "n": 3, "seed": 1, "temperature": 1.0}),
        (2, {**item, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1}),
    ]
    with running(**trio) as llm:
        first, second = BatchGenerator(llm, LineOptions(token_ids=True)).run(items)
    several = [tuple(o["token_ids"]) for o in first.output["outputs"]]
    assert len(set(several)) > 1 and all(len(tokens) == 4 for tokens in several)
    assert first.output["completion_tokens"] == 12

    tokens, logits = greedy(load(trio), [5, 6], 4, 0.5)
    entries = second.output["logprobs"]
    assert [e["token_id"] for e in entries] == second.output["token_ids"] == tokens
    for entry, row in zip(entries, logits):
        values, ids = row.log_softmax(-1).topk(2)
        assert [t["token_id"] for t in entry["top"]] == ids.tolist()
        assert [t["logprob"] for t in entry["top"]] == pytest.approx(values.tolist(), abs=1e-4)
        assert entry["token"] in entry["top"][0]["token"]
    assert second.output["prompt_logprobs"][0] is None
    assert len(second.output["prompt_logprobs"]) == 2


def command(trio, source, target, *more):
    # Room for whole prompts in a step: what is under test here is not chunked prefill.
    engine = {**SMALL, "max_num_batched_tokens": 512, "max_num_seqs": 4}
    del engine["enforce_eager"]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in engine.items()]
    members = [trio["model"], "--expert", trio["expert"], "--antiexpert", trio["antiexpert"]]
    files = ["-i", str(source), "-o", str(target)]
    return ["generate", *members, *files, *small, "--enforce-eager", *more]


def run_in_process(*argv):
    """The command in this process; its exit status."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from proxy_vllm.cli.main import main

    try:
        main(list(argv))
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        cleanup_dist_env_and_memory()


def test_a_killed_run_and_its_resumption_equal_an_uninterrupted_one(trio, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    # In Triton's interpreter a step takes a third of a second.
    lines = greedy_lines(14, 12) if cpu_runner() == "v2" else greedy_lines(40, 60)
    for i, line in enumerate(lines):
        line["ignore_eos"] = True
        if i % 2:
            line.update(temperature=1.0, seed=100 + i)
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ("--token-ids",)
    assert run_in_process(*command(trio, source, whole, *options)) == 0

    argv = [sys.executable, "-m", "proxy_vllm.cli.main", *command(trio, source, target, *options)]
    log = (tmp_path / "log").open("w")
    # Processes as users have them, and not one for all as elsewhere in these tests.
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        deadline = time.monotonic() + 240
        while not target.exists() or target.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the command wrote nothing"
            time.sleep(0.01)
        of_the_engine = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    # Nobody told the engine to end, and it holds no memory that the resumed run needs.
    assert len(of_the_engine) >= 2
    assert psutil.wait_procs(of_the_engine, timeout=30)[1] == []
    kept = target.read_bytes().count(b"\n")
    assert 3 <= kept < len(lines), "the kill came too late to show anything"
    with target.open("ab") as file:
        file.write(b'{"id": "line-9", "te')  # what a kill within a write leaves

    assert run_in_process(*command(trio, source, target, *options)) == 2
    for other in (["--alpha", "-3"], ["--expert", trio["antiexpert"]], ["--top-k", "5"]):
        assert run_in_process(*command(trio, source, target, *options, "--resume", *other)) == 2
        assert f"was begun with {'defaults' if '--top-k' in other else other[0][2:]} " in (
            capsys.readouterr().err
        )
    assert run_in_process(*command(trio, source, target, *options, "--resume")) == 0
    assert target.read_bytes() == whole.read_bytes()

    results = [json.loads(row) for row in whole.read_text().splitlines()]
    assert [r["id"] for r in results] == [line["id"] for line in lines]
    models, tokenizer = load(trio), AutoTokenizer.from_pretrained(trio["model"])
    for line, result in list(zip(lines, results))[:12:2]:
        assert result["token_ids"] == reference(models, tokenizer, line)[1]
