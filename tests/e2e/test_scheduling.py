"""What vLLM's scheduler does to a request (cache, chunk, preempt) does not change its tokens."""

from typing import Any

import pytest
import torch
from engines import SMALL, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy

BLOCK = SMALL["block_size"]
BLOCKS = 13
BUDGET = SMALL["max_num_batched_tokens"]


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def llm(trio):
    """An engine whose KV cache holds twelve blocks (vLLM keeps one for itself)."""
    with running(
        **trio, num_gpu_blocks_override=BLOCKS, max_model_len=256, disable_log_stats=False
    ) as engine:
        yield engine


def counter(llm, name: str) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def check(llm, reference, prompts, alphas, max_tokens) -> list[Any]:
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        [greedy_params(max_tokens, proxy_alpha=a) for a in alphas],
        use_tqdm=False,
    )
    for output, prompt, alpha in zip(outputs, prompts, alphas, strict=True):
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, max_tokens, alpha)[0]
    return outputs


def test_prefix_caching(llm, reference):
    """Blocks of a prompt are reused by a later request, also by one with another alpha."""
    prompt = prompt_ids([2 * BLOCK + 9], seed=21)[0]
    longer = prompt + prompt_ids([20], seed=22)[0]
    (first,) = check(llm, reference, [prompt], [1.0], 8)
    assert first.num_cached_tokens == 0
    (second,) = check(llm, reference, [prompt], [1.0], 8)
    assert second.num_cached_tokens == 2 * BLOCK
    both = check(llm, reference, [prompt, longer], [-1.5, 0.25], 8)
    assert [output.num_cached_tokens for output in both] == [2 * BLOCK] * 2
    other = prompt_ids([2 * BLOCK + 9], seed=23)[0]
    (miss,) = check(llm, reference, [other], [1.0], 8)
    assert miss.num_cached_tokens == 0


def test_chunked_prefill(llm, reference):
    """A prompt longer than a step's budget is prefilled over several steps, beside decodes."""
    long, short = prompt_ids([3 * BUDGET + 11, 5], seed=24)
    llm.reset_prefix_cache()
    engine = llm.llm_engine
    for request_id, prompt, alpha in (("long", long, 0.5), ("short", short, -0.5)):
        params = greedy_params(12, proxy_alpha=alpha)
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    first_seen: dict[str, int] = {}
    tokens: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        step += 1
        for output in engine.step():
            first_seen.setdefault(output.request_id, step)
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert tokens["long"] == greedy(reference, long, 12, 0.5)[0]
    assert tokens["short"] == greedy(reference, short, 12, -0.5)[0]
    assert first_seen["long"] >= 4, "the prompt was not chunked"


def test_preemption(llm, reference):
    """Six requests that grow to 18 blocks in all run in a cache of 12, with their own alphas."""
    prompts = prompt_ids([30, 35, 28, 31, 20, 33], seed=25)
    alphas = [1.0, 0.0, -1.0, 0.5, 2.0, 1.5]
    llm.reset_prefix_cache()
    before = counter(llm, "vllm:num_preemptions")
    check(llm, reference, prompts, alphas, 50)
    assert counter(llm, "vllm:num_preemptions") > before


def test_preempted_requests_go_on_with_their_random_numbers(llm):
    """Eight seeded requests outgrow their block after a few tokens, and the cache has no two each.

    Alone, none of them is preempted.
    """
    from vllm import SamplingParams

    lengths = [BLOCK - 2 - i % 3 for i in range(8)]
    prompts = [{"prompt_token_ids": p} for p in prompt_ids(lengths, seed=27)]
    params = [
        SamplingParams(
            temperature=1.0,
            seed=5 + i,
            max_tokens=8,
            ignore_eos=True,
            extra_args={"proxy_alpha": 1.5 - 0.5 * i},
        )
        for i in range(8)
    ]
    llm.reset_prefix_cache()
    alone = [llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, params)]
    llm.reset_prefix_cache()
    before = counter(llm, "vllm:num_preemptions")
    together = llm.generate(prompts, params, use_tqdm=False)
    assert counter(llm, "vllm:num_preemptions") > before
    for one, other in zip(alone, together):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_a_refused_alpha_harms_no_other_request(llm, reference):
    from proxy_vllm.errors import UserError

    prompts = prompt_ids([12, 18, 7], seed=26)
    for bad in (float("nan"), float("inf"), 11, -10.5, "x", True, [1.0], {}):
        params = [greedy_params(4, proxy_alpha=a) for a in (0.5, bad, 1.0)]
        with pytest.raises(UserError, match="proxy_alpha is") as error:
            llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert "\n" not in str(error.value)
        assert not llm.llm_engine.has_unfinished_requests()
    check(llm, reference, prompts, [10, -10.0, 0.5], 8)


def test_seeded_tokens_do_not_depend_on_chunks(trio):
    """A seeded request draws the same tokens whether its prompt is read at once or in parts."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": p} for p in prompt_ids([100, 30, 90], seed=21)]
    params = [
        SamplingParams(temperature=1.0, seed=5 + i, max_tokens=8, ignore_eos=True)
        for i in range(len(prompts))
    ]
    tokens = []
    for budget in (256, 32):
        with running(**trio, max_num_batched_tokens=budget) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens.append([list(o.outputs[0].token_ids) for o in outputs])
    assert tokens[0] == tokens[1]
