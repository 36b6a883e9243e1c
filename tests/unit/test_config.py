"""ProxyConfig: what is accepted, what is refused, and that it survives the trip to a worker."""

import json
import os
import subprocess
import sys

import pytest

from proxy_vllm import ProxyConfig
from proxy_vllm.errors import UserError

MEMBERS = {"expert": "e", "antiexpert": "a"}


@pytest.mark.parametrize("value", [0, 1, -10, 10, 0.25, "0.5", -0.0])
def test_alpha_in_range(value):
    assert ProxyConfig(**MEMBERS).check_alpha(value) == float(value)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 10.01, -11, "x", "", True, [1.0], {}, 10**400],
)
def test_alpha_refused_in_one_line(value):
    with pytest.raises(UserError) as error:
        ProxyConfig(**MEMBERS).check_alpha(value)
    assert "proxy_alpha" in str(error.value) and "\n" not in str(error.value)


def test_range_is_configurable():
    config = ProxyConfig(**MEMBERS, alpha=20, alpha_range=(0, 50))
    assert config.check_alpha(50) == 50
    with pytest.raises(UserError, match=r"0 \.\. 50"):
        config.check_alpha(-1)
    with pytest.raises(UserError, match="alpha is 20"):
        ProxyConfig(**MEMBERS, alpha=20)


def test_a_request_that_names_no_alpha_takes_the_servers():
    config = ProxyConfig(**MEMBERS, alpha=0.7)
    assert config.alpha_of(None) == config.alpha_of({}) == config.alpha_of({"other": 1}) == 0.7
    assert config.alpha_of({"proxy_alpha": 0}) == 0


def test_a_guidance_scale_is_alpha_and_one_and_refused_by_its_own_name():
    config = ProxyConfig("", "", alpha=0.5, method="cfg", alpha_range=(-1, 4))
    assert config.alpha_of({}) == 0.5
    for scale, alpha in ((0, -1), (1, 0), ("1.5", 0.5), (5, 4)):
        assert config.alpha_of({"guidance_scale": scale}) == alpha
    for scale in (float("nan"), float("inf"), 5.5, -0.5, "x", "", True, [1.0], {}, 10**400):
        with pytest.raises(UserError, match=r"^guidance_scale is "):
            config.alpha_of({"guidance_scale": scale})
    with pytest.raises(UserError, match=r"5.5: it must lie in 0 \.\. 5 \(--alpha-range, of alpha"):
        config.alpha_of({"guidance_scale": 5.5})


def test_configuration_survives_json():
    config = ProxyConfig(
        **MEMBERS, alpha=-0.5, alpha_range=(-1, 1), expert_args={"dtype": "float32"}
    )
    assert ProxyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_setting_is_named():
    with pytest.raises(UserError, match="strength"):
        ProxyConfig.from_dict({**MEMBERS, "strength": 2})


@pytest.mark.parametrize("missing", ["expert", "antiexpert"])
def test_missing_member_is_named(missing):
    with pytest.raises(UserError, match=f"--{missing}"):
        ProxyConfig(**{**MEMBERS, missing: ""})


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "PROXY_VLLM_CPU_RUNNER"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True
    )


def test_importing_the_package_is_cheap():
    heavy = "('torch', 'vllm', 'triton')"
    code = f"import sys, proxy_vllm; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_unknown_runner_is_refused_by_name():
    """Where an engine is made: importing the package is for `plan` and others too."""
    assert run_python("import proxy_vllm", PROXY_VLLM_CPU_RUNNER="v3").returncode == 0
    code = "from proxy_vllm.envs import cpu_runner; cpu_runner()"
    done = run_python(code, PROXY_VLLM_CPU_RUNNER="v3")
    assert done.returncode != 0
    assert "PROXY_VLLM_CPU_RUNNER='v3' is not known: use 'v1' or 'v2'" in done.stderr


def test_interpreter_backend_is_there_only_when_asked_for():
    code = "import proxy_vllm, triton.backends as b; print('cpu' in b.backends)"
    assert run_python(code).stdout.strip() == "False"
    assert run_python(code, PROXY_VLLM_CPU_RUNNER="v2").stdout.strip() == "True"
    late = "import triton.backends, proxy_vllm"
    assert "before vllm and triton" in run_python(late, PROXY_VLLM_CPU_RUNNER="v2").stderr
