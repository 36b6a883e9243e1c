"""``ProxyLLM``: ``vllm.LLM`` over a base steered by an expert and an antiexpert."""

from typing import Any

from vllm import LLM

from proxy_vllm.config import ProxyConfig, apply_to_engine_args, check_vllm_version
from proxy_vllm.plugin import register
from proxy_vllm.request import admit
from proxy_vllm.validate import validate_trio


class ProxyLLM(LLM):
    """Offline inference with a proxy-tuned model.

    Takes every argument of ``vllm.LLM`` and answers ``generate``, ``chat``, ``beam_search`` and the
    rest alike. A request says its own strength with
    ``SamplingParams(extra_args={"proxy_alpha": 0.5})``.

    Args:
        model: the large base model, folder or hub name.
        expert: the small tuned model.
        antiexpert: the small model as it was before it was tuned.
        alpha: strength of requests that name none; 0 is the base alone.
        alpha_range: lowest and highest ``proxy_alpha`` that a request may ask for.
        expert_args, antiexpert_args: ``vllm.config.ModelConfig`` fields of one member alone.
        allow_tokenizer_mismatch: serve members whose tokenizers disagree on a token id.
        fused_head_max_batch: see ``proxy_vllm.config.ProxyConfig``.
        speculative_tokens: draft this many tokens a step with the expert.
        **kwargs: any argument of ``vllm.LLM``.

    Raises:
        UserError: members that do not fit together or cannot be read; the message says which.

    Example:
        >>> from proxy_vllm import ProxyLLM
        >>> from proxy_vllm.demo import model_path
        >>> llm = ProxyLLM(model=str(model_path("base")), expert=str(model_path("expert")),
        ...                antiexpert=str(model_path("antiexpert")), dtype="float32")
        >>> llm.generate(["Hello"])[0].outputs[0].text
    """

    def __init__(
        self,
        model: str,
        *,
        expert: str,
        antiexpert: str,
        alpha: float = 1.0,
        alpha_range: tuple[float, float] = (-10.0, 10.0),
        expert_args: dict[str, Any] | None = None,
        antiexpert_args: dict[str, Any] | None = None,
        allow_tokenizer_mismatch: bool = False,
        fused_head_max_batch: int = 0,
        speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_vllm_version()
        register()
        self.proxy_config = ProxyConfig(
            expert=str(expert),
            antiexpert=str(antiexpert),
            alpha=alpha,
            alpha_range=alpha_range,
            expert_args=expert_args or {},
            antiexpert_args=antiexpert_args or {},
            allow_tokenizer_mismatch=allow_tokenizer_mismatch,
            fused_head_max_batch=fused_head_max_batch,
        )
        kwargs = validate_trio(
            {**kwargs, "model": str(model)},
            self.proxy_config,
            speculative_tokens=speculative_tokens,
        )
        kwargs = apply_to_engine_args(
            kwargs, self.proxy_config, speculative_tokens=speculative_tokens
        )
        super().__init__(**kwargs)

    def _add_request(self, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
        admit(self.proxy_config, params)
        return super()._add_request(prompt, params, *args, **kwargs)
