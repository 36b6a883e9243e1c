"""What piecewise CUDA graphs do to three models that run as one, played on a CPU.

A graph reads its inputs at the addresses of its capture, and the memory of a model's output goes
back to the pool that the next model's graphs write to.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context

import proxy_vllm.composite.model as model
from proxy_vllm.composite.packed_rows import PackedRows
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.own_prompts.inputs import MemberInputs

TOKENS, WIDTH = 5, 4


class Pooled(torch.nn.Module):
    """A member that writes its output where every member does, and notes where it reads."""

    def __init__(self, pool: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.pool, self.scale = pool, scale
        self.addresses: list[int] = []

    def forward(self, input_ids, positions, intermediate_tensors=None):
        self.addresses.append(input_ids.data_ptr())
        self.pool.copy_((self.scale * input_ids[:, None]).expand(-1, WIDTH))
        return self.pool


@pytest.fixture
def composite(monkeypatch):
    monkeypatch.setattr(model, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    composite = model.ProxyTunedForCausalLM.__new__(model.ProxyTunedForCausalLM)
    torch.nn.Module.__init__(composite)
    pool = torch.empty(TOKENS, WIDTH)
    for role, scale in zip(ROLES, (1.0, 10.0, 100.0), strict=True):
        setattr(composite, role, Pooled(pool, scale))
    composite.vocab_size, composite.vocab_sizes = 9, dict(zip(ROLES, (9, 7, 9), strict=True))
    composite.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS)
    )
    dtype = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    composite.member_configs = dict.fromkeys(ROLES, dtype)
    composite.hidden_dtype = torch.float32
    composite.run_roles = list(ROLES)
    composite.proxy_config = ProxyConfig(expert="small", antiexpert="untuned")
    composite.packed = PackedRows(dict.fromkeys(ROLES, torch.float32))
    composite._ids = {}
    return composite


def piecewise():
    """The forward context of a piecewise graph's replay."""
    return override_forward_context(
        ForwardContext(
            no_compile_layers={},
            attn_metadata={},
            slot_mapping={},
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
        )
    )


def hidden_of(composite, packed: torch.Tensor) -> list[list[float]]:
    return [h[:, 0].tolist() for h in composite.unpack(packed)[0]]


def test_outputs_outlive_the_members_that_run_after(composite):
    ids, positions = torch.tensor([3, 8, 7, 6, 0]), torch.arange(TOKENS)
    # Tokens 7 and 8 are none of the expert's: it reads its token 0 there.
    want = [[3, 8, 7, 6, 0], [30, 0, 0, 60, 0], [300, 800, 700, 600, 0]]
    with piecewise():
        assert hidden_of(composite, composite(ids, positions, alpha=torch.ones(TOKENS))) == want
    own = tuple(
        MemberInputs(ids.clone(), positions, torch.zeros(1, TOKENS, dtype=torch.int64), [[role]])
        for role in ROLES
    )
    with piecewise():
        packed = composite(None, positions, alpha=torch.ones(TOKENS), members=own)
    assert hidden_of(composite, packed) == want


def test_a_member_reads_its_ids_at_one_address(composite):
    """Fewer tokens are a view of the same buffer; the base reads what it is given."""
    batches = [torch.tensor(ids) for ids in ([8, 1, 2, 3, 4], [5, 8, 5, 5, 5], [1, 2, 3, 8, 8])]
    for ids in batches:
        composite(ids, torch.arange(TOKENS), alpha=torch.ones(TOKENS))
    assert composite.base.addresses == [ids.data_ptr() for ids in batches]
    assert len(set(composite.expert.addresses)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_aligned(composite, dtype):
    """Whatever the members' widths, each part of each row begins at a multiple of 16 elements."""
    composite.packed = PackedRows(dict.fromkeys(ROLES, dtype))
    hidden = {r: torch.randn(5, n).to(dtype) for r, n in zip(ROLES, (48, 7, 33), strict=True)}
    alpha = torch.tensor([0.0, 1.5, -2.25, 1e-30, 3.1])
    plausibility = torch.tensor([[-torch.inf] * 5, [torch.inf, 8192.0, 1.0, 2.0, 3.0]])
    packed = composite._pack(hidden, alpha, plausibility)
    assert packed.shape == (5, composite.packed_width) and packed.shape[1] % 16 == 0
    parts, steering = composite.unpack(packed[[4, 0]])
    values = (steering.alpha, steering.plausibility.log_beta, steering.plausibility.drop)
    for got, given in zip(values, (alpha, *plausibility), strict=True):
        assert got.is_contiguous() and torch.equal(got, given[[4, 0]])
        assert got.data_ptr() % 16 == 0  # Triton compiles anew for an address that is not
    for part, whole in zip(parts, hidden.values(), strict=True):
        assert torch.equal(part, whole[[4, 0]])
        assert part.storage_offset() % 16 == 0 and part.stride(0) % 16 == 0
