"""The fused sampler inside vLLM: token-exact against a Transformers loop with float64 sampling."""

import os

import pytest
import torch
from engines import running
from reference_loop import Trio
from sampled_reference import (
    ALPHAS,
    PROMPTS,
    ROWS,
    TOKENS,
    assert_logprobs,
    expected_tokens,
    generate,
    params,
    tokens_of,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("PROXY_VLLM_CPU_RUNNER", "v1") != "v2" and not torch.cuda.is_available(),
    reason="the fused sampler belongs to Model Runner V2 (PROXY_VLLM_CPU_RUNNER=v2)",
)
ALL = range(len(ROWS))


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def expected(trio) -> list[list[int]]:
    return expected_tokens(trio)


@pytest.fixture
def two_ranks(monkeypatch) -> dict:
    """Settings of an engine whose two workers run functions of this file."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    # Two workers on a machine of one memory node: vLLM wants to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    return {"tensor_parallel_size": 2}


def count_exchanges(worker) -> tuple[int, int]:
    exchange = worker.model_runner.model.sharded_heads.exchange
    seen = exchange.calls, exchange.bytes_sent
    exchange.calls = exchange.bytes_sent = 0
    return seen


def count_fused_heads(worker) -> None:
    import proxy_vllm.composite.heads as heads

    fused = heads.fused_head_sample
    worker.fused_head_rows = []

    def counted(hidden, *args, **kwargs):
        worker.fused_head_rows.append(hidden[0].shape[0])
        return fused(hidden, *args, **kwargs)

    heads.fused_head_sample = counted


def fused_head_rows(worker) -> list[int]:
    rows, worker.fused_head_rows = worker.fused_head_rows, []
    return rows


def profile_sampling(worker) -> None:
    """What vLLM's memory profile does after its run of the model."""
    runner = worker.model_runner
    width, dtype = runner.model.packed_width, runner.model.hidden_dtype
    runner._dummy_sampler_run(torch.zeros(3, width, dtype=dtype, device=runner.device))


def share_out_over_gloo(worker) -> bool:
    """Whether the batch is shared out; vLLM's own way between CPU workers carries no token ids."""
    from vllm.distributed import get_tp_group

    get_tp_group().device_communicator.dist_module = torch.distributed
    return worker.model_runner.batch_sharder is not None


def test_mixed_batch_equals_reference(trio, expected):
    with running(**trio) as llm:
        # Before any request with filters: vLLM's own filters do not run in the interpreter.
        assert tokens_of(generate(llm, [0], max_tokens=1)) == [expected[0][:1]]
        llm.collective_rpc(profile_sampling)
        assert tokens_of(generate(llm, ALL)) == expected
        # As a GPU engine does before the first request; here it only has to leave no trace.
        llm.collective_rpc(lambda worker: worker.model_runner.warm_up_sampler())
        assert tokens_of(generate(llm, [0, 4])) == [expected[0], expected[4]]


def test_two_ranks(trio, reference, expected, two_ranks):
    """Every path over two shards: stored logits, head weights, log-probabilities, whole rows."""
    with running(**trio, **two_ranks, fused_head_max_batch=2) as llm:
        llm.collective_rpc(count_fused_heads)
        assert tokens_of(generate(llm, ALL)) == expected
        assert llm.collective_rpc(fused_head_rows) == [[], []]

        llm.collective_rpc(count_exchanges)
        assert tokens_of(generate(llm, [0, 1])) == expected[:2]
        (rows, also) = llm.collective_rpc(fused_head_rows)
        assert rows == also and len(rows) >= TOKENS and max(rows) == 2
        # A score and a token for each row, and nothing else.
        assert llm.collective_rpc(count_exchanges) == [(len(rows), 16 * sum(rows))] * 2

        # Log-probabilities are put together from the ranks' candidates, without any logits.
        llm.collective_rpc(count_exchanges)
        outputs = generate(llm, [0, 1], logprobs=3)
        assert tokens_of(outputs) == expected[:2]
        for row, output in enumerate(outputs):
            assert_logprobs(reference, row, output, 3)
        ((calls, sent), _) = llm.collective_rpc(count_exchanges)
        steps = len(rows)
        assert (calls, sent) == (3 * steps, (16 + 8 * (2 * 3 + 2) + 8) * sum(rows))

        # A row that needs its distribution (a bias that changes nothing), one that does not, one
        # that asks for nothing.
        mixed = [params(0, logprobs=1, logit_bias={3: 0.0}), params(5, logprobs=4), params(1)]
        prompts = [{"prompt_token_ids": PROMPTS[row]} for row in (0, 5, 1)]
        outputs = llm.generate(prompts, mixed, use_tqdm=False)
        assert tokens_of(outputs) == [expected[row] for row in (0, 5, 1)]
        assert_logprobs(reference, 0, outputs[0], 1)
        assert_logprobs(reference, 5, outputs[1], 4)
        assert outputs[2].outputs[0].logprobs is None


