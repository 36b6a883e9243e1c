"""What an evaluation writes, the ToxiGen classifier, and (slow) the whole command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from proxy_vllm.demo import model_path
from proxy_vllm.demo.world import VALUES
from proxy_vllm.errors import UserError
from proxy_vllm.eval.harness import Marks, Outcome
from proxy_vllm.eval.report import Report, show, write

ROOT = Path(__file__).resolve().parents[2]


def outcome(*each, mean=True):
    value = sum(each) / len(each)
    marks = {"right": Marks(value, 0.1, True, list(each), mean, len(each))}
    lines = [{"doc_id": n, "prompt": "Q", "text": str(mark)} for n, mark in enumerate(each)]
    return Outcome({"task": marks}, {"task": lines}, {})


def test_a_report_is_written_with_a_plot_and_answers(tmp_path, capsys):
    rows = {
        "tuned": outcome(1, 1, 1, 1),
        "base": outcome(0, 0, 0, 1),
        "proxy": outcome(1, 1, 0, 1),
        "expert": outcome(0, 1, 0, 0),
    }
    sweep = {0.0: rows["base"], 1.0: rows["proxy"], 1.5: outcome(1, 0, 0, 1)}
    report = Report(rows, sweep, 1.0)
    show(report)
    said = capsys.readouterr().out
    order = [said.index(label) for label in ("base", "expert alone", "proxy-tuned", "directly")]
    assert order == sorted(order) and "0.667" in said and "by alpha" in said
    write(report, tmp_path / "new" / "out", {"seconds": 1})
    numbers = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    found = numbers["tasks"]["task"]["right"]
    assert list(found["rows"]) == ["base", "expert", "proxy", "tuned"]
    assert found["n"] == 4
    assert found["gap_closed"] == pytest.approx(2 / 3) and numbers["seconds"] == 1
    assert [point["value"] for point in found["alphas"]] == [0.25, 0.75, 0.5]
    written = {p.name for p in (tmp_path / "new" / "out").rglob("*") if p.is_file()}
    assert written >= {"report.json", "task.png", "base.jsonl", "alpha_1.5.jsonl"}
    assert (tmp_path / "new" / "out" / "task.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_mean_of_marks_has_a_gap_and_no_interval():
    rows = {name: outcome(*each, mean=False) for name, each in
            {"base": (0, 0), "proxy": (0, 1), "tuned": (1, 1)}.items()}  # fmt: skip
    assert Report(rows, {}, 1.0).gap("task", "right") == (0.5, None)
    del rows["tuned"]
    assert Report(rows, {}, 1.0).gap("task", "right") == (None, None)


@pytest.mark.parametrize("labels", [2, 3])
def test_the_classifier_is_the_users_and_has_two_labels(tmp_path, labels):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    pytest.importorskip("lm_eval")
    from proxy_vllm.eval.toxicity import classify

    tokenizer = AutoTokenizer.from_pretrained(model_path("base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    texts = [f"{person} has a {pet}" for person in ("Ada", "Bob Tarov") for pet in VALUES["pet"]]
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if labels == 3:
        with pytest.raises(UserError, match="3 labels"):
            classify(texts, str(tmp_path))
        return
    with torch.inference_mode():
        one_by_one = [
            model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts
        ]
    assert classify(texts, str(tmp_path)) == one_by_one and set(one_by_one) == {0, 1}
    with pytest.raises(UserError, match="cannot be loaded"):
        classify(texts, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--classifier"):
        classify(texts, None)


@pytest.mark.slow
def test_the_command_gives_the_figures_of_the_demo(tmp_path):
    models = {role: str(model_path(role)) for role in ("base", "expert", "antiexpert", "tuned")}
    command = [
        *(sys.executable, "-m", "proxy_vllm.cli.main", "eval", models["base"]),
        *("--expert", models["expert"], "--antiexpert", models["antiexpert"]),
        *("--tuned", models["tuned"], "--tasks", "people", "--alphas", "0.5"),
        *("--include-path", str(ROOT / "tests/eval/tasks"), "-o", str(tmp_path)),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64"),
        *("--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["tasks"]["people"]["right"]
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    for row in ("base", "expert", "proxy", "tuned"):
        assert found["rows"][row]["value"] == demo[row]
    assert found["gap_closed"] == pytest.approx(demo["gap_closed"])
    assert found["gap_closed_ci95"] == pytest.approx(demo["gap_closed_ci95"])
