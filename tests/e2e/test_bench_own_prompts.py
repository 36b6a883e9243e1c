"""The benchmark of own prompts: its gate, its arithmetic, and one tiny run."""

import pytest
import torch
from bench_common import compare_with_loop
from bench_own_prompts import summary
from engines import prompt_ids
from reference_loop import Trio, greedy
from test_bench_multi_gpu import check_provenance, run_script  # skips where the runner is v2


def test_the_gate_knows_which_model_read_what(trio):
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    ids = prompt_ids([20, 33, 7], seed=900)
    prompt = dict(zip(("base", "expert", "antiexpert"), ids, strict=True))
    right = greedy(models, prompt, 8, 1.0)[0]
    checked = compare_with_loop(models, [prompt], [right], "float32", [1.0])
    assert (checked["passed"], checked["exact"], checked["tokens"]) == (True, 8, 8)
    for wrong in (ids[0], {**prompt, "expert": ids[2]}):
        tokens = greedy(models, wrong, 8, 1.0)[0]
        assert not compare_with_loop(models, [prompt], [tokens], "bfloat16", [1.0])["passed"]


def test_ratios_are_of_one_turn_outside_the_interpreter():
    def turn(**steps: float) -> dict:
        return {
            kind: {"step_ms": ms + 100, "step_outside_interpreter_ms": ms}
            for kind, ms in steps.items()
        }

    # The machine is slower by half in each turn; the ratios say nothing of that.
    speeds = [4.0, 6.0, 9.0]
    result = summary([turn(off=s, idle=1.25 * s, own=1.5 * s) for s in speeds])
    assert result["step_ms"]["off"]["p50"] == 106.0
    assert result["step_outside_interpreter_ms"]["own"]["p50"] == 9.0
    for name, ratio in {"idle/off": 1.25, "own/idle": 1.2, "own/off": 1.5}.items():
        assert result["ratios"][name] == {"median": ratio, "low": ratio, "high": ratio}
    # One turn that went wrong moves the interval, not the figure.
    result = summary([turn(off=4.0, idle=4.0, own=o) for o in (4.0, 4.0, 4.0, 4.0, 12.0)])
    assert result["ratios"]["own/off"] == {"median": 1.0, "low": 1.0, "high": 3.0}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smoke(tmp_path):
    result = run_script("bench_own_prompts.py", tmp_path / "out.json")
    check_provenance(result, "bench_own_prompts.py")
    assert result["correctness"]["passed"]
    assert result["correctness"]["exact"] == result["correctness"]["tokens"] == 6 * 12
    for kind in ("off", "idle", "own"):
        whole, rest = (
            result[name][kind]["p50"] for name in ("step_ms", "step_outside_interpreter_ms")
        )
        assert 0 < rest < whole
    assert set(result["ratios"]) == {"idle/off", "own/idle", "own/off"}
