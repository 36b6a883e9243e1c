"""What the evaluation's model rests on inside the harness."""

import ast
import inspect

import pytest

pytest.importorskip("lm_eval")


def assigned(function):
    """Names that a method gives to attributes of `self`, itself or through properties' setters."""
    tree = ast.parse("class C:\n" + inspect.getsource(function))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_the_model_sets_every_attribute_that_the_harness_sets():
    from proxy_vllm.eval.model import VLLM, ProxyVLLM

    missing = assigned(VLLM.__init__) - assigned(ProxyVLLM.__init__)
    assert not missing, f"ProxyVLLM.__init__ does not set {sorted(missing)}"
    assert "extra_args" not in inspect.getsource(VLLM._model_generate)
    assert list(inspect.signature(VLLM._model_generate).parameters) == list(
        inspect.signature(ProxyVLLM._model_generate).parameters
    )


def test_the_command_registers_the_model():
    from lm_eval.api.registry import get_model

    from proxy_vllm.eval.model import ProxyVLLM

    assert get_model("proxy_vllm") is ProxyVLLM
