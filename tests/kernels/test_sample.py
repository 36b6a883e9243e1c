"""proxy_sample: greedy, temperature and min-p rows, its invariances, and vLLM's own tokens."""

import pytest
import torch
from kernel_cases import Case, assert_tokens, make_case, make_filters, on

from proxy_vllm.kernels import reference


def vllm_tokens(case: Case, logits, use_fp64=False, top_k=None, top_p=None, min_p=None):
    """vLLM on `logits`: temperature, min-p and noise by its kernels, its sort for the rest."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
    from vllm.v1.worker.gpu.sample.min_p import apply_min_p

    rows = torch.arange(logits.shape[0], dtype=torch.int32, device=logits.device)
    logits = logits.float().clone()
    apply_temperature(logits, rows, case.temperature)
    if min_p is not None:
        apply_min_p(logits, rows, min_p)
    if top_k is not None or top_p is not None:
        if top_k is not None:
            top_k = torch.where(top_k > 0, top_k, logits.shape[1])
        logits = apply_top_k_top_p_pytorch(logits, top_k, top_p)
    return gumbel_sample(
        logits,
        rows,
        case.temperature,
        case.seeds,
        case.positions,
        apply_temperature=False,
        is_drafting=False,
        use_fp64=use_fp64,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 111), (33, 111), (5, 4099), (1, 32000)])
def test_tokens_of_the_reference(device, rows, vocab, dtype):
    case = make_case(rows, vocab, dtype=dtype, extra=(9, -5), greedy_every=3)
    tokens = case.to(device).draw()
    assert_tokens(tokens, case)


@pytest.mark.parametrize("tile", [64, 1024])
def test_min_p_whatever_the_tile(device, tile):
    case = make_case(33, 1500, scale=2.0, greedy_every=5)
    case.temperature *= 2
    filters = make_filters(33, kinds="m")
    tokens = case.to(device).draw(**on(device, filters), tile=tile)
    assert_tokens(tokens, case, **filters)
    if tile > 64:
        return
    # The case must contain what the second draw exists for: a tile of which min-p keeps a token,
    # but drops the one that wins against the tile's own maximum.
    x = reference.scaled(case.combined(), case.temperature)
    second_draws = 0
    for row in range(33):
        if case.temperature[row] == 0 or filters["min_p"][row] == 0:
            continue
        log_min_p = filters["min_p"][row].double().log()
        noise = reference.gumbel_noise(
            int(case.seeds[row]), int(case.positions[row]), torch.arange(1500)
        )
        for part, n in zip(x[row].split(tile), noise.split(tile)):
            inside = torch.where(part >= part.max() + log_min_p, part + n, -torch.inf)
            threshold = x[row].max() + log_min_p
            second_draws += bool(part.max() >= threshold > part[inside.argmax()])
    assert second_draws > 0


def test_alpha_zero_is_vllms_own_token(device):
    case = make_case(33, 4099, greedy_every=4).to(device)
    case.alpha[:] = 0
    case.expert[:] = torch.nan
    tokens = case.draw()
    assert torch.equal(tokens, vllm_tokens(case, case.base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_with_filters_is_vllms_token(device, dtype):
    """vLLM's sort splits equal logits as it likes, so this holds where none are at the edge."""
    case = make_case(33, 1111, dtype=dtype, greedy_every=7).to(device)
    case.alpha[:] = 0
    filters = on(device, make_filters(33))
    tokens = case.draw(**filters)
    theirs = vllm_tokens(case, case.base, **filters)
    if dtype == torch.float32:
        assert torch.equal(tokens, theirs)
    else:
        assert (tokens == theirs).float().mean() > 0.9


def test_float64_noise_is_vllms(device):
    case = make_case(5, 1111, greedy_every=4).to(device)
    case.alpha[:] = 0
    filters = on(device, make_filters(5))
    plain = case.draw(fp64=True)
    assert torch.equal(plain, vllm_tokens(case, case.base, use_fp64=True))
    kept = case.draw(fp64=True, **filters)
    assert torch.equal(kept, vllm_tokens(case, case.base, use_fp64=True, **filters))


def test_equal_expert_and_antiexpert_give_the_bases_token(device):
    case = make_case(5, 4099).to(device)
    same = case.with_logits(case.base, case.expert, case.expert).draw()
    assert torch.equal(same, vllm_tokens(case, case.base))


