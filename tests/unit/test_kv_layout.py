"""Which layout of the KV cache is taken for published shapes, by vLLM's own arithmetic."""

from types import SimpleNamespace

import pytest
import torch
from test_plan_memory import BLOCK, CONTEXT, SPECS, full, gpt_oss_specs, layers
from vllm.config import CacheConfig
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from proxy_vllm.composite import kv_layout
from proxy_vllm.errors import UserError

GIB = 1 << 30
ORDERS = ["LBNHC", "LBHNC", "BLNHC", "BLHNC"]  # as vLLM's attention kernels report them


def config(**scheduler):
    fields = {"disable_hybrid_kv_cache_manager": False, **scheduler}
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(**fields),
        cache_config=CacheConfig(block_size=BLOCK),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        model_config=SimpleNamespace(max_model_len=CONTEXT),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        max_in_flight_tokens=8192,
        kv_transfer_config=None,
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One pipeline stage."""
    monkeypatch.setattr(kv_layout, "get_pp_group", lambda: SimpleNamespace(world_size=1))


def chosen(specs, asked="auto", reason=None, vllm_config=None) -> str:
    vllm_config = vllm_config or config()
    taken = kv_layout.choose(vllm_config, lambda: dict(specs), ORDERS, asked, reason)
    assert taken.keys() == specs.keys()
    single = kv_layout.one_table(specs, BLOCK)
    assert taken in (specs, single)
    assert not any(isinstance(spec, SlidingWindowSpec) for spec in single.values())
    return "one" if taken == single else "several"


# Base and small members, the better layout, and requests of 32k tokens in 40 GiB: one, several.
SHAPES = {
    "Gemma 3 27B and 1B": (SPECS["Gemma 3 27B"][1], SPECS["Gemma 3 1B"][1], "several", 2.3, 4.7),
    "gpt-oss-120b and 20b": (
        SPECS["gpt-oss-120b"][1],
        lambda: gpt_oss_specs(24),
        "several",
        7.6,
        12.1,
    ),
}


@pytest.mark.parametrize("base, small, better, one, several", SHAPES.values(), ids=SHAPES.keys())
def test_the_layout_that_holds_more_requests_is_taken(
    base, small, better, one, several, monkeypatch
):
    specs = layers(base(), small())
    assert chosen(specs) == better
    monkeypatch.setattr(kv_layout, "_NOMINAL_BYTES", 40 * GIB)
    single = kv_layout.one_table(specs, BLOCK)
    assert kv_layout.concurrency(config(), single, ORDERS) == pytest.approx(one, abs=0.05)
    assert kv_layout.concurrency(config(), specs, ORDERS) == pytest.approx(several, abs=0.05)


def test_what_is_asked_for_is_taken():
    specs = layers(gpt_oss_specs(36), gpt_oss_specs(24))
    assert [chosen(specs, asked) for asked in ("one", "several")] == ["one", "several"]


CHUNKS = ChunkedLocalAttentionSpec(
    block_size=BLOCK, num_kv_heads=8, head_size=64, dtype=torch.bfloat16, attention_chunk_size=8192
)
FORCED = {
    "a member attends in chunks": ({"base.chunks": CHUNKS}, {}, None),
    "hybrid KV-cache manager is off": ({}, {"disable_hybrid_kv_cache_manager": True}, None),
    "models read prompts of their own": ({}, {}, "models read prompts of their own"),
}


@pytest.mark.parametrize("why", FORCED)
def test_one_table_where_it_must_be(why):
    more, scheduler, reason = FORCED[why]
    specs = {**layers(gpt_oss_specs(36), gpt_oss_specs(24)), **more}
    assert chosen(specs, "auto", reason, config(**scheduler)) == "one"
    with pytest.raises(UserError, match=f"--kv-cache-tables several: .*{why}"):
        chosen(specs, "several", reason, config(**scheduler))


def test_a_block_of_keys_holds_a_state():
    """The block size of all layers with keys is raised, and the layers asked again."""
    vllm_config, asked = config(), []
    _, shape = SPECS["Qwen3.5 27B"]

    def ask_layers():
        asked.append(vllm_config.cache_config.block_size)
        return layers(shape(), [full(8, 64)] * 16)

    kv_layout.choose(vllm_config, ask_layers, ORDERS, "auto", None)
    # Of 27B: 3 x 10240 bf16 of convolutions, 48 x 128 x 128 float32; 4 KiB a token.
    state = 3 * 10240 * 2 + 48 * 128 * 128 * 4
    block = -(-state // (BLOCK * 4096)) * BLOCK
    assert asked == [BLOCK, block]
    assert vllm_config.cache_config.mamba_page_size_padded == block * 4096


def test_one_table_for_requests_that_fit_in_a_window():
    """Nothing has left a window then, and groups of equal size waste memory on unlike members."""
    short = config()
    short.model_config.max_model_len = 512
    specs = layers(SPECS["Gemma 3 27B"][1](), SPECS["Gemma 3 1B"][1]())
    assert chosen(specs, vllm_config=short) == "one"
