"""The benchmarks of scale-out, of a step, of one pass for two, and the logprob client, on a CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_common import compare_with_loop, gpu_key, percentiles
from engines import prompt_ids
from multi_gpu.cells import Bench
from multi_gpu.placement import Machine
from multi_gpu.report import COLUMNS, markdown
from reference_loop import Trio, greedy
from remote_logprobs import combine

from proxy_vllm.plan.gpus import GPUS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

if os.environ.get("PROXY_VLLM_CPU_RUNNER") == "v2":
    pytest.skip("benchmarks measure the users' runner", allow_module_level=True)


def run_script(name: str, path: Path, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), "--smoke", *options, "--json", str(path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(path.read_text())


def check_provenance(result: dict, script: str) -> None:
    import vllm

    assert result["versions"]["vllm"] == vllm.__version__
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"]
    assert result["commit"]
    assert f"scripts/{script}" in result["command"]
    assert "--smoke" in result["command"]
    assert not any("KEY" in name for name in result["environment"])


def check_percentiles(values: dict) -> None:
    assert set(values) == {"p20", "p50", "p80", "p99"}
    assert 0 < values["p20"] <= values["p50"] <= values["p80"] <= values["p99"]


def check_multi_gpu(result: dict, path: Path) -> dict:
    """Every field of every row, the table and the plot; returns the rows by their cell."""
    check_provenance(result, "bench_multi_gpu.py")
    assert result["correctness"]["passed"]
    assert result["correctness"]["tokens"] == 4 * 8
    for row in result["rows"]:
        check_provenance(row, "bench_multi_gpu.py")
        assert row["error"] is None
        check_percentiles(row["ttft_ms"])
        check_percentiles(row["tpot_ms"])
        assert row["output_tokens_per_s"] > 0
        per_device = row["output_tokens_per_s"] / row["devices"]
        assert row["output_tokens_per_s_per_device"] == pytest.approx(per_device, abs=1e-3)
        assert row["peak_memory_bytes"] > 100 << 20  # no process with PyTorch is smaller
        assert row["scaling_efficiency"] > 0
        assert row["floor"] is None or torch.cuda.is_available()
        if row["mode"] == "batch":
            # What one row gets in its own pace bounds the rate of all from above.
            bound = row["batch"] * row["replicas"] * 1e3 / row["tpot_ms"]["p20"]
            assert row["output_tokens_per_s"] < 1.5 * bound
    table = path.with_suffix(".md").read_text()
    assert table.count("\n| ") == 1 + len(result["rows"])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    by_cell = {(r["system"], r["mode"], r["replicas"]): r for r in result["rows"]}
    assert by_cell["proxy", "batch", 1]["rows_equal_to_loop"] == 1.0
    assert by_cell["proxy", "batch", 1]["scaling_efficiency"] == 1.0
    return by_cell


def test_a_small_run_has_every_field(tmp_path):
    path = tmp_path / "out.json"
    only = ["--systems", "loop", "proxy", "--replicas", "1", "--request-rate"]
    cells = check_multi_gpu(run_script("bench_multi_gpu.py", path, *only), path)
    assert set(cells) == {("loop", "batch", 1), ("proxy", "batch", 1)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_multi_gpu_smoke_has_every_peer(tmp_path):
    path = tmp_path / "out.json"
    cells = check_multi_gpu(run_script("bench_multi_gpu.py", path), path)
    two = [("proxy", "batch", 2)] if len(os.sched_getaffinity(0)) > 1 else []
    assert set(cells) == {
        *two, ("proxy", "batch", 1), ("base", "batch", 1), ("expert", "batch", 1),
        ("tuned", "batch", 1), ("loop", "batch", 1), ("remote-logprobs", "batch", 1),
        ("proxy", "rate", 1), *[("proxy", "rate", replicas) for _, _, replicas in two],
    }  # fmt: skip
    assert cells["base", "batch", 1]["rows_equal_to_loop"] is None
    assert 0 <= cells["remote-logprobs", "batch", 1]["rows_equal_to_loop"] <= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_step_smoke_has_every_field(tmp_path):
    result = run_script("bench_step.py", tmp_path / "out.json")
    check_provenance(result, "bench_step.py")
    checked = result["correctness"]["proxy"]
    assert checked["passed"] and checked["exact"] == checked["tokens"] == 4 * 16
    assert [row["batch"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        for system in ("proxy", "base"):
            step = row[system]["step_ms"]["p50"]
            assert row[system]["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / step, rel=1e-2)
        ratio = row["base"]["step_ms"]["p50"] / row["proxy"]["step_ms"]["p50"]
        assert row["ratio"] == {"proxy": pytest.approx(ratio, abs=1e-3)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_pass_smoke_has_every_field(tmp_path):
    result = run_script("bench_one_pass.py", tmp_path / "out.json")
    check_provenance(result, "bench_one_pass.py")
    checked = result["correctness"]
    assert checked["passed"] and checked["equal_rows"] == checked["rows"] == 2 * 4
    assert [each["exact"] for each in checked["of_transformers"]] == [8 * 16] * 2
    assert [(row["small"], row["batch"]) for row in result["rows"]] == [("tiny", 1), ("tiny", 4)]
    for row in result["rows"]:
        both = row["step_ms"]["p50"], row["step_of_twice_the_rows_ms"]["p50"]
        gain = row["at_most"]["gain_ms"]["p50"]
        assert gain == pytest.approx(2 * both[0] - both[1], abs=1e-3)
    assert {row["gpu"] for row in result["floors"]} == {"h100-sxm", "h200"}


def test_the_gate_passes_the_loops_tokens_and_no_others(trio):
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    prompts = prompt_ids([5, 9])
    right = [greedy(models, p, 6, 1.0)[0] for p in prompts]
    checked = compare_with_loop(models, prompts, right, "float32", [1.0, 1.0])
    assert (checked["passed"], checked["exact"], checked["tokens"]) == (True, 12, 12)
    base_alone = [greedy(models, p, 6, 0.0)[0] for p in prompts]
    assert base_alone != right
    assert not compare_with_loop(models, prompts, base_alone, "bfloat16", [1.0, 1.0])["passed"]
    assert not compare_with_loop(models, [], [], "float32", [])["passed"]


def test_logprobs_of_every_token_choose_as_the_formula():
    generator = torch.Generator().manual_seed(5)
    for alpha in (1.0, 0.5, -1.0):
        logits = [torch.randn(50, generator=generator) * 3 for _ in range(3)]
        rows = [dict(enumerate(x.log_softmax(-1).tolist())) for x in logits]
        want = int((logits[0] + alpha * (logits[1] - logits[2])).argmax())
        scores = combine(*rows, alpha)
        assert max(scores, key=scores.get) == want


def test_a_candidate_that_a_small_model_does_not_report_gets_its_least_logprob():
    base, expert, antiexpert = {1: -1.0, 2: -2.0}, {1: -0.5, 7: -4.0}, {2: -0.25, 9: -3.0}
    scores = combine(base, expert, antiexpert, 2.0)
    assert scores == {1: -1.0 + 2 * (-0.5 + 3.0), 2: -2.0 + 2 * (-4.0 + 0.25)}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA A100-SXM4-40GB", "a100-40g"), ("CPU x86_64", None),
    ],
)  # fmt: skip
def test_gpu_names(name, key):
    assert gpu_key(name) == key
    assert key is None or key in GPUS


def test_percentiles_interpolate():
    assert percentiles([1.0, 2.0, 3.0], (0, 25, 50, 100)) == {
        "p0": 1.0, "p25": 1.5, "p50": 2.0, "p100": 3.0,
    }  # fmt: skip
    assert percentiles([]) is None


def test_replicas_share_no_gpu_and_no_core():
    machine = Machine(gpus=("4", "5", "6", "7"), cores=(0, 1, 2, 3))
    got = [machine.environment(i, 2, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert got == ["4,5", "6,7"]
    assert machine.check(2, 2) is None
    assert machine.check(2, 4) == "2 x TP 4 needs 8 GPUs, there are 4"
    cpu = Machine(gpus=(), cores=(0, 1, 2, 3))
    got = [cpu.environment(i, 2, 2)["VLLM_CPU_OMP_THREADS_BIND"] for i in range(2)]
    assert got == ["0|1", "2|3"]
    assert cpu.server_environment(2, 1) == {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}
    assert "cores" in cpu.check(5, 1)


@pytest.fixture
def bench(trio):
    from argparse import Namespace

    args = Namespace(
        base=trio["model"], expert=trio["expert"], antiexpert=trio["antiexpert"], tuned=None,
        batch=[2], input_len=4, output_len=3, dtype="float32", gpu=None, environment={},
    )  # fmt: skip
    about = {"device": "NVIDIA H200", "commit": "c" * 40, "command": "x", "versions": {"vllm": "0"}}
    return Bench(args, about)


def part(start: float, end: float) -> dict:
    return {"start": start, "end": end, "tokens": [[1, 2, 3], [4, 5, 6]],
            "ttft_ms": [10.0, 20.0], "tpot_ms": [5.0, 5.0]}  # fmt: skip


def test_a_row_counts_from_the_first_start_to_the_last_end(bench):
    cell = {"system": "proxy", "mode": "batch", "tp": 1, "batch": 2}
    bench.loop_tokens[2] = [[1, 2, 3], [4, 5, 7]]
    bench._add({**cell, "replicas": 1}, [part(0.0, 1.0)], 1 << 30, [[1, 2, 3], [4, 5, 6]])
    bench._add({**cell, "replicas": 2}, [part(5.0, 6.0), part(5.5, 7.0)], 2 << 30, None)
    one, two = bench.rows
    assert one["output_tokens_per_s"] == 6.0
    assert one["rows_equal_to_loop"] == 0.5
    assert one["ttft_ms"]["p50"] == 15.0
    assert two["output_tokens_per_s"] == 6.0  # 12 tokens in 2 s
    assert two["scaling_efficiency"] == 0.5
    # The step's bytes by hand: Llama weights (the token tables are untied) and 5 tokens of cache.
    base = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 111 * 64
    small = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 111 * 64
    cache = 2 * 5 * (2 * 2 * 64 + 2 * 2 * 32)
    logits = 2 * 3 * 111
    least = 4 * (base + 2 * small + cache + logits) / 4.3e12 * 1e3
    assert math.isclose(one["floor"]["step_ms"], least, rel_tol=0.02)  # norms are not in `least`
    assert math.isclose(one["floor"]["share"], least / 5.0, rel_tol=0.02)
    alone = 4 * (base + 2 * 5 * 2 * 2 * 64 + 2 * 111) / 4.3e12 * 1e3
    assert math.isclose(one["floor"]["ratio"], alone / least, rel_tol=0.02)
    assert one["floor"]["gpu"] == "h200"


def test_a_cell_that_cannot_run_keeps_the_others(bench):
    bench.machine = Machine(gpus=("0",), cores=(0,))
    bench._add(
        {"system": "proxy", "mode": "batch", "replicas": 1, "tp": 1, "batch": 2},
        [part(0.0, 1.0)], 1 << 30, None,
    )  # fmt: skip
    bench.offline("proxy", 2, 1)
    good, bad = bench.rows
    assert good["error"] is None
    assert bad["error"] == "2 x TP 1 needs 2 GPUs, there are 1"
    assert bad["output_tokens_per_s"] is None
    lines = markdown({**bench.about, "rows": bench.rows}).splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert all(line.count("|") == len(COLUMNS) + 1 for line in table)
    assert "failed: 2 x TP 1 needs 2 GPUs" in table[-1]


@pytest.mark.parametrize(
    "options", [["--smoke", "--batch", "0"], ["base"], ["--smoke", "--tp", "-1"]]
)
def test_bad_options_end_before_anything_runs(options):
    import bench_multi_gpu

    with pytest.raises(SystemExit) as stop:
        bench_multi_gpu.parse(options)
    assert stop.value.code == 2
