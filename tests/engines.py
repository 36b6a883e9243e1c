"""Start and stop engines inside the test process."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The runner that this process asks for on a CPU: "v1", or "v2" under Triton's interpreter.
RUNNER = os.environ.get("PROXY_VLLM_CPU_RUNNER", "v1")
# Whether engines here run on Model Runner V2, as they always do on a GPU.
V2 = RUNNER == "v2" or torch.cuda.is_available()

SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 32,
}
if torch.cuda.is_available():
    # Engines come and go in one process, and what one leaves behind must not stop the next.
    SMALL["gpu_memory_utilization"] = 0.3

# On a GPU: compiled members under CUDA graphs, decodes whole and prefills in pieces. Steps of 65
# tokens and more run without graphs.
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
}


@contextmanager
def running(engine_cls: Any = None, **kwargs: Any) -> Iterator[Any]:
    """A ``ProxyLLM`` (or ``engine_cls``) with small settings, gone when the block ends."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from proxy_vllm import ProxyLLM

    kwargs = {**SMALL, **kwargs}
    if os.environ.get("TRITON_INTERPRET") == "1":
        kwargs.setdefault("worker_extension_cls", "quick_worker.QuickWorker")
    llm = (engine_cls or ProxyLLM)(**kwargs)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def counted_graphs() -> Iterator[dict[str, int]]:
    """How often whole and piecewise graphs are replayed meanwhile, in engines of this process."""
    from unittest.mock import patch

    from vllm.v1.worker.gpu import cudagraph_utils as graphs

    counts = {"whole": 0, "piecewise": 0}

    def counted(name: str, method: Any) -> Any:
        def run(*args: Any) -> Any:
            counts[name] += 1
            return method(*args)

        return run

    whole, pieces = graphs.ModelCudaGraphManager, graphs.CudaGraphManager
    with (
        patch.object(whole, "run_fullgraph", counted("whole", whole.run_fullgraph)),
        patch.object(pieces, "run_pw_graph", counted("piecewise", pieces.run_pw_graph)),
    ):
        yield counts


def greedy_params(max_tokens: int = 16, **kwargs: Any) -> Any:
    """Greedy sampling of exactly ``max_tokens``; ``proxy_alpha`` goes to ``extra_args``."""
    from vllm import SamplingParams

    alpha = kwargs.pop("proxy_alpha", None)
    if alpha is not None:
        kwargs["extra_args"] = {"proxy_alpha": alpha}
    return SamplingParams(
        max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **kwargs}
    )


def prompt_ids(lengths: list[int], vocab: int = 111, seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths, without the tokenizer's four special ids."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab, (n,), generator=generator).tolist() for n in lengths]


def free_port() -> int:
    """A TCP port of this machine that nothing listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