def test_base_equal_to_antiexpert_gives_the_experts_token(device):
    case = make_case(5, 4099, lattice=0.125).to(device)
    case.alpha[:] = 1
    got = case.with_logits(case.base, case.expert, case.base).draw()
    assert torch.equal(got, vllm_tokens(case, case.expert))


def test_greedy_takes_the_lowest_of_equals(device):
    case = make_case(5, 1000, lattice=1.0, scale=0.6, greedy_every=1).to(device)
    logits = case.combined()
    assert ((logits == logits.max(dim=1, keepdim=True).values).sum(1) > 1).any()
    want = (logits == logits.max(dim=1, keepdim=True).values).int().argmax(1)
    for tile in (64, 1024):
        assert torch.equal(case.draw(tile=tile).cpu(), want)


def test_a_row_does_not_depend_on_the_batch_around_it(device):
    case = make_case(33, 300, greedy_every=4).to(device)
    filters = on(device, make_filters(33))
    together = case.draw(**filters)
    for row in range(0, 33, 4):
        one = {name: tensor[row : row + 1] for name, tensor in filters.items()}
        alone = case.select(slice(row, row + 1)).draw(**one)
        assert int(alone) == int(together[row])


def test_tokens_do_not_depend_on_tiles(device):
    case = make_case(5, 1111, greedy_every=4).to(device)
    filters = on(device, make_filters(5))
    for given in ({}, filters):
        tokens = [case.draw(**given, tile=t) for t in (128, 512, 2048)]
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[2])


def test_same_seed_and_position_in_two_requests_draw_the_same(device):
    case = make_case(2, 4099).to(device)
    for tensor in case.tensors():
        tensor[1] = tensor[0]
    tokens = case.draw()
    assert int(tokens[0]) == int(tokens[1])
    case.positions[1] += 1
    case.base *= 0.01
    case.alpha *= 0
    tokens = case.draw()
    assert int(tokens[0]) != int(tokens[1])


@pytest.mark.parametrize("filtered", [False, True])
def test_rows_without_a_free_choice(device, filtered):
    """-inf everywhere but one column; -inf everywhere; NaN among numbers; NaN everywhere; +inf."""
    case = make_case(10, 111).to(device)
    case.alpha[:] = 1
    case.temperature[5:] = 0
    for row in (0, 5):
        case.base[row] = -torch.inf
        case.base[row, 70] = -12.0
    for row in (1, 6):
        case.base[row] = -torch.inf
    for row in (2, 7):
        case.base[row, 20] = torch.nan
        case.expert[row, 21] = torch.nan
    for row in (3, 8):
        case.base[row] = torch.nan
    for row in (4, 9):
        case.base[row, 55] = torch.inf
    filters = on(device, make_filters(10)) if filtered else {}
    tokens = case.draw(**filters, tile=64).cpu()
    for row in (0, 5):
        assert int(tokens[row]) == 70
    for row in (1, 6, 3, 8):
        assert int(tokens[row]) == 0
    for row in (2, 7):
        assert 0 <= int(tokens[row]) < 111
        assert int(tokens[row]) not in (20, 21)
    for row in (4, 9):
        assert int(tokens[row]) == 55


def test_strided_rows(device):
    case = make_case(5, 111).to(device)
    want = case.draw()
    wide = torch.full((3, 5, 200), 9e9, device=device)
    for slab, tensor in zip(wide, case.logits):
        slab[:, 33:144] = tensor
    views = [slab[:, 33:144] for slab in wide]
    assert torch.equal(case.with_logits(*views).draw(), want)


def test_members_may_have_different_dtypes(device):
    case = make_case(5, 111)
    mixed = case.to(device)
    mixed.expert, case.expert = mixed.expert.bfloat16(), case.expert.bfloat16()
    assert_tokens(mixed.draw(), case)


def test_no_rows(device):
    case = make_case(0, 111).to(device)
    tokens = case.draw()
    assert tokens.shape == (0,) and tokens.dtype == torch.int64


def test_kinds_of_batches():
    """One batch of every tile that a launch can have, the smallest first."""
    from proxy_vllm.kernels.combine_sample import batch_kinds, choose_tile

    for cols in (37, 4099, 128256):
        sizes = batch_kinds(300, cols)
        kinds = [choose_tile(rows, cols) for rows in sizes]
        assert sizes[0] == 1 and len(set(kinds)) == len(kinds)
        assert {choose_tile(rows, cols) for rows in range(1, 301)} == set(kinds)
