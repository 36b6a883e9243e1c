"""What steering does to each token, by three Transformers models: the truth for explanations."""

import torch
from reference_loop import Trio, own_ids, prompts_of

VIEWS = ("steered", "base", "expert", "antiexpert")


@torch.inference_mode()
def log_probabilities(trio: Trio, prompt, answer: list[int], alpha: float) -> dict:
    """Of every token at every position of an answer, ``[tokens, V_m]`` by view.

    ``prompt`` is token ids, or those of each model.
    """
    logits = []
    for model, own in zip(trio.models(), prompts_of(prompt)):
        ids = own_ids(model, torch.tensor([[*own, *answer]]))
        logits.append(model(ids).logits[0, len(own) - 1 : -1].float())
    logits = [trio.combine(*logits, alpha), *logits]
    return {view: rows.log_softmax(-1) for view, rows in zip(VIEWS, logits)}


def assert_explained(explained, trio: Trio, prompt, answer, alpha: float, top: int) -> None:
    """Every value within 1e-4 of Transformers' own, and the right tokens shown."""
    assert [e.chosen.token_id for e in explained] == list(answer)
    truth = log_probabilities(trio, prompt, list(answer), alpha)
    for at, entry in enumerate(explained):
        steered, base = truth["steered"][at], truth["base"][at]
        assert entry.alpha == alpha
        assert (entry.steered_choice, entry.base_choice) == (steered.argmax(), base.argmax())
        assert entry.changed == (entry.steered_choice != entry.base_choice)
        firsts = [rows.topk(top).indices.tolist() for rows in (steered, base)]
        shown = [candidate.token_id for candidate in entry.top]
        assert set(shown) == {answer[at], *firsts[0], *firsts[1]}
        assert shown == sorted(shown, key=lambda i: -steered[i])
        for candidate in (entry.chosen, *entry.top):
            for view in VIEWS:
                rows, found = truth[view][at], getattr(candidate, view)
                lacks = candidate.token_id >= len(rows) or rows[candidate.token_id].isinf()
                if lacks:
                    assert found is None
                else:
                    assert abs(found - rows[candidate.token_id]) < 1e-4, (at, view)
        assert abs(entry.shift - (steered - base)[answer[at]]) < 2e-4
