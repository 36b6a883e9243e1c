"""A batch of every kind of sampling, and its tokens by Transformers and the float64 reference."""

from collections.abc import Sequence
from typing import Any

import torch
from engines import prompt_ids
from reference_loop import Trio

TOKENS = 12
ROWS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.7, "seed": 12, "top_p": 0.8},
    {"temperature": 1.3, "seed": 13, "top_k": 5},
    {"temperature": 1.0, "seed": 14, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.9, "seed": 15, "min_p": 0.1},
    {"temperature": 1.0, "seed": -3, "top_k": 1},
]
ALPHAS = [1.0, 0.5, -1.0, 0.0, 2.0, 1.0, 1.5]
PROMPTS = prompt_ids([3, 9, 33, 70, 5, 20, 12], seed=5)


def params(row: int, **more: Any) -> Any:
    """vLLM's parameters of one row of the batch."""
    from vllm import SamplingParams

    fields = {"max_tokens": TOKENS, "ignore_eos": True, **ROWS[row], **more}
    return SamplingParams(extra_args={"proxy_alpha": ALPHAS[row]}, **fields)


def generate(llm: Any, rows: Sequence[int], **more: Any) -> list[Any]:
    """vLLM's outputs for some rows of the batch, together."""
    prompts = [{"prompt_token_ids": PROMPTS[row]} for row in rows]
    return llm.generate(prompts, [params(row, **more) for row in rows], use_tqdm=False)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def sampled_by_reference(trio: Trio, row: int) -> list[int]:
    """Decode without any cache; the noise is keyed by the position of the last token read."""
    from proxy_vllm.kernels import reference
    from proxy_vllm.kernels.row_parameters import RowParameters

    fields, ids = ROWS[row], list(PROMPTS[row])
    for _ in range(TOKENS):
        logits = [m(torch.tensor([ids])).logits[:, -1] for m in trio.models()]
        parameters = RowParameters(
            alpha=torch.tensor([ALPHAS[row]]),
            temperature=torch.tensor([fields["temperature"]]),
            seeds=torch.tensor([fields.get("seed", 0)]),
            positions=torch.tensor([len(ids) - 1]),
            top_k=torch.tensor([fields.get("top_k", 0)]),
            top_p=torch.tensor([fields.get("top_p", 1.0)]),
            min_p=torch.tensor([fields.get("min_p", 0.0)]),
        )
        ids.append(int(reference.scores(*logits, parameters).argmax()))
    return ids[len(PROMPTS[row]) :]


def expected_tokens(trio: dict[str, str]) -> list[list[int]]:
    """Of every row, for the trio in these folders."""
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    return [sampled_by_reference(models, row) for row in range(len(ROWS))]


@torch.inference_mode()
def assert_logprobs(trio: Trio, row: int, output: Any, count: int, tolerance: float = 2e-4) -> None:
    """Raw log-probabilities of the combination: of each token drawn, and the `count` largest."""
    ids = list(PROMPTS[row])
    completion = output.outputs[0]
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        base, expert, antiexpert = (m(torch.tensor([ids])).logits[0, -1] for m in trio.models())
        want = (base + ALPHAS[row] * (expert - antiexpert)).log_softmax(-1)
        # vLLM returns as many as any request of the batch asked for, or cuts to what this one did.
        assert {token, *want.topk(count).indices.tolist()} <= set(entries)
        for index, entry in entries.items():
            assert abs(entry.logprob - float(want[index])) < tolerance
        assert entries[token].rank == 1 + int((want > want[token]).sum())
        ids.append(token)
