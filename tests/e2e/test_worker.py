"""What the modified worker tells and bears, and the rest of `vllm.LLM`'s face."""

from pathlib import Path

import pytest
import torch
from engines import SMALL, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from safetensors import safe_open
from tiny_models import make_model
from transformers import AutoTokenizer

STEPS = 8
VOCAB = 128  # a multiple of what vLLM pads vocabularies to


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("worker")
    small = {"vocab": VOCAB, "hidden": 32, "heads": 1, "layers": 1}
    return {
        "model": make_model(root / "base", seed=1, vocab=VOCAB, kv_heads=1),
        "expert": make_model(root / "expert", seed=2, **small),
        "antiexpert": make_model(root / "antiexpert", seed=3, tied=True, **small),
    }


@pytest.fixture(scope="module")
def reference(folders) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def told():
    """What the worker logs. vLLM takes levels and handlers off its loggers as an engine starts."""
    import proxy_vllm.worker.gpu_worker

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            proxy_vllm.worker.gpu_worker.logger,
            "info",
            lambda text, *args: lines.append(text % args),
        )
        yield lines


@pytest.fixture(scope="module")
def llm(folders, told):
    with running(**folders, alpha=0.5) as engine:
        yield engine


def test_memory_of_each_member_is_told(llm, folders, told):
    (weights,) = [line for line in told if line.startswith("Weights on rank 0")]
    (cache,) = [line for line in told if line.startswith("KV cache on rank 0")]
    for role in ("base", "expert", "antiexpert"):
        assert f"{role} " in weights
    # Keys and values, 32 wide, in float32: two layers with one head for them, or one.
    sizes = {"base": 2 * 2 * 32 * 4, "expert": 2 * 32 * 4, "antiexpert": 2 * 32 * 4}
    for role, size in sizes.items():
        assert f"{role} 0.0" in cache and f"({size} bytes a token)" in cache
    tokens = SMALL["kv_cache_memory_bytes"] // sum(sizes.values())
    counted = int(cache.split(": ")[1].split(" tokens")[0])
    assert 0.98 * tokens < counted <= tokens and counted % SMALL["block_size"] == 0

    (counted,) = llm.apply_model(lambda model: dict(model.member_weight_bytes))
    for role, folder in zip(counted, folders.values(), strict=True):
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        # Beside the checkpoint: rotary embeddings of 512 positions, and scales of each layer.
        assert 0 <= counted[role] - stored <= 512 * 32 * 4 + 64, role


@torch.inference_mode()
def changed_in(trio: Trio, prompt: list[int], answer: list[int]) -> int:
    """Tokens of a greedy answer that are not the base's first choice at their place."""
    logits = trio.base(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return int((logits.argmax(-1) != torch.tensor(answer)).sum())


def test_changed_tokens_are_counted_where_a_request_is_steered(llm, reference):
    """Every step measured, a prompt in chunks among them: the counts are exact."""

    def every(steps: int) -> None:
        llm.collective_rpc(
            lambda worker: setattr(worker.model_runner.changed_tokens, "every", steps)
        )

    every(1)
    (before,) = llm.collective_rpc("proxy_stats")
    prompts = prompt_ids([5, 90, 9], vocab=VOCAB, seed=72)
    alphas = [1.0, 0.0, -2.0]
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [greedy_params(STEPS, proxy_alpha=alpha) for alpha in alphas],
    )
    (after,) = llm.collective_rpc("proxy_stats")
    every(0)
    changed = [
        changed_in(reference, prompt, list(answer.outputs[0].token_ids)) if alpha else 0
        for prompt, answer, alpha in zip(prompts, answers, alphas)
    ]
    assert after["compared"] - before["compared"] == 2 * STEPS
    assert after["changed"] - before["changed"] == sum(changed) > 0


def test_memory_of_each_member_in_numbers(llm):
    (stats,) = llm.collective_rpc("proxy_stats")
    (weights,) = llm.apply_model(lambda model: dict(model.member_weight_bytes))
    assert stats["weights"] == weights and list(weights) == ["base", "expert", "antiexpert"]
    # Two layers against one.
    cache = stats["kv_cache"]
    assert cache["base"] == 2 * cache["expert"] == 2 * cache["antiexpert"]
    assert 0.98 < sum(cache.values()) / SMALL["kv_cache_memory_bytes"] <= 1


def test_an_alpha_that_came_past_admission_harms_nobody(llm, reference, caplog):
    """It runs with the engine's alpha, and is said once: a worker must not raise."""
    engine = llm.llm_engine
    prompts = prompt_ids([5, 40, 9], vocab=VOCAB, seed=71)
    alphas = [1.0, "strong", -1.0]
    for i, (prompt, alpha) in enumerate(zip(prompts, alphas)):
        params = greedy_params(STEPS, proxy_alpha=alpha)
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    for i, (prompt, alpha) in enumerate(zip(prompts, [1.0, 0.5, -1.0])):
        assert tokens[str(i)] == greedy(reference, prompt, STEPS, alpha)[0]
    lines = [message for message in caplog.messages if "'strong'" in message]
    assert len(lines) == 1 and lines[0].endswith("this request runs with alpha 0.5")


def test_chat_with_a_progress_bar(llm, folders, reference, capfd):
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    chats = [[{"role": "user", "content": text}] for text in ("w7 w8 w9", "w50")]
    outputs = llm.chat(
        chats, [greedy_params(STEPS), greedy_params(STEPS, proxy_alpha=0)], use_tqdm=True
    )
    for chat, output, alpha in zip(chats, outputs, (0.5, 0), strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert output.prompt_token_ids == ids
        assert list(output.outputs[0].token_ids) == greedy(reference, ids, STEPS, alpha)[0]
    assert "toks/s" in capfd.readouterr().err
