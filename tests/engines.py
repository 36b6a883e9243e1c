"""Start and stop engines inside the test process."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The runner of this process: "v1", or "v2" under Triton's interpreter.
RUNNER = os.environ.get("PROXY_VLLM_CPU_RUNNER", "v1")

SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 32,
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


def greedy_params(max_tokens: int = 16, **kwargs: Any) -> Any:
    """Greedy sampling of exactly ``max_tokens``; ``proxy_alpha`` goes to ``extra_args``."""
    from vllm import SamplingParams

    alpha = kwargs.pop("proxy_alpha", None)
    if alpha is not None:
        kwargs["extra_args"] = {"proxy_alpha": alpha}
    kwargs.setdefault("ignore_eos", True)
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **kwargs)


def prompt_ids(lengths: list[int], vocab: int = 111, seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths, without the tokenizer's four special ids."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab, (n,), generator=generator).tolist() for n in lengths]
