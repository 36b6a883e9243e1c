"""The harness's model ``proxy_vllm``: its vLLM model over a base that two small models steer."""

from typing import Any

from lm_eval.api.registry import register_model
from vllm import SamplingParams
from vllm.renderers.hf import resolve_chat_template

from proxy_vllm.config import ALPHA_KEY
from proxy_vllm.errors import UserError
from proxy_vllm.eval.vllm_name import vllm_by_name
from proxy_vllm.llm import ProxyLLM
from proxy_vllm.member_alone import MEMBER_KEY

with vllm_by_name():
    from lm_eval.models.vllm_causallms import VLLM

# What the harness's own vLLM model draws with where a task samples and names no seed.
_SEED = 1234


class GreedyVLLM(VLLM):
    """The harness's vLLM model, greedy where a task names neither ``do_sample`` nor a temperature.

    So the harness documents it; 0.4.13 leaves the temperature out there, and vLLM draws with 1.
    """

    @staticmethod
    def modify_gen_kwargs(
        gen_kwargs: dict[str, Any],
        eos: str | list[str] | None = None,
        default_max_gen_toks: int = 256,
    ) -> tuple[dict[str, Any], list[str], int]:
        if not gen_kwargs.get("do_sample"):
            gen_kwargs = {"temperature": 0.0, **gen_kwargs}
        return VLLM.modify_gen_kwargs(gen_kwargs, eos, default_max_gen_toks)


@register_model("proxy_vllm")
class ProxyVLLM(GreedyVLLM):
    """Scores and generates with a proxy-tuned engine at one ``alpha``, which can be set anew.

    All that asks the engine is the harness's ``VLLM``: batches, log-likelihoods from prompt
    log-probabilities, rolling windows, chat templates, stop strings. Tokenizer and chat template
    are those that users of the engine meet (docs/real_pairs.md).

    Args:
        pretrained: the base, as in every model of the harness.
        expert, antiexpert: the small models.
        alpha: strength of all requests until ``alpha`` is set.
        batch_size, max_length, max_model_len, max_gen_toks, add_bos_token, prefix_token_id,
            truncation_side, enable_thinking, think_end_token, chat_template_args: as in the
            harness's ``vllm``.
        max_batch_size: vLLM's ``max_num_seqs``.
        device: not read; the harness passes it.
        **kwargs: any argument of ``ProxyLLM``, thus of ``vllm.LLM``.

    Raises:
        UserError: members that do not fit together, an alpha out of range, or an argument that a
            proxy-tuned engine cannot honour.
    """

    def __init__(
        self,
        pretrained: str,
        expert: str,
        antiexpert: str,
        alpha: float = 1.0,
        *,
        batch_size: str | int = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_model_len: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation_side: str = "left",
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Not `VLLM.__init__`: it makes a plain `vllm.LLM`. Its attributes are set here, and
        # tests/compat looks whether that is all of them.
        super(VLLM, self).__init__()
        if int(kwargs.pop("data_parallel_size", 1)) > 1:
            raise UserError("data_parallel_size: evaluation runs one engine; leave it out")
        if kwargs.get("lora_local_path"):
            raise UserError("lora_local_path: evaluation runs the members as they are")
        if enable_thinking and think_end_token is None:
            raise UserError("enable_thinking: name think_end_token too, as in the harness's vllm")
        max_model_len = max_model_len if max_model_len is not None else max_length
        if max_batch_size is not None:
            kwargs.setdefault("max_num_seqs", int(max_batch_size))
        kwargs.setdefault("seed", _SEED)
        self.model_args = {"model": pretrained, "max_model_len": max_model_len, **kwargs}
        self.model = ProxyLLM(expert=expert, antiexpert=antiexpert, alpha=alpha, **self.model_args)
        self.alpha = alpha
        self.batch_size = "auto" if "auto" in str(batch_size) else int(batch_size)
        self.tensor_parallel_size = int(kwargs.get("tensor_parallel_size") or 1)
        self.data_parallel_size = 1
        self.lora_request = None
        self._max_length = max_model_len
        self._max_gen_toks = max_gen_toks
        self._config = self.model.model_config.hf_config
        self.tokenizer = self.model.get_tokenizer()
        self.hf_chat_template = resolve_chat_template(
            self.tokenizer, self.model.chat_template, None, model_config=self.model.model_config
        )
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.truncation_side = truncation_side
        self.think_end_token = think_end_token
        self.chat_template_args = dict(chat_template_args or {})
        self.enable_thinking = self.chat_template_args.pop("enable_thinking", enable_thinking)

    @property
    def alpha(self) -> float:
        """Strength of the requests from now on; 0 is the base alone."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = self.model.proxy_config.check_alpha(value, "alpha")
        self.steering: dict[str, Any] = {ALPHA_KEY: self._alpha}

    def ask_alone(self, member: str) -> None:
        """Let one member answer the requests from now on, until ``alpha`` is set."""
        self.steering = {MEMBER_KEY: member}

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        sampling_params: list[SamplingParams] | SamplingParams | None = None,
    ) -> Any:
        if not generate or sampling_params is None:  # as the harness does
            sampling_params = SamplingParams(
                temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False
            )
        if not isinstance(sampling_params, list):
            sampling_params = [sampling_params] * len(requests)
        for params in sampling_params:
            params.extra_args = {**self.steering, **(params.extra_args or {})}
        return super()._model_generate(requests, generate=True, sampling_params=sampling_params)
