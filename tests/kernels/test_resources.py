"""Every kernel compiles for sm_90 and keeps its values in registers; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def without_interpreter(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PROXY_VLLM_CPU_RUNNER": "v1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    return environment


# Shared memory of a block, in bytes, on the least of each generation's data-centre devices.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize(
    "architectures", [(90,), pytest.param((80, 100), marks=pytest.mark.slow)], ids=str
)
def test_kernels_compile_without_spills(tmp_path, architectures):
    out = tmp_path / "resources.json"
    command = [sys.executable, "-m", "kernel_bench.resources", "--quick", "--json", str(out)]
    done = subprocess.run(
        [*command, "--arch", *map(str, architectures)],
        cwd=ROOT, env=without_interpreter(tmp_path), capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads(out.read_text())["kernels"]
    for arch in architectures:
        mine = [record for record in kernels if record["arch"] == arch]
        assert {record["kernel"].split("[")[0] for record in mine} == {
            "base_max_kernel",
            "combine_kernel",
            "combine_only_kernel",
            "filtered_kernel",
            "filtered_winner_kernel",
            "finish_kernel",
            "head_kernel",
            "round_kernel",
            "winner_kernel",
        }
        for record in mine:
            assert record["spill_bytes"] == 0, record
            assert record["registers"] <= 255, record
            assert record["shared_bytes"] <= SHARED[arch], record
            if record["kernel"].startswith("head_kernel"):
                assert record["sums_with_products"] == 0, "equal members would not cancel"
