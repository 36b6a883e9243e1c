"""Classifier-free guidance: the base's weights once, a pass and a cache for the negative prompt."""

import pytest
import torch
from engines import V2, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model
from vllm import SamplingParams

from proxy_vllm.errors import UserError

STEPS = 12
PROMPTS = prompt_ids([40, 5, 33, 12, 20], seed=95)
NEGATIVES = [*prompt_ids([7, 60, 33], seed=96), None, None]
SCALES = [1.5, 3.0, 1.0, 2.0, None]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("cfg") / "base", seed=1)


@pytest.mark.skipif(V2, reason="a GPU and the interpreter run it")
def test_a_cpu_refuses_it(base):
    with (
        pytest.raises(UserError, match="need a GPU"),
        running(model=base, method="cfg"),
    ):
        pass


@pytest.mark.skipif(not V2, reason="prompts of each model's own need Model Runner V2")
def test_guidance(base):
    trio = Trio.load(base, base, base, torch.float32)
    extras = [
        {
            **({} if scale is None else {"guidance_scale": scale}),
            **({} if negative is None else {"proxy_negative_prompt": negative}),
        }
        for scale, negative in zip(SCALES, NEGATIVES)
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, extra_args=extra)
        for extra in extras
    ]
    with running(model=base, method="cfg") as llm:
        ((weights, layers),) = llm.apply_model(
            lambda model: (
                set(model.member_weight_bytes),
                {
                    n.split(".")[0]
                    for n in model.vllm_config.compilation_config.static_forward_context
                },
            )
        )
        assert weights == {"base"} and layers == {"base", "antiexpert"}
        for _ in range(2):  # the second time from the prefix cache
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False
            )
            for output, prompt, negative, scale in zip(outputs, PROMPTS, NEGATIVES, SCALES):
                prompts = {"base": prompt, "antiexpert": negative or prompt[-1:]}
                alpha = 0.5 if scale is None else scale - 1
                want, _ = greedy(trio, prompts, STEPS, alpha)
                assert list(output.outputs[0].token_ids) == want
        assert sum(o.num_cached_tokens for o in outputs) > 0
        for extra, words in (
            ({"guidance_scale": 2, "proxy_alpha": 1}, "stands for proxy_alpha"),
            ({"guidance_scale": "much"}, "must be a number"),
            ({"proxy_expert_prompt": [5]}, "the expert is the base"),
        ):
            with pytest.raises(UserError, match=words):
                llm.generate(
                    {"prompt_token_ids": [5]}, SamplingParams(extra_args=extra), use_tqdm=False
                )
        with pytest.raises(UserError, match="prompt_logprobs"):
            llm.generate({"prompt_token_ids": [5, 6]}, greedy_params(1, prompt_logprobs=0))
