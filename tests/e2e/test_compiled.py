"""Members compiled by torch.compile (the default without --enforce-eager) on vLLM's V1 CPU runner.

The engines share one compile cache, as a user's do, and differ in their small members and alpha.
"""

import pytest
import torch
from engines import RUNNER, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model

pytestmark = pytest.mark.skipif(RUNNER == "v2", reason="Dynamo cannot trace Triton's interpreter")

STEPS = 12
# Steps of one row (a special size to Dynamo), of whole chunks, and of chunks beside decodes.
BATCHES = (prompt_ids([1]), prompt_ids([3, 64, 130]), prompt_ids([7, 21, 1, 40, 90, 16, 5, 33]))
ALPHAS = [None, 1.0, 0.0, -1.5, 0.5, None, 10.0, 2.5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("compiled")
    small = {"heads": 2, "kv_heads": 1, "layers": 1}
    return {
        "base": make_model(root / "base", seed=1),
        **{name: make_model(root / name, seed=ord(name), **small) for name in "abcd"},
    }


def compiled_members(llm) -> list[bool]:
    (compiled,) = llm.apply_model(
        lambda model: [
            not member.model.do_not_compile and hasattr(member.model, "aot_compiled_fn")
            for member in model.members()
        ]
    )
    return compiled


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        yield


# Small members of one shape: the second pair is compiled with the first one's graphs in the cache.
@pytest.mark.parametrize("expert, antiexpert, alpha", [("a", "b", 1.0), ("c", "d", -0.75)])
def test_compiled_members_are_token_exact(expert, antiexpert, alpha, folders, cache):
    trio = {
        "model": folders["base"],
        "expert": folders[expert],
        "antiexpert": folders[antiexpert],
    }
    reference = Trio.load(*trio.values(), torch.float32)
    with running(**trio, alpha=alpha, enforce_eager=False) as llm:
        assert compiled_members(llm) == [True] * 3
        for prompts in BATCHES:
            alphas = ALPHAS[: len(prompts)]
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts],
                [greedy_params(STEPS, proxy_alpha=a) for a in alphas],
                use_tqdm=False,
            )
            for output, prompt, a in zip(outputs, prompts, alphas, strict=True):
                want, _ = greedy(reference, prompt, STEPS, alpha if a is None else a)
                assert list(output.outputs[0].token_ids) == want
