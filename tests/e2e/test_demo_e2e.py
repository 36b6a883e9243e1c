"""The demo command, with the trained trio in the box."""

import json
import subprocess
import sys

import numpy as np
import pytest


@pytest.mark.slow
def test_the_demo_command_separates_the_levels(tmp_path):
    out = tmp_path / "demo.json"
    command = [
        sys.executable,
        "-m",
        "proxy_vllm.cli.main",
        "demo",
        "--n",
        "300",
        "--json",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.read_text())
    assert numbers["n"] == 300
    assert numbers["base"] < numbers["expert"] < numbers["proxy"] <= numbers["tuned"]
    assert np.isclose(
        numbers["gap_closed"],
        (numbers["proxy"] - numbers["base"]) / (numbers["tuned"] - numbers["base"]),
    )
    adapters = numbers["adapters"]
    assert adapters["no adapter"] == 1
    assert min(adapters["polite"], adapters["gossip"]) > 0.8
    for label in (
        "switched per request",
        "expert alone",
        "proxy-tuned",
        "directly tuned",
        "gap closed",
        "sample answers",
    ):
        assert label in done.stdout