def test_ranks_that_share_out_the_batch(trio, expected, two_ranks):
    """vLLM's batch-sharded sampling: each rank samples half of the rows, from whole logits."""
    plain = [0, 1, 5]  # vLLM's own top-k and top-p kernel does not run in the interpreter
    with running(**trio, **two_ranks, enable_batch_sharded_sampling=True) as llm:
        assert all(llm.collective_rpc(share_out_over_gloo))
        assert tokens_of(generate(llm, plain)) == [expected[i] for i in plain]


def test_special_rows_leave_the_others_on_the_fused_path(trio, expected, monkeypatch):
    import proxy_vllm.worker.sampler as sampler

    fused_rows = []
    fused = sampler.proxy_sample

    def counted(base, *args, **kwargs):
        fused_rows.append(base.shape[0])
        return fused(base, *args, **kwargs)

    monkeypatch.setattr(sampler, "proxy_sample", counted)
    sampling = [params(row) for row in ALL]
    # Logprobs do not change what is drawn; vLLM's sampler must draw the same from the same noise.
    sampling[1] = params(1, logprobs=3)
    sampling[5] = params(5, logprobs=0)
    with running(**trio) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    assert tokens_of(outputs) == expected
    assert len(fused_rows) >= TOKENS
    for i, output in enumerate(outputs):
        asked = sampling[i].logprobs
        if asked is None:
            assert output.outputs[0].logprobs is None
        else:
            for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs):
                assert token in step and len(step) >= max(asked, 1)


def test_tokens_drawn_from_head_weights(trio, expected):
    """Rows without filters, once below and once above the batch that the option names."""
    with running(**trio, fused_head_max_batch=2) as llm:
        llm.collective_rpc(count_fused_heads)
        for rows in ([0, 1], [0, 1, 0]):
            assert tokens_of(generate(llm, rows)) == [expected[i] for i in rows]
        (calls,) = llm.collective_rpc(fused_head_rows)
    assert len(calls) >= TOKENS and max(calls) <= 2


def test_batch_of_special_rows_only(trio, expected):
    plain = [0, 1, 5]  # vLLM's own top-k and top-p kernel does not run in the interpreter
    with running(**trio) as llm:
        outputs = generate(llm, plain, logprobs=1)
    assert tokens_of(outputs) == [expected[i] for i in plain]


def test_shards_of_members_padded_to_other_vocabularies(tmp_path, two_ranks):
    """vLLM pads 111 columns to 128 and 200 to 256: two ranks split them at 64 and at 128."""
    from reference_loop import greedy
    from tiny_models import make_model

    small = {"heads": 2, "kv_heads": 1, "layers": 1, "vocab": 200, "tokenizer_size": 111}
    trio = {
        "model": make_model(tmp_path / "base", seed=1),
        "expert": make_model(tmp_path / "expert", seed=2, **small),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, **small),
    }
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    want = [greedy(models, p, TOKENS, a)[0] for p, a in zip(PROMPTS, ALPHAS)]
    asked = {"temperature": 0.0}
    with running(**trio, **two_ranks, fused_head_max_batch=8) as llm:
        assert tokens_of(generate(llm, ALL, **asked)) == want
        # Rows of the three heads do not lie side by side, so logits are stored.
        assert llm.collective_rpc(lambda w: w.model_runner.model.fused_heads) == [None, None]
        # A bias that changes nothing takes the other path: one gathered distribution.
        assert tokens_of(generate(llm, ALL, **asked, logit_bias={3: 0.0}, logprobs=2)) == want
