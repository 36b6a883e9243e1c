"""Explanations between the sampler and the answer: columns, and texts of tokens."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from proxy_vllm.demo import model_path
from proxy_vllm.explain.columns import attach, split
from proxy_vllm.explain.front_end import ExplainingProcessor, Texts


def tensors(rows: int, width: int) -> LogprobsTensors:
    ids = torch.arange(rows * width, dtype=torch.int32).view(rows, width)
    return LogprobsTensors(ids, -ids.float(), torch.arange(rows))


@pytest.mark.parametrize("own", [0, 1, 4])
def test_columns_come_back_for_rows_that_ask_and_for_no_other(own):
    before = tensors(5, own) if own else None
    ids, scores = torch.arange(100, 114).view(2, 7), torch.randn(2, 28)
    made = attach(before, 5, torch.tensor([1, 3]), ids, scores)
    lists = made.to_cpu_nonblocking().tolists()
    plain = tensors(5, own).tolists()
    for row in range(5):
        found = lists.slice_request(row, 1)
        if row in (1, 3):
            found, block = split(found)
            at = (row - 1) // 2
            assert block.ids.tolist() == [ids[at].tolist()]
            assert block.scores.tolist() == [scores[at].view(4, 7).tolist()]
        want = plain.slice_request(row, 1)
        assert type(found) is LogprobsLists
        np.testing.assert_array_equal(found.logprob_token_ids, want.logprob_token_ids)
        np.testing.assert_array_equal(found.logprobs, want.logprobs)


def test_positions_of_drafts_stay_with_their_request():
    """Two requests of three positions each, of which the second's first two count."""
    ids, scores = torch.arange(9).view(3, 3), torch.zeros(3, 12)
    made = attach(None, 6, torch.tensor([3, 4, 5]), ids, scores)
    kept = made.filter(torch.tensor([True, False, False, True, True, False]))
    lists = kept.tolists([0, 1, 3])
    assert lists.slice_request(0, 1).logprobs.shape == (1, 0)
    rows, block = split(lists.slice_request(1, 2))
    assert block.ids.tolist() == ids[:2].tolist() and rows.logprobs.shape == (2, 0)
    assert lists.slice_request(1, 0).logprobs.shape == (0, 0)


def test_texts_together_are_the_answer():
    """A byte-level tokenizer spreads characters over tokens; candidates show their own bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path("base")))
    answer = "Zoë keeps a 🐈, naïvely."
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    plain = LogprobsProcessor(tokenizer, None, None, None, None, None)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    processor = ExplainingProcessor(**{**fields, "logprobs": []}, top=1, texts=Texts(tokenizer))
    for token in ids:
        rows = attach(
            None, 1, torch.tensor([0]), torch.tensor([[token, token, 7]]), -torch.ones(1, 12)
        )
        lists = rows.tolists().slice_request(0, 1)
        processor.update_from_output(
            SimpleNamespace(
                new_logprobs=lists, new_prompt_logprobs_tensors=None, prompt_token_id_logprobs=None
            )
        )
    found = [position.explanation for position in processor.logprobs]
    assert [e.chosen.token_id for e in found] == ids
    texts = [e.chosen.token for e in found]
    assert "".join(texts) == answer and "" in texts
    assert all(e.changed and e.base_choice == 7 for e in found if e.chosen.token_id != 7)
