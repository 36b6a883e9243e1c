"""Models whose heads we shard or fuse ourselves compute logits in vLLM as we take them to."""

import ast
import importlib.util
import inspect
from functools import cache
from pathlib import Path

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


@cache
def models() -> dict[str, ast.ClassDef]:
    """Every class of vLLM's models, by its source: nothing is imported."""
    package = importlib.util.find_spec("vllm")
    folder = Path(package.submodule_search_locations[0], "model_executor/models")
    return {
        node.name: node
        for file in sorted(folder.glob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


def source_of(name: str, method: str) -> str | None:
    """The class's own body of a method, in one line."""
    for node in models()[name].body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return " ".join(ast.unparse(ast.Module(node.body, [])).split())
    return None


def family(name: str) -> list[str]:
    """A class and its ancestors among the models, nearest first."""
    found = [name]
    for base in models()[name].bases:
        if (ancestor := ast.unparse(base)) in models():
            found += family(ancestor)
    return found


def test_local_logits_are_logits_without_gathering():
    """Also where a subclass has its own logits: it then needs its own local ones."""
    checked = []
    for name in models():
        own = {method: [c for c in family(name) if source_of(c, method)] for method in
               ("compute_logits", "compute_logits_local")}  # fmt: skip
        if not own["compute_logits_local"]:
            continue
        whole = source_of(own["compute_logits"][0], "compute_logits")
        local = source_of(own["compute_logits_local"][0], "compute_logits_local")
        if "self.language_model" in local:  # a wrapper, which has no head of its own
            continue
        call = "self.logits_processor(self.lm_head, hidden_states"
        assert whole in (f"return {call})", f"logits = {call}) return logits"), name
        assert local == f"return {call}, skip_gather=True)", name
        checked.append(name)
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen3_5ForCausalLMBase"} <= set(checked)


CAPPED_OR_SCALED = [
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM", "CohereForCausalLM"),
    *("GraniteForCausalLM", "GraniteMoeHybridForCausalLM", "FalconH1ForCausalLM"),
    "Exaone4ForCausalLM",
]


@pytest.mark.parametrize("name", CAPPED_OR_SCALED)
def test_heads_with_caps_and_scales_are_left_to_vllm(name):
    """Their logits are gathered whole, by their own `compute_logits`."""
    assert "soft_cap=" in (made := ast.unparse(models()[name])) or "scale=" in made
    for cls in family(name):
        assert cls not in _PLAIN_HEADS
        assert source_of(cls, "compute_logits_local") is None, (
            f"vLLM's {cls} has local logits now: test its caps and scales over two ranks, and with"
            " --fused-head-max-batch, in tests/e2e/test_families.py"
        )
