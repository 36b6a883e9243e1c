"""One engine as `serve` starts it, where a step that waits for the GPU or compiles is an error.

vLLM measures what CUDA graphs take before it sizes the KV cache (`profile_cudagraph_memory`), which
engines with `kv_cache_memory_bytes` leave out. It counts waits and compilations for the whole
process from the end of a warm-up on, so no other engine may start here. `VLLM_GPU_SYNC_CHECK=error`
has to be set before vLLM is imported, as `scripts/gpu_check.sh` does.
"""

import os

import engines
import pytest
from engines import counted_graphs, running
from sampled_reference import ROWS, TOKENS, expected_tokens, generate, params, tokens_of

pytestmark = pytest.mark.gpu
ALL = range(len(ROWS))


def test_steps_that_neither_wait_nor_compile(trio):
    expected = expected_tokens(trio)
    with running(
        **trio,
        **engines.GRAPHS,
        sampler_cuda_graphs=True,
        attention_backend="TRITON_ATTN",
        kv_cache_memory_bytes=None,
        jit_monitor_mode="error",
    ) as llm:
        if os.environ.get("VLLM_GPU_SYNC_CHECK") == "error":
            from vllm.utils import gpu_sync_debug

            assert gpu_sync_debug._sync_check_enabled
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks > 0
        with counted_graphs() as graphs:
            assert tokens_of(generate(llm, ALL)) == expected
        assert graphs["whole"] and graphs["piecewise"]
        # Every mix of filters, and batches that shrink: no launch may be new.
        for rows in ([0], [2], [3], [5], [2, 5], [1, 4, 6]):
            assert tokens_of(generate(llm, rows)) == [expected[row] for row in rows]
        lengths = [TOKENS - row for row in ALL]
        prompts = [{"prompt_token_ids": ids} for ids in engines.prompt_ids([4, 9, 2, 7, 5, 3, 6])]
        llm.generate(
            prompts, [params(r, max_tokens=n) for r, n in zip(ALL, lengths)], use_tqdm=False
        )
        assert tokens_of(generate(llm, ALL, logprobs=3)) == expected
