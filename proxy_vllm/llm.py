"""``ProxyLLM``: ``vllm.LLM`` over a base steered by an expert and an antiexpert."""

from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from proxy_vllm.adapters.check import AdapterRules
from proxy_vllm.adapters.settings import requests_of, rules_of_engine
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.engine_args import prepare_engine_args
from proxy_vllm.errors import UserError
from proxy_vllm.explain.front_end import let_explain
from proxy_vllm.explain.offline import Explanation, explain, is_single
from proxy_vllm.explain.request import DEFAULT_TOP, check_engine, check_parameters
from proxy_vllm.methods import method_fields
from proxy_vllm.own_prompts.chat_templates import resolve_template
from proxy_vllm.own_prompts.member_prompts import INPUT_KEY, MemberPrompts, check_messages
from proxy_vllm.own_prompts.prompts import check_tokenization
from proxy_vllm.remote_base.settings import RemoteBase
from proxy_vllm.request_keys import refuse_misspelled
from proxy_vllm.spec_decode.admission import admit_every_parameter
from proxy_vllm.surface.member import token_ids


class ProxyLLM(LLM):
    """Offline inference with a proxy-tuned model.

    Takes every argument of ``vllm.LLM`` and answers ``generate``, ``chat``, ``beam_search`` and the
    rest alike. A request says its own strength with
    ``SamplingParams(extra_args={"proxy_alpha": 0.5})``; ``beam_search`` has the engine's.

    With ``own_prompts`` a prompt may be ``{"base": ..., "expert": ..., "antiexpert": ...}``,
    each text or token ids; a member without one reads the base's. Answers are appended to all
    three alike, and outputs hold the base's prompt. ``beam_search`` refuses such prompts.

    Args:
        model: the large base model, folder or hub name.
        expert: the small tuned model. With ``enable_lora`` it may be left out: the expert is then
            the antiexpert plus the adapter of a request's ``lora_request``, and a request without
            one gets the base's answer.
        antiexpert: the small model as it was before it was tuned.
        method: the formula, a key of ``proxy_vllm.methods.METHODS``. ``"contrastive"`` takes the
            base for the expert, ``"dera"`` for the antiexpert and ``"cfg"`` for both; what is the
            base is left out.
        alpha: strength of requests that name none; 0 is the base alone. None: the method's own.
        beta: plausibility threshold of requests that name no ``proxy_beta``: tokens to which the
            base gives less than this share of its largest probability are never drawn. None: the
            method's own, which is 0, off, but for ``"contrastive"``.
        alpha_range: lowest and highest ``proxy_alpha`` that a request may ask for.
        expert_args, antiexpert_args: ``vllm.config.ModelConfig`` fields of one member alone.
        allow_tokenizer_mismatch: serve members whose tokenizers disagree on a token id.
        tokenizer_map: see ``proxy_vllm.config.ProxyConfig``.
        stop_tokens: whose end tokens end an answer: ``"expert"``, ``"base"`` or ``"both"``.
        own_prompts: let requests give each model a prompt of its own.
        fused_head_max_batch, sampler_cuda_graphs, kv_cache_tables: see
            ``proxy_vllm.config.ProxyConfig``.
        speculative_tokens: draft this many tokens a step with the expert, or ``"auto"``.
        base_chat_template, expert_chat_template, antiexpert_chat_template: how each member reads a
            ``chat``: ``"auto"`` (its tokenizer's own template), ``"plain"``, ``"llama-2"``,
            ``"llama-2-paper"``, a file, or Jinja (see own_prompts/chat_templates.py). The base's
            is the expert's own by default, if it has one, and a small member without one reads
            the base's prompt.
        base_url, base_model: in place of ``model``: an OpenAI-compatible endpoint that reports
            log-probabilities, and the base's name there (docs/remote_base.md). Its key is
            ``PROXY_VLLM_BASE_API_KEY`` in the environment.
        lora_modules: LoRA adapters by name, checked before anything is loaded (with
            ``enable_lora``; docs/adapters.md). ``adapters`` has a ``LoRARequest`` of each.
        base_args: more fields of ``proxy_vllm.remote_base.settings.RemoteBase``.
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
        model: str | None = None,
        *,
        expert: str | None = None,
        antiexpert: str | None = None,
        method: str = "proxy",
        alpha: float | None = None,
        beta: float | None = None,
        alpha_range: tuple[float, float] = (-10.0, 10.0),
        expert_args: dict[str, Any] | None = None,
        antiexpert_args: dict[str, Any] | None = None,
        allow_tokenizer_mismatch: bool = False,
        tokenizer_map: dict[str, dict[int, int]] | None = None,
        stop_tokens: str = "both",
        own_prompts: bool = False,
        fused_head_max_batch: int = 0,
        sampler_cuda_graphs: bool = False,
        kv_cache_tables: str = "auto",
        speculative_tokens: int | str | None = None,
        base_chat_template: str | None = None,
        expert_chat_template: str | None = None,
        antiexpert_chat_template: str | None = None,
        base_url: str | None = None,
        base_model: str | None = None,
        base_args: dict[str, Any] | None = None,
        lora_modules: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        remote_base = None
        if base_url is not None:
            if model is not None:
                raise UserError(f"model {model!r} and base_url: give one of them")
            remote_base = RemoteBase(base_url, base_model or "", **(base_args or {}))
        elif model is None:
            raise UserError("a base is needed: model, or base_url with base_model")
        adapters = not expert and bool(kwargs.get("enable_lora"))
        self.proxy_config = ProxyConfig(
            **method_fields(method, expert, antiexpert, alpha, beta, adapters),
            alpha_range=alpha_range,
            expert_args=expert_args or {},
            antiexpert_args=antiexpert_args or {},
            allow_tokenizer_mismatch=allow_tokenizer_mismatch,
            tokenizer_map=tokenizer_map or {},
            expert_chat_template=resolve_template("expert", expert_chat_template),
            antiexpert_chat_template=resolve_template("antiexpert", antiexpert_chat_template),
            stop_tokens=stop_tokens,
            own_prompts=own_prompts,
            fused_head_max_batch=fused_head_max_batch,
            sampler_cuda_graphs=sampler_cuda_graphs,
            kv_cache_tables=kv_cache_tables,
            speculative_tokens=speculative_tokens,
            remote_base=remote_base,
            adapters=adapters,
        )
        kwargs = prepare_engine_args(
            {
                **kwargs,
                "model": str(antiexpert if model is None else model),
                "lora_modules": lora_modules,
            },
            self.proxy_config,
            base_chat_template=base_chat_template,
        )
        del kwargs["lora_modules"]
        super().__init__(**kwargs)
        self.adapters = requests_of(lora_modules or {})
        self._adapter_rules: AdapterRules | None = None
        self._known_adapters: set[tuple[int, str]] = set()
        if remote_base is not None:
            self._steer_remote_base()

        admit_every_parameter(self.llm_engine)
        self.member_prompts = MemberPrompts(self.llm_engine.vllm_config)
        generation = self.model_config.try_get_generation_config()
        self._other_ends = set(token_ids(generation.get("eos_token_id")))
        self._other_ends.discard(self.renderer.get_eos_token_id())

    def explain(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        top: int = DEFAULT_TOP,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[Explanation]:
        """Answer prompts, and say for each token what steering did (docs/explain.md).

        Args:
            prompts: one or several, each as for ``generate`` (with ``own_prompts`` one for each
                model), or the messages of a chat.
            sampling_params: for all, or one for each; the model's defaults if not given.
            top: how many of the likeliest tokens of the steered model and of the base to show.
            lora_request: the adapter that is the expert, for all or one for each prompt.

        Returns:
            An explanation for each answer, in the order of the prompts.
        """
        if is_single(prompts):
            prompts = [prompts]
        params = sampling_params
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(params)} sampling_params")
        adapters = lora_request if isinstance(lora_request, Sequence) else None
        if adapters is not None and len(adapters) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(adapters)} of lora_request")
        arguments = [{"lora_request": a} for a in adapters or [lora_request] * len(prompts)]
        return explain(self, prompts, params, top=top, use_tqdm=use_tqdm, arguments=arguments)

    def _steer_remote_base(self) -> None:
        from proxy_vllm.remote_base.engine_core import SteeredCore
        from proxy_vllm.remote_base.start import endpoint_of

        engine: Any = self.llm_engine
        endpoint = endpoint_of(engine.vllm_config)
        states = engine.output_processor.request_states
        engine.engine_core = SteeredCore(engine.engine_core, engine.vllm_config, endpoint, states)

    def _beam_search_step(  # type: ignore[override]  # vLLM calls it by keyword
        self,
        *,
        instances_batch: list[Any],
        beam_width: int,
        ignore_eos: bool,
        **kwargs: Any,
    ) -> bool:
        """One token for each beam, ended by every end token.

        vLLM ends a beam at the tokenizer's own end token alone. The others are taken out here, from
        so many beams that ``beam_width`` of them are left, as vLLM takes out its own.
        """
        ends = set() if ignore_eos else self._other_ends
        if self.proxy_config.guided:
            raise UserError("--method cfg: beam_search reads no negative prompt; use generate")
        room = len(ends) * max((len(instance.beams) for instance in instances_batch), default=0)
        stopped = super()._beam_search_step(
            instances_batch=instances_batch,
            beam_width=beam_width + room,
            ignore_eos=ignore_eos,
            **kwargs,
        )
        if room:
            for instance in instances_batch:
                ended = [beam for beam in instance.beams if beam.tokens[-1] in ends]
                going = [beam for beam in instance.beams if beam.tokens[-1] not in ends]
                instance.completed.extend(ended)
                instance.beams = going[:beam_width]
        return stopped

    def _preprocess_cmpl(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        # `_preprocess_cmpl_one` takes them apart first; what comes here directly would lose them.
        if any(_is_own(prompt) for prompt in prompts):
            raise UserError(
                "a prompt for each model is for generate and chat: beam_search and the like read"
                " one prompt; use generate, with n answers for several"
            )
        return super()._preprocess_cmpl(prompts, *args, **kwargs)

    def _preprocess_cmpl_one(
        self, prompt: Any, tokenization_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        own = None
        if _is_own(prompt):
            check_tokenization(tokenization_kwargs)
            special = (tokenization_kwargs or {}).get("add_special_tokens", True)
            own = self.member_prompts.of_prompt(prompt, special)
            prompt = prompt["base"]
            if isinstance(prompt, (list, tuple)):
                prompt = {"prompt_token_ids": list(prompt)}
        return self._carry(super()._preprocess_cmpl_one(prompt, tokenization_kwargs, **kwargs), own)

    def _preprocess_chat_one(self, conversation: Any, **kwargs: Any) -> Any:
        check_messages(conversation)
        own = None
        if self.member_prompts.has_templates:
            check_tokenization(kwargs.get("tokenization_kwargs"))
            own = self.member_prompts.of_chat(
                conversation,
                {
                    **(kwargs.get("chat_template_kwargs") or {}),
                    "add_generation_prompt": kwargs.get("add_generation_prompt", True),
                    "continue_final_message": kwargs.get("continue_final_message", False),
                },
                tools=kwargs.get("tools"),
            )
        return self._carry(super()._preprocess_chat_one(conversation, **kwargs), own)

    def _carry(self, engine_input: Any, own: dict[str, list[int]] | None) -> Any:
        """Let an engine's input carry the small members' prompts to where parameters are."""
        if own:
            # Here, since vLLM's refusal of a long prompt names no member.
            self.member_prompts.check("base", engine_input["prompt_token_ids"])
            engine_input[INPUT_KEY] = own
        return engine_input

    def _add_request(
        self, prompt: Any, params: Any, lora_request: Any = None, *args: Any, **kwargs: Any
    ) -> str:
        self.proxy_config.check_request(params)
        self._check_adapter(lora_request)
        refuse_misspelled(getattr(params, "extra_args", None) or ())
        if check_parameters(params):
            check_engine(self.llm_engine.vllm_config)
            let_explain(self.llm_engine, self.proxy_config)
        own = prompt.pop(INPUT_KEY, None) if isinstance(prompt, dict) else None
        params = self.member_prompts.add_to(params, own)
        return super()._add_request(prompt, params, lora_request, *args, **kwargs)

    def _check_adapter(self, lora_request: Any) -> None:
        """Refuse an adapter that cannot run: found in a step, it would end the engine."""
        config = self.llm_engine.vllm_config
        if lora_request is None or config.lora_config is None:
            return  # vLLM refuses adapters of an engine that takes none
        key = (lora_request.lora_int_id, lora_request.lora_path)
        if key in self._known_adapters and not lora_request.load_inplace:
            return
        if self._adapter_rules is None:
            self._adapter_rules = rules_of_engine(config)
        self._adapter_rules.check(lora_request.lora_name, lora_request.lora_path)
        self._known_adapters.add(key)


def _is_own(prompt: Any) -> bool:
    """Whether a prompt is one for each model, by role."""
    return isinstance(prompt, dict) and not prompt.keys().isdisjoint(ROLES)
