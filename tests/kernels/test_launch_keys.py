"""After warm-up no mix of requests makes Triton compile a kernel while others wait."""

import json
import subprocess
import sys
from pathlib import Path

from test_resources import without_interpreter


def test_no_mix_of_requests_adds_a_kernel(tmp_path):
    script = Path(__file__).with_name("launch_keys.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=without_interpreter(tmp_path), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for result in json.loads(done.stdout.splitlines()[-1]):
        assert result["added"] == 0, result
        # Two tiles with 15 kernels each, and heads for 16, 32 and 64 rows with their winner.
        assert 20 <= result["warm"] <= 36, result
