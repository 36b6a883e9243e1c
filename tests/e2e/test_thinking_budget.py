"""`thinking_token_budget` on combined logits: a thought that is too long is ended by force."""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Process, Trio, greedy
from tiny_models import make_trio

STEPS = 14
START, END = [40], [41, 42]
REASONING = {"reasoning_start_str": "w40", "reasoning_end_str": "w41 w42"}


def budgeted(prompt: list[int], budget: int) -> Process:
    """After so many tokens of a thought, its end alone may follow."""

    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        every = [*prompt, *tokens]
        start, end = (last(every, marker) for marker in (START, END))
        if start <= end:
            return logits
        thought = every[start + len(START) :]
        # How much of the end is there, where it has begun; a thought may hold its tokens too.
        begun = max(
            n
            for n in range(len(END))
            if len(thought) >= n and thought[len(thought) - n :] == END[:n]
        )
        if len(thought) - begun >= budget:
            forced = torch.full_like(logits, -torch.inf)
            forced[END[begun]] = 0
            return forced
        return logits

    return process


def last(tokens: list[int], marker: list[int]) -> int:
    """Where a marker begins for the last time; -1 for nowhere."""
    places = range(len(tokens) - len(marker) + 1)
    return max((i for i in places if tokens[i : i + len(marker)] == marker), default=-1)


# Tokens before and after the thought's start, the budget, alpha.
CASES = [
    (9, 0, 3, 1.0),
    (5, 0, 0, 0.5),
    (12, 4, 6, -1.0),  # four tokens of the thought are in the prompt
    (3, 7, 5, 1.0),  # more than the budget
    (6, 0, 100, 1.0),  # never reached
    (6, 0, None, 0.0),
    (20, None, 2, 1.0),  # no thought
]


@pytest.mark.parametrize("drafts", [None, 2])
def test_thoughts_end_at_their_budget(tmp_path, drafts):
    trio = make_trio(tmp_path)
    reference = Trio.load(*trio.values(), torch.float32)
    words = prompt_ids([40 for _ in CASES], seed=5)
    requests, want, plain = [], [], []
    for ids, (before, after, budget, alpha) in zip(words, CASES):
        ids = [i for i in ids if i not in (*START, *END)]
        thought = [] if after is None else [*START, *ids[before : before + after]]
        prompt = [*ids[:before], *thought]
        requests.append(
            (
                {"prompt_token_ids": prompt},
                greedy_params(STEPS, proxy_alpha=alpha, thinking_token_budget=budget),
            )
        )
        process = None if budget is None else budgeted(prompt, budget)
        want.append(greedy(reference, prompt, STEPS, alpha, process=process)[0])
        plain.append(greedy(reference, prompt, STEPS, alpha)[0])
    assert [w != p for w, p in zip(want, plain)] == [True] * 4 + [False] * 3
    extra = {} if drafts is None else {"speculative_tokens": drafts}
    with running(**trio, reasoning_config=REASONING, **extra) as llm:
        together = llm.generate(*map(list, zip(*requests)), use_tqdm=False)
        alone = [llm.generate(*request, use_tqdm=False)[0] for request in requests]
    for outputs in (together, alone):
        assert [list(output.outputs[0].token_ids) for output in outputs] == want
