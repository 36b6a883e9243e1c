#!/usr/bin/env python
"""Proxy-tuning as a plain Transformers loop: the independent truth for tests and benchmarks.

Three models, three KV caches, one token at a time, no vLLM and nothing of proxy_vllm:

    logits = base + alpha * (expert - antiexpert)          (Liu et al. 2024, arXiv 2401.08565)

    python scripts/reference_loop.py BASE --expert E --antiexpert A "The first prompt" "A second"
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Prompt = Sequence[int]
# Takes the tokens generated so far and the combined logits [V], and returns the logits to take
# the next token from: penalties, biases, masks.
Process = Callable[[list[int], torch.Tensor], torch.Tensor]


@dataclass
class Trio:
    """The three models, in the order in which the formula names them.

    ``named`` [n] bool says which tokens a tokenizer of theirs names, of n tokens; the base's other
    columns are padding. None: it has none.
    """

    base: torch.nn.Module
    expert: torch.nn.Module
    antiexpert: torch.nn.Module
    named: torch.Tensor | None = None

    @classmethod
    def load(cls, base: str, expert: str, antiexpert: str, dtype: torch.dtype) -> "Trio":
        names = (base, expert, antiexpert)
        models = [AutoModelForCausalLM.from_pretrained(n, dtype=dtype).eval() for n in names]
        return cls(*models, named=named_tokens(names))

    def combine(
        self, base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        return combine(base, expert, antiexpert, alpha, self.named)

    def models(self) -> tuple[torch.nn.Module, ...]:
        return self.base, self.expert, self.antiexpert


def named_tokens(names: Sequence[str]) -> torch.Tensor | None:  # [n] bool
    """Which token ids the models' tokenizers name; None where a folder has no tokenizer."""
    try:
        ids = [AutoTokenizer.from_pretrained(name).get_vocab().values() for name in names]
    except (OSError, ValueError):
        return None
    every = torch.tensor([index for own in ids for index in own])
    return torch.zeros(int(every.max()) + 1, dtype=torch.bool).index_fill_(0, every, True)


def combine(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: float,
    named: torch.Tensor | None = None,  # [n] bool
) -> torch.Tensor:  # three [..., V_m] -> [..., V] float32
    """The formula over the tokens that all three have.

    To a token that a small member lacks, both give the same log-probability. All other logits would
    then have the difference of log-sum-exps taken off; here the few have it added. Columns that no
    tokenizer names are never taken, unless alpha is 0, which is the base as it is.
    """
    logits = base.float().clone()
    if alpha == 0:
        return logits
    size = logits.shape[-1]
    width = min(size, expert.shape[-1], antiexpert.shape[-1])
    small = [member[..., :width].float() for member in (expert, antiexpert)]
    logits[..., :width] += alpha * (small[0] - small[1])
    if named is not None:
        padding = torch.ones(size, dtype=torch.bool)
        padding[: len(named)] = ~named[:size]
        logits[..., padding] = -torch.inf
    if width < size:
        if named is not None:
            small = [member.masked_fill(padding[:width], -torch.inf) for member in small]
        levels = [member.logsumexp(-1, keepdim=True) for member in small]
        logits[..., width:] += alpha * (levels[0] - levels[1])
    return logits


def own_ids(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Token ids as a model reads them: those past its vocabulary as its token 0."""
    return torch.where(ids < model.config.vocab_size, ids, 0)


def prompts_of(prompt: Prompt | dict[str, Prompt]) -> tuple[Prompt, Prompt, Prompt]:
    """Token ids for base, expert and antiexpert; one list stands for all three."""
    if isinstance(prompt, dict):
        base = prompt["base"]
        return base, prompt.get("expert", base), prompt.get("antiexpert", base)
    return prompt, prompt, prompt


@torch.inference_mode()
def greedy(
    trio: Trio,
    prompt: Prompt | dict[str, Prompt],
    max_tokens: int,
    alpha: float = 1.0,
    stop_ids: Sequence[int] = (),
    process: Process | None = None,
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy continuation of one prompt.

    Args:
        prompt: token ids, or a dictionary of token ids for each role.
        stop_ids: token ids that end the text; the ending token is kept, as in vLLM.
        process: what happens to the combined logits before the largest is taken.

    Returns:
        The generated ids, and the combined logits ``[V]`` (float32) at each, before ``process``.
    """
    caches, logits = [], []
    for model, ids in zip(trio.models(), prompts_of(prompt)):
        out = model(own_ids(model, torch.tensor([list(ids)])), use_cache=True)
        caches.append(out.past_key_values)
        logits.append(out.logits[0, -1])
    tokens, steps = [], []
    while True:
        combined = trio.combine(*logits, alpha)
        steps.append(combined)
        chosen = combined if process is None else process(tokens, combined.clone())
        tokens.append(int(chosen.argmax()))
        if len(tokens) == max_tokens or tokens[-1] in stop_ids:
            return tokens, steps
        for i, model in enumerate(trio.models()):
            last = own_ids(model, torch.tensor([[tokens[-1]]]))
            out = model(last, past_key_values=caches[i], use_cache=True)
            caches[i] = out.past_key_values
            logits[i] = out.logits[0, -1]


@torch.inference_mode()
def prompt_logits(trio: Trio, ids: Prompt, alpha: float = 1.0) -> torch.Tensor:  # [T, V]
    """Combined logits after every position of one prompt."""
    whole = torch.tensor([list(ids)])
    return trio.combine(*(m(own_ids(m, whole)).logits[0] for m in trio.models()), alpha)


@torch.inference_mode()
def answer_logits(
    trio: Trio, prompt: Prompt | dict[str, Prompt], tokens: Prompt, alpha: float = 1.0
) -> torch.Tensor:  # [len(tokens), V]
    """Combined logits from which each token of an answer was to be chosen after those before it."""
    logits = []
    for model, ids in zip(trio.models(), prompts_of(prompt)):
        whole = torch.tensor([[*ids, *tokens[:-1]]])
        logits.append(model(own_ids(model, whole)).logits[0, len(ids) - 1 :])
    return trio.combine(*logits, alpha)


@torch.inference_mode()
def greedy_batch(
    trio: Trio, prompts: Sequence[Prompt], max_tokens: int, alpha: float = 1.0
) -> list[list[int]]:
    """Greedy continuation of many prompts at once, left-padded, with KV caches.

    This is how the original implementation generates; benchmarks compare with it. Padding is
    masked, and positions count from each prompt's first token.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches: list = [None] * 3
    produced = []
    for _ in range(max_tokens):
        logits = []
        for i, model in enumerate(trio.models()):
            out = model(
                own_ids(model, ids),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=caches[i],
                use_cache=True,
                logits_to_keep=1,
            )
            caches[i] = out.past_key_values
            logits.append(out.logits[:, -1])
        ids = trio.combine(*logits, alpha).argmax(-1, keepdim=True)
        produced.append(ids)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
    return torch.cat(produced, dim=1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--expert", required=True)
    parser.add_argument("--antiexpert", required=True)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("prompts", nargs="+")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    trio = Trio.load(args.base, args.expert, args.antiexpert, getattr(torch, args.dtype))
    stop = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in args.prompts:
        ids, _ = greedy(trio, tokenizer(text).input_ids, args.max_tokens, args.alpha, stop)
        print(repr(text + tokenizer.decode(ids, skip_special_tokens=True)))


if __name__ == "__main__":
    main()
