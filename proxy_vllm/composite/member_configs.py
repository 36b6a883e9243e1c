"""vLLM's configuration of each member: own model and quantisation, the engine's everything else.

A composite's engine has one ``VllmConfig``, whose model is the base under the composite's name.
Each member is built from a view of it. Views share the engine's objects, and never run
``VllmConfig.__post_init__`` again, which would write into them what the small members need.
"""

import copy
import dataclasses

from vllm.config import LoRAConfig, ModelConfig, VllmConfig

from proxy_vllm.composite.quantization import for_member
from proxy_vllm.config import CONFIG_KEY, ROLES, ProxyConfig

# What a small member takes from the base's configuration, unless `expert_args` says otherwise.
_INHERITED = (
    "trust_remote_code",
    "seed",
    "enforce_eager",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "hf_token",
    "config_format",
    "allow_deprecated_quantization",
    "disable_sliding_window",
)

# Load formats from which vLLM cannot tell whether a checkpoint has a head of its own.
_WITHOUT_CHECKPOINT = ("dummy", "sharded_state", "runai_streamer_sharded")


def base_model_config(composite: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the base alone: the engine's, under the base's own architecture.

    Of a model that also reads images or sound, the text model is all that is wanted.
    """
    fields = (field.name for field in dataclasses.fields(ModelConfig) if field.init)
    args = {name: getattr(composite, name) for name in fields}
    args["hf_overrides"] = {k: v for k, v in args["hf_overrides"].items() if k != "architectures"}
    return ModelConfig(**args, language_model_only=True)


def member_model_config(role: str, proxy: ProxyConfig, base: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the expert or the antiexpert.

    Its dtype is the base's unless the member's arguments name another. Its length limit is its
    own, so that the caller can compare it with the base's.
    """
    args = {name: getattr(base, name) for name in _INHERITED if hasattr(base, name)}
    args["dtype"] = base.dtype
    args["language_model_only"] = True
    args.update(proxy.member_args(role))
    return ModelConfig(model=getattr(proxy, role), **args)


def member_model_configs(composite: ModelConfig, proxy: ProxyConfig) -> dict[str, ModelConfig]:
    """One ``ModelConfig`` for each role, at the engine's length limit."""
    configs = {"base": base_model_config(composite)}
    for role in ROLES[1:]:
        source = proxy.same_weights.get(role)
        configs[role] = configs[source] if source else member_model_config(role, proxy, composite)
    for config in configs.values():
        config.max_model_len = composite.max_model_len
    return configs


def view(vllm_config: VllmConfig, model_config: ModelConfig) -> VllmConfig:
    """The engine's configuration as one member sees it, sharing all but the model's."""
    config = copy.copy(vllm_config)
    config.model_config = model_config
    return config


def member_vllm_configs(vllm_config: VllmConfig, proxy: ProxyConfig) -> dict[str, VllmConfig]:
    """One ``VllmConfig`` for each role: own model and quantization, everything else shared.

    ``compilation_config`` stays the same object, so all attention layers register in one
    ``static_forward_context`` and vLLM's runners find the layers of all three.

    ``additional_config`` enters the key of vLLM's cache of compiled graphs. A member's graph holds
    its layers' names, so two roles must not share one, though they be the same model; alpha and
    the like are in no graph. The cache also has one folder for the whole engine, named by the base.
    """
    configs = {}
    for role, model_config in member_model_configs(vllm_config.model_config, proxy).items():
        # As `VllmConfig.__post_init__` does for an engine's one model.
        model_config.verify_with_parallel_config(vllm_config.parallel_config)
        if vllm_config.load_config.load_format not in _WITHOUT_CHECKPOINT:
            model_config.maybe_untie_word_embeddings()
        config = configs[role] = view(vllm_config, model_config)
        config.quant_config = _quant_config(role, config)
        config.lora_config = _lora_config(vllm_config, model_config) if role == "expert" else None
    others = {k: v for k, v in vllm_config.additional_config.items() if k != CONFIG_KEY}
    graphs = {role: config.model_config.compute_hash() for role, config in configs.items()}
    for role, config in configs.items():
        config.additional_config = {**others, CONFIG_KEY: {"role": role, "graphs": graphs}}
    return configs


def _lora_config(vllm_config: VllmConfig, expert: ModelConfig) -> LoRAConfig | None:
    """vLLM's settings of adapters, which are the expert's: in its dtype unless one was named."""
    given = vllm_config.lora_config
    if given is None or given.lora_dtype != vllm_config.model_config.dtype:
        return given
    own = copy.copy(given)
    own.lora_dtype = expert.dtype
    return own


def _quant_config(role: str, config: VllmConfig):
    """A member's quantisation, settled as ``VllmConfig.__post_init__`` settles an engine's."""
    from vllm.utils.deep_gemm import should_auto_disable_deep_gemm

    model_config = config.model_config
    found = VllmConfig.get_quantization_config(model_config, config.load_config)
    if getattr(found, "use_deep_gemm", False) is None:
        model_type = getattr(model_config.hf_text_config, "model_type", None)
        if should_auto_disable_deep_gemm(model_type):
            found.use_deep_gemm = False
    return for_member(found, role)
