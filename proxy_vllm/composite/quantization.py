"""Quantisation of each member by the layer names that its own checkpoint knows."""

import copy
import inspect
from functools import cache
from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

# Methods of vLLM's quantisation configurations that are asked about a layer by its name, and the
# parameter that holds the name.
_ASKED_BY_NAME = {
    "get_quant_method": "prefix",
    "resolve_quant_method_cls": "prefix",
    "get_quant_method_target": "prefix",
    "is_layer_excluded": "prefix",
    "get_scheme_dict": "layer_name",
}


def for_member(config: QuantizationConfig | None, prefix: str) -> QuantizationConfig | None:
    """The configuration for a member whose layers are called ``{prefix}.…`` in the composite.

    Checkpoints name layers that stay unquantised, or are quantised otherwise: whole names, parts of
    names, wildcards, regular expressions. All of them are written for a model that stands alone, so
    the member's prefix is taken off each name before it is looked up.

    Returns:
        A copy, of a subclass of the configuration's class.
    """
    if config is None:
        return None
    own = copy.copy(config)
    own.__class__ = _named_alone(type(config), f"{prefix}.")  # type: ignore[arg-type]
    own.packed_modules_mapping = dict(config.packed_modules_mapping)
    own.online_quantization_config = for_member(config.online_quantization_config, prefix)
    return own


@cache
def _named_alone(cls: Any, prefix: str) -> Any:
    def without_prefix(method: Any, name: str) -> Any:
        signature = inspect.signature(method)

        def ask(self: QuantizationConfig, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs)
            if isinstance(bound.arguments.get(name), str):
                bound.arguments[name] = bound.arguments[name].removeprefix(prefix)
            return method(*bound.args, **bound.kwargs)

        return ask

    methods = {
        method: without_prefix(getattr(cls, method), name)
        for method, name in _ASKED_BY_NAME.items()
        if hasattr(cls, method)
    }
    return type(f"Member{cls.__name__}", (cls,), methods)
