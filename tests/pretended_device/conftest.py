"""These tests replace parts of PyTorch and need a process of their own: ``make test-device``."""

import os

collect_ignore_glob = []
if os.environ.get("PRETENDED_DEVICE") == "1":
    assert os.environ.get("PROXY_VLLM_CPU_RUNNER") == "v2", (
        "PRETENDED_DEVICE=1 needs PROXY_VLLM_CPU_RUNNER=v2"
    )
    import pretended_device.machine  # noqa: F401
else:
    collect_ignore_glob.append("test_*.py")


def pytest_report_header() -> str | None:
    if collect_ignore_glob:
        return "pretended device: left out, it needs PRETENDED_DEVICE=1 and a process of its own"
    return None
