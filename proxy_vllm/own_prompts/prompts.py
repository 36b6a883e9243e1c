"""Each model its own prompt: what such a request is, and what an engine must be to run it.

The request that vLLM's scheduler sees is as long as the longest of the three prompts, ``L``. A
model whose prompt has ``n`` tokens is ``pad = L - n`` behind: engine position ``p`` is its position
``p - pad``, and it stores its token ``s`` in slot ``s`` of the request's block list.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Keys of `SamplingParams.extra_args`, and over HTTP of `vllm_xargs`.
PROMPT_KEYS = {"expert": "proxy_expert_prompt", "antiexpert": "proxy_antiexpert_prompt"}
# The antiexpert's prompt by the name that it has in classifier-free guidance.
NEGATIVE_KEY = "proxy_negative_prompt"
# By any of these a request has a prompt of a small member's own.
OWN_PROMPT_KEYS = (NEGATIVE_KEY, *PROMPT_KEYS.values())
# What the scheduler tells the workers: the length of the base's prompt, the other two prompts.
RESOLVED_KEY = "proxy_own_prompts"

SCHEDULER = "proxy_vllm.own_prompts.scheduler.make_scheduler"


@dataclass(frozen=True)
class OwnPrompts:
    """Token ids of one request's three prompts."""

    base: tuple[int, ...]
    expert: tuple[int, ...]
    antiexpert: tuple[int, ...]

    @classmethod
    def of(cls, base: list[int], extra_args: dict[str, Any] | None) -> "OwnPrompts | None":
        """The prompts of a request, or None where all three models read the base's.

        Args:
            base: token ids of the base's prompt.
            extra_args: of the request; its prompts are lists of token ids.

        Raises:
            UserError: a prompt that is not a list of token ids, or is empty.
        """
        extra_args = extra_args or {}
        prompts = {"base": tuple(base)}
        for role, key in PROMPT_KEYS.items():
            value = extra_args.get(key)
            prompts[role] = prompts["base"] if value is None else tuple(check_ids(key, value))
        if prompts["expert"] == prompts["antiexpert"] == prompts["base"]:
            return None
        return cls(**prompts)

    def of_role(self, role: str) -> tuple[int, ...]:
        return getattr(self, role)

    @property
    def length(self) -> int:
        """``L``: how many tokens the scheduler sees."""
        return max(len(self.of_role(role)) for role in ROLES)

    @property
    def pads(self) -> tuple[int, int, int]:
        """How far each model is behind the scheduler's count."""
        length = self.length
        return tuple(length - len(self.of_role(role)) for role in ROLES)  # type: ignore[return-value]

    def padded_base(self) -> list[int]:
        """``L`` tokens that end in the base's prompt.

        The padding repeats a token of that prompt: penalties look at which tokens the prompt
        holds, and so they find the same ones.
        """
        return [self.base[0]] * (self.length - len(self.base)) + list(self.base)

    def to_worker(self) -> list[Any]:
        return [len(self.base), list(self.expert), list(self.antiexpert)]

    @classmethod
    def from_worker(cls, padded_base: list[int], data: list[Any]) -> "OwnPrompts":
        n_base, expert, antiexpert = data
        return cls(tuple(padded_base[-n_base:]), tuple(expert), tuple(antiexpert))


def check_ids(name: str, value: Any) -> list[int]:
    """Return ``value`` if it is a non-empty list of token ids, else raise ``UserError``."""
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    ):
        raise UserError(f"{name} is no list of token ids, and no text")
    if not value:
        raise UserError(f"{name} is empty: a prompt needs at least one token")
    return list(value)


def names_own_prompts(extra_args: Any) -> bool:
    return isinstance(extra_args, dict) and any(key in extra_args for key in OWN_PROMPT_KEYS)


def check_parameters(params: Any, guided: bool = False) -> None:
    """Refuse what a request with own prompts cannot ask for.

    Args:
        params: sampling parameters, or what has some of their fields. ``echoed_logprobs`` is set
            where an echo over HTTP asks for ``prompt_logprobs``.
        guided: whether the second prompt is that of classifier-free guidance, which all have.
    """
    names = {"echoed_logprobs": "echo, which asks for prompt_logprobs,"}
    for name in ("prompt_logprobs", "prompt_logprob_token_ids", "echoed_logprobs"):
        if getattr(params, name, None) is not None:
            why = "own prompts: the three models read different prompts"
            way_out = "leave it out, or give all models one prompt"
            if guided:
                why = "--method cfg: the base reads two prompts"
                way_out = "leave it out"
            raise UserError(
                f"{names.get(name, name)} with {why}, so a prompt position has no combined logits;"
                f" {way_out}"
            )


def check_tokenization(options: Any) -> None:
    """Refuse what would cut the base's prompt and none of the others."""
    if (options or {}).get("truncate_prompt_tokens") is not None:
        raise UserError(
            "truncate_prompt_tokens would cut the base's prompt and none of the others: shorten the"
            " prompts, or give all models one prompt"
        )


def unsupported_reason(vllm_config: "VllmConfig") -> str | None:
    """Why an engine cannot run own prompts, with the way out; None if it can."""
    from vllm import envs
    from vllm.config.compilation import CompilationMode

    parallel = vllm_config.parallel_config
    if not vllm_config.use_v2_model_runner:
        return (
            "they need vLLM's Model Runner V2: run on a GPU, or set PROXY_VLLM_CPU_RUNNER=v2 for"
            " tests on a CPU"
        )
    if not ProxyConfig.from_vllm_config(vllm_config).takes_own_prompts:
        return "start the engine with own_prompts=True (--own-prompts)"
    found = {
        "--speculative-config": (
            vllm_config.speculative_config is not None
            and not ProxyConfig.from_vllm_config(vllm_config).expert_drafts
        ),
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "microbatches (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--scheduler-cls": vllm_config.scheduler_config.scheduler_cls != SCHEDULER,
        "VLLM_USE_BREAKABLE_CUDAGRAPH": bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH),
        "compilation mode STOCK_TORCH_COMPILE": (
            vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE
        ),
    }
    for name, present in found.items():
        if present:
            return f"this engine runs with {name}, which excludes them: start it without"
    return None
