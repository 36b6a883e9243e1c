"""The Ray Serve application on a cluster of one machine, against the loop."""

import json
import os
import urllib.error
import urllib.request

import pytest
import torch
from engines import prompt_ids
from reference_loop import Trio, greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

if os.environ.get("PROXY_VLLM_CPU_RUNNER") == "v2":
    pytest.skip("Ray Serve lies above the runner: once is enough", allow_module_level=True)

serve = pytest.importorskip("ray.serve", reason="needs the extra `ray`")
PORT = 18765


@pytest.fixture(scope="module")
def url(trio):
    import ray

    from proxy_vllm.serving import app

    options = (
        f"{trio['model']} --expert {trio['expert']} --antiexpert {trio['antiexpert']} --alpha 1.5"
        " --served-model-name steered --dtype float32 --enforce-eager --max-model-len 256"
        f" --kv-cache-memory-bytes {32 << 20} --block-size 32"
    )
    env = {
        "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }  # fmt: skip
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env={"env_vars": env}, log_to_driver=False
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(app({"options": options}))
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def complete(url, prompt, alpha):
    body = {
        "model": "steered", "prompt": prompt, "max_tokens": 8, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"proxy_alpha": alpha},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.loads(urllib.request.urlopen(request, timeout=300).read())
    return answer["choices"][0]["token_ids"]


def test_a_replica_answers_as_the_loop(url, trio):
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    (prompt,) = prompt_ids([9])
    for alpha in (1.0, 0.5):
        assert complete(url, prompt, alpha) == greedy(models, prompt, 8, alpha)[0]
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(url, prompt, 99)
    assert refused.value.code == 400
