"""The buffers that CUDA graphs replay over, filled in Triton's interpreter: padding and all."""

import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip  # PyTorch's device calls, on a CPU

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import RUNNER
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from proxy_vllm.config import ROLES
from proxy_vllm.own_prompts.inputs import OwnPromptState
from proxy_vllm.own_prompts.prompts import OwnPrompts

pytestmark = pytest.mark.skipif(RUNNER != "v2", reason="kernels run in Triton's interpreter")

MAX_REQS, MAX_TOKENS = 6, 20
# Two groups of layers with block tables of their own, and one whose layers write to no slots.
KV_BLOCKS, HAVE_SLOTS = [4, 2, 4], [True, True, False]
GROUPS = range(len(KV_BLOCKS))
# Tokens that the scheduler counts, and how far each model is behind, by batch row.
SEQ_LENS = [9, 14, 6]
PADS = [(0, 0, 0), (5, 0, 2), (0, 3, 0)]
SLOTS_OF_ROWS = [4, 0, 2]  # request slots


@pytest.fixture
def state() -> OwnPromptState:
    state = OwnPromptState(MAX_REQS, MAX_TOKENS, torch.device("cpu"))
    names = [[f"{role}.layer.{group}" for role in ROLES] for group in GROUPS]
    groups = [SimpleNamespace(layer_names=layers) for layers in names]
    widths = [-(-MAX_TOKENS // block) for block in KV_BLOCKS]
    sizes = (KV_BLOCKS, MAX_REQS, MAX_TOKENS, widths)
    tables = BlockTables(*sizes, torch.device("cpu"), slot_mapping_enabled=HAVE_SLOTS)
    for group, table in enumerate(tables.block_tables):
        blocks = torch.arange(table.gpu.numel(), dtype=torch.int32).view_as(table.gpu)
        table.gpu.copy_(1 + 100 * group + blocks)
    state.bind(SimpleNamespace(kv_cache_groups=groups), tables)
    for row, (slot, pads) in enumerate(zip(SLOTS_OF_ROWS, PADS, strict=True)):
        longest = 6
        own = OwnPrompts(*((7,) * (longest - pad) for pad in pads)) if any(pads) else None
        state.add_request(slot, f"request-{row}", own)
    state.pads.copy_to_uva()
    # What steps before this one left.
    for buffer in (state.input_ids, state.positions, state.slots, state.seq_lens):
        buffer.fill_(77)
    return state


def decode(state: OwnPromptState, padded: int) -> tuple[InputBatch, torch.Tensor]:
    """A step of one token a request, padded to a graph's rows, and its slots ``[G, N]``."""
    buffers = InputBuffers(MAX_REQS, MAX_TOKENS, torch.device("cpu"))
    batch = InputBatch.make_dummy(padded, padded, buffers)
    rows = len(SEQ_LENS)
    batch.req_ids = [f"request-{row}" for row in range(rows)]
    batch.num_reqs, batch.num_tokens = rows, rows
    batch.idx_mapping_np = np.array(SLOTS_OF_ROWS)
    batch.idx_mapping = torch.tensor(SLOTS_OF_ROWS)
    batch.query_start_loc[:] = torch.tensor([*range(rows + 1), *[rows] * (padded - rows)])
    batch.seq_lens[:] = torch.tensor([*SEQ_LENS, *[0] * (padded - rows)])
    batch.seq_lens_cpu_upper_bound = batch.seq_lens.clone()
    batch.num_computed_tokens_np = np.array(SEQ_LENS) - 1
    batch.input_ids[:rows] = torch.tensor([11, 12, 13])
    batch.positions[:rows] = torch.tensor(SEQ_LENS) - 1
    slots = torch.full((len(GROUPS), MAX_TOKENS), PAD_SLOT_ID)
    slots[:, :rows] = slots_at(state, batch.positions[:rows])
    return batch, slots


def slots_at(state: OwnPromptState, positions: torch.Tensor) -> torch.Tensor:  # [G, rows]
    slots = torch.full((len(GROUPS), len(positions)), PAD_SLOT_ID)
    for group, (block, has_slots) in enumerate(zip(KV_BLOCKS, HAVE_SLOTS)):
        table = state.block_tables.block_tables[group].gpu
        if has_slots:
            blocks = table[torch.tensor(SLOTS_OF_ROWS), positions // block].long()
            slots[group] = blocks * block + positions % block
    return slots


def prepared(state, batch, slots, for_capture=False):
    """Shift a batch; the step, and the batches that metadata was made from."""
    seen = []

    def prepare(mine, tables, slot_mappings, groups):
        seen.append((mine, slot_mappings, [g.layer_names[0] for one in groups for g in one]))
        return {}

    groups = [
        [SimpleNamespace(layer_names=[f"{role}.layer.{group}"]) for role in ROLES]
        for group in GROUPS
    ]
    step, _ = state.shift(
        batch, (), slots, attn_groups=groups, prepare=prepare, for_capture=for_capture
    )
    return step, seen


@pytest.mark.parametrize("padded", [3, 6])
@pytest.mark.parametrize("own", [True, False])
def test_every_buffer_of_a_decode(state, padded, own):
    pads = PADS if own else [(0, 0, 0)] * 3
    if not own:
        state.prompts.clear()
    batch, slots = decode(state, padded)
    step, seen = prepared(state, batch, slots)
    assert step.batch is batch
    for m, inputs in enumerate(step.members):
        behind = torch.tensor([pad[m] for pad in pads])
        positions = torch.tensor(SEQ_LENS) - 1 - behind
        assert len(inputs.input_ids) == len(inputs.positions) == inputs.slots.shape[1] == padded
        assert inputs.input_ids[:3].tolist() == [11, 12, 13]
        assert torch.equal(inputs.positions[:3], positions)
        assert torch.equal(inputs.slots[:, :3], slots_at(state, positions))
        written = inputs.slots_of_layers()
        assert list(written) == [f"{ROLES[m]}.layer.{group}" for group in GROUPS]
        assert all(torch.equal(a, b) for a, b in zip(written.values(), inputs.slots))
        # A graph of more rows writes no cache for those past the batch, and attends to nothing.
        assert bool((state.slots[m, :, 3:] == PAD_SLOT_ID).all())
        assert state.seq_lens[m].tolist()[:3] == (positions + 1).tolist()
        assert set(state.seq_lens[m, 3:].tolist()) == {0}
        assert inputs.rows is None and not inputs.absent
    if not own:
        # One model's numbers are the others': vLLM prepares once, as without us.
        assert [(mine is batch, len(layers)) for mine, _, layers in seen] == [(True, 9)]
        return
    for m, (mine, slot_mappings, layers) in enumerate(seen):
        assert layers == [f"{ROLES[m]}.layer.{group}" for group in GROUPS]
        assert mine.seq_lens.data_ptr() == state.seq_lens[m].data_ptr()
        assert slot_mappings.data_ptr() == state.slots[m].data_ptr()
        behind = np.array([pad[m] for pad in pads])
        assert mine.num_computed_tokens_np.tolist() == (np.array(SEQ_LENS) - 1 - behind).tolist()
        assert mine.seq_lens_cpu_upper_bound.tolist() == mine.seq_lens.tolist()


def test_a_graph_is_captured_over_the_buffers_of_each_model(state):
    """Also where no request has own prompts: those are not there yet."""
    state.prompts.clear()
    batch, slots = decode(state, 6)
    step, seen = prepared(state, batch, slots, for_capture=True)
    assert [mine.seq_lens.data_ptr() for mine, *_ in seen] == [
        state.seq_lens[m].data_ptr() for m in range(3)
    ]
    for m, (inputs, static) in enumerate(zip(step.members, state.static_inputs(6), strict=True)):
        for name in ("input_ids", "positions", "slots"):
            assert getattr(inputs, name).data_ptr() == getattr(static, name).data_ptr(), (m, name)


def test_rows_are_aligned_for_compiled_code():
    state = OwnPromptState(7, 33, torch.device("cpu"))
    state.bind(SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=[])] * 2), None)
    for buffer in (state.input_ids, state.positions, state.slots, state.seq_lens):
        rows = buffer.flatten(0, -2)
        steps = {row.data_ptr() - buffer.data_ptr() for row in rows}
        assert {step % 16 for step in steps} == {0}
