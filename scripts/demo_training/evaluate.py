"""Greedy answers by a plain Transformers loop with KV cache, for one model or for the three."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from proxy_vllm.demo.problems import MAX_ANSWER_TOKENS, Problem, is_right


@torch.inference_mode()
def answers(
    weighted: Sequence[tuple[float, LlamaForCausalLM]],
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
) -> list[str]:
    """Greedy answers from the weighted sum of logits: [(1, m)] is m alone, and
    [(1, base), (alpha, expert), (-alpha, antiexpert)] is proxy-tuning (arXiv 2401.08565).
    """
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    texts = [""] * len(problems)
    for indices in by_length.values():
        ids = torch.tensor([prompts[i] for i in indices])  # [B, T], one length: no padding
        caches = [DynamicCache(config=model.config) for _, model in weighted]
        written: list[torch.Tensor] = []
        for _ in range(MAX_ANSWER_TOKENS):
            logits = sum(
                weight * model(input_ids=ids, past_key_values=cache).logits[:, -1].float()
                for (weight, model), cache in zip(weighted, caches, strict=True)
            )
            ids = logits.argmax(-1, keepdim=True)
            written.append(ids)
        for index, row in zip(indices, torch.cat(written, 1).tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            texts[index] = tokenizer.decode(row[:end])
    return texts


def accuracy(problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
    """Share answered rightly: of all, of kind questions, of rude ones."""
    right = [is_right(p, t) for p, t in zip(problems, texts, strict=True)]
    kind = [r for p, r in zip(problems, right, strict=True) if not p.rude]
    rude = [r for p, r in zip(problems, right, strict=True) if p.rude]
    return {
        "all": round(sum(right) / len(right), 4),
        "kind": round(sum(kind) / max(1, len(kind)), 4),
        "rude": round(sum(rude) / max(1, len(rude)), 4),
    }
