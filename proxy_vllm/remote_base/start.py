"""From the options of a base elsewhere to an engine: before it is loaded, and once it is."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.endpoint import Endpoint, probe
from proxy_vllm.remote_base.settings import RemoteBase

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Options that steer a base inside the engine, of which there is none.
_EXCLUDED = {
    "speculative_config": "--speculative-config",
    "enable_prompt_embeds": "--enable-prompt-embeds",
    "headless": "--headless",
    "grpc": "--grpc",
}


def local_engine_args(kwargs: dict[str, Any], proxy: ProxyConfig) -> dict[str, Any]:
    """Arguments of the engine that runs the pair: its base is the antiexpert.

    Raises:
        UserError: an option that has no meaning without a base in the engine.
    """
    given = [option for name, option in _EXCLUDED.items() if kwargs.get(name)]
    if proxy.speculative_tokens:
        given.append("--speculative-tokens")
    if proxy.takes_own_prompts:
        given.append("--own-prompts, or a chat template of a small member,")
    for name in ("data_parallel_size", "api_server_count"):
        if int(kwargs.get(name) or 1) > 1:
            given.append(f"--{name.replace('_', '-')}")
    if given:
        raise UserError(
            f"{given[0]} is for a base in the engine, and --base-url names one elsewhere"
        )
    args = proxy.member_args("antiexpert")
    return {**kwargs, **args, "model": proxy.antiexpert, "max_logprobs": -1}


def checked_endpoint(proxy: ProxyConfig, configs: "dict[str, ModelConfig]") -> ProxyConfig:
    """The configuration with what the endpoint was found to be, asked before anything is loaded.

    Raises:
        UserError: an endpoint that cannot serve as the base.
    """
    assert proxy.remote_base is not None
    vocab_size = configs["base"].get_vocab_size()
    tokenizer = _tokenizer(proxy.remote_base, configs["expert"])
    return replace(proxy, remote_base=probe(proxy.remote_base, tokenizer, vocab_size))


def endpoint_of(vllm_config: "VllmConfig") -> Endpoint:
    """The endpoint of an engine that was configured for one."""
    settings = ProxyConfig.from_vllm_config(vllm_config).remote_base
    assert settings is not None
    model_config = vllm_config.model_config
    return Endpoint(settings, _tokenizer(settings, model_config), model_config.get_vocab_size())


def _tokenizer(settings: RemoteBase, model_config: "ModelConfig") -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config, get_tokenizer

    if settings.tokenizer is None:
        return cached_tokenizer_from_config(model_config)
    try:
        return get_tokenizer(settings.tokenizer)
    except Exception as error:
        raise UserError(f"--base-tokenizer {settings.tokenizer}: {error}") from None
