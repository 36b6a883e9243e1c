"""What only a GPU can show: real vocabularies, graphs, long offsets, no wait for the device."""

import pytest
import torch
from kernel_cases import Case, assert_tokens, make_case, make_filters, make_heads, on

from proxy_vllm.kernels import reference
from proxy_vllm.kernels.combine_sample import proxy_combine
from proxy_vllm.kernels.fused_head import fused_head_sample

pytestmark = pytest.mark.gpu
CHECKED = 6  # rows of a batch that the float64 reference draws too


def some_rows(case: Case, filters: dict, tokens: torch.Tensor) -> tuple[Case, dict, torch.Tensor]:
    """The first and the last rows of a batch, on the CPU."""
    rows = len(tokens)
    chosen = sorted({*range(min(CHECKED // 2, rows)), *range(max(0, rows - CHECKED // 2), rows)})
    part = case.select(chosen).to("cpu")
    return part, {k: v[chosen].cpu() for k, v in filters.items()}, tokens[chosen].cpu()


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 152064])
def test_real_sizes(device, vocab, rows, dtype, filtered):
    generator = torch.Generator(device).manual_seed(vocab + rows)

    def logits(width):
        values = torch.randn(rows, width, generator=generator, device=device) * 3
        return values.to(dtype)

    small = make_case(rows, 5, greedy_every=5).to(device)
    case = small.with_logits(logits(vocab), logits(vocab + 128), logits(vocab - 64))
    filters = on(device, make_filters(rows)) if filtered else {}
    tokens = case.draw(**filters)
    assert ((tokens >= 0) & (tokens < vocab)).all()
    part, filters, tokens = some_rows(case, filters, tokens)
    # Of a hundred thousand probabilities float32 sums a little more or less than top_p.
    top_p = filters.pop("top_p", torch.ones(len(tokens)))
    edges = [top_p, top_p + 1e-5, top_p - 1e-5]
    near = [
        reference.scores(*part.logits, part.rows(**filters, top_p=p.clamp(max=1))) for p in edges
    ]
    gaps = [s.max(1).values - s.gather(1, tokens[:, None])[:, 0] for s in near]
    assert (torch.stack(gaps).amin(0) < 2e-4).all(), gaps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 64, 100])
def test_fused_head_at_real_sizes(device, rows, dtype):
    hidden, weights = make_heads(rows, (128256,) * 3, dtype, sizes=(512, 256, 256))
    case = make_case(rows, 5, greedy_every=3)
    tokens, _ = fused_head_sample(
        [h.to(device) for h in hidden],
        [w.to(device) for w in weights],
        case.to(device).rows(),
    )
    chosen = [0, rows // 2, rows - 1]
    logits = [reference.head_logits(h[chosen], w) for h, w in zip(hidden, weights)]
    part = case.select(chosen).with_logits(*logits)
    assert_tokens(tokens.cpu()[chosen], part, tolerance=1e-3)


def test_offsets_beyond_31_bits(device):
    """More than 2**31 logits: the last rows must be read from where they lie."""
    rows, vocab = 15_000, 152_064
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free memory")
    base = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device)
    peak = torch.arange(rows, device=device) * 9 % vocab
    base.scatter_(1, peak[:, None], 40.0)
    small = torch.zeros(1, vocab, dtype=torch.bfloat16, device=device).expand(rows, vocab)
    ones, ids = torch.ones(rows, device=device), torch.arange(rows, device=device)
    case = Case(base, small, small, ones, ones, seeds=ids, positions=ids)
    assert torch.equal(case.draw(), peak)
    # The scratch of filtered rows is beyond 31 bits too.
    assert torch.equal(case.draw(top_k=torch.full_like(ids, 3, dtype=torch.int32)), peak)


def captured(work):
    """`work` recorded as a CUDA graph: what it returned, and the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return result, graph


@pytest.mark.parametrize("kinds", ["", "p", "kpm"])
def test_replayed_graphs_read_their_inputs_anew(device, kinds):
    rows = 8
    case = make_case(rows, 32000, greedy_every=4).to(device)
    filters = on(device, make_filters(rows, kinds=kinds))
    tokens, graph = captured(lambda: case.draw(**filters))
    for seed in (1, 2):
        other = make_case(rows, 32000, greedy_every=3, seed=seed).to(device)
        for tensor, value in zip(case.tensors(), other.tensors()):
            tensor.copy_(value)
        for name, value in on(device, make_filters(rows, seed=seed, kinds=kinds)).items():
            filters[name].copy_(value)
        graph.replay()
        assert torch.equal(tokens, case.draw(**filters))


def test_replayed_fused_head(device):
    hidden, weights = make_heads(5, (32000,) * 3, torch.bfloat16)
    hidden, weights = ([t.to(device) for t in ts] for ts in (hidden, weights))
    case = make_case(5, 5, greedy_every=3).to(device)
    (tokens, _), graph = captured(lambda: fused_head_sample(hidden, weights, case.rows()))
    for tensor in hidden:
        tensor.copy_(tensor.flip(0))
    case.positions.add_(17)
    graph.replay()
    assert torch.equal(tokens, fused_head_sample(hidden, weights, case.rows())[0])


@pytest.mark.parametrize("kinds", ["", "m", "kpm"])
def test_nothing_waits_for_the_device(device, kinds):
    case = make_case(8, 32000, greedy_every=4).to(device)
    filters = on(device, make_filters(8, kinds=kinds))
    hidden, weights = make_heads(8, (32000,) * 3, torch.float32)
    hidden, weights = ([t.to(device) for t in ts] for ts in (hidden, weights))

    def work():
        case.draw(**filters)
        proxy_combine(*case.logits, case.alpha)
        fused_head_sample(hidden, weights, case.rows())

    work()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
