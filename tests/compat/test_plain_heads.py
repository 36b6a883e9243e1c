"""Models whose heads we shard ourselves compute logits in vLLM as we take them to."""

import inspect

import pytest

from proxy_vllm.composite.heads import _PLAIN_HEADS


@pytest.mark.parametrize("name", sorted(_PLAIN_HEADS))
def test_compute_logits_is_the_logits_processor_alone(name):
    from vllm import ModelRegistry

    cls = ModelRegistry._try_load_model_cls(name)
    body = inspect.getsource(cls.compute_logits).split(":\n", 1)[1].split()
    plain = "logits = self.logits_processor(self.lm_head, hidden_states) return logits"
    moved = f"vLLM's {name}.compute_logits is another: look at proxy_vllm/composite/heads.py"
    assert " ".join(body) == plain, moved
