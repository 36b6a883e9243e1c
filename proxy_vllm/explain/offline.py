"""Explained answers of an offline engine, and what they show as a whole."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ROLES
from proxy_vllm.explain.request import EXPLAIN_KEY, TOP_KEY
from proxy_vllm.explain.tokens import TokenExplanation

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

    from proxy_vllm.llm import ProxyLLM

# Tokens that the totals name.
_NAMED = 20


@dataclass(frozen=True)
class Explanation:
    """One answer, token by token.

    Args:
        id: of the request: its place among the prompts, from 0, or what a file calls it.
        prompt: as the base read it.
        text: of the answer.
        alpha: the strength that it was steered by.
        tokens: of the answer, its end token included.
        lora: the adapter that was the expert, if one was.
    """

    id: str | int
    prompt: str
    text: str
    alpha: float
    finish_reason: str | None
    tokens: tuple[TokenExplanation, ...]
    lora: str | None = None

    @property
    def changed(self) -> int:
        """How many tokens stand where steering changed which one comes first."""
        return sum(token.changed for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """One line of ``proxy-vllm explain --json``."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "text": self.text,
            "proxy_alpha": self.alpha,
            **({"lora": self.lora} if self.lora is not None else {}),
            "finish_reason": self.finish_reason,
            "completion_tokens": len(self.tokens),
            "changed": self.changed,
            EXPLAIN_KEY: [token.to_dict() for token in self.tokens],
        }


@dataclass(frozen=True)
class Raised:
    """How steering moved one token wherever it stands in the answers.

    Args:
        count: how often it stands there.
        changed: how often steering put it first in the place of another.
        mean_raise: of its probability, from the base to the steered model.
    """

    token: str
    token_id: int
    count: int
    changed: int
    mean_raise: float


@dataclass(frozen=True)
class Totals:
    """What steering did in many answers.

    Args:
        raised: the tokens whose probability was raised most in sum, from the most on.
        replaced: texts of the base's first choices that steering put another before, and how often.
    """

    answers: int
    tokens: int
    changed: int
    raised: list[Raised] = field(default_factory=list)
    replaced: list[tuple[str, int]] = field(default_factory=list)

    @property
    def share_changed(self) -> float:
        return self.changed / self.tokens if self.tokens else 0.0


def totals(explained: Iterable[Explanation]) -> Totals:
    """Count over answers which tokens steering chose and raised."""
    answers = 0
    standing: dict[int, list[TokenExplanation]] = defaultdict(list)
    replaced: Counter[str] = Counter()
    for explanation in explained:
        answers += 1
        for token in explanation.tokens:
            standing[token.chosen.token_id].append(token)
            if token.changed:
                replaced.update(c.token for c in token.top if c.token_id == token.base_choice)
    raised = [
        Raised(
            token=tokens[0].chosen.token,
            token_id=token_id,
            count=len(tokens),
            changed=sum(t.changed and t.steered_choice == token_id for t in tokens),
            mean_raise=sum(map(_raise, tokens)) / len(tokens),
        )
        for token_id, tokens in standing.items()
    ]
    raised.sort(key=lambda found: -found.mean_raise * found.count)
    every = [token for tokens in standing.values() for token in tokens]
    return Totals(
        answers=answers,
        tokens=len(every),
        changed=sum(token.changed for token in every),
        raised=[found for found in raised[:_NAMED] if found.mean_raise > 0],
        replaced=replaced.most_common(_NAMED),
    )


def _raise(token: TokenExplanation) -> float:
    """By how much the chosen token's probability is larger than in the base."""
    steered, base = (
        0.0 if value is None else exp(value) for value in (token.chosen.steered, token.chosen.base)
    )
    return steered - base


def asking(params: "SamplingParams", top: int) -> "SamplingParams":
    """A copy of sampling parameters that asks for explanations."""
    params = copy(params)
    params.extra_args = {**(params.extra_args or {}), EXPLAIN_KEY: True, TOP_KEY: top}
    return params


def explain(
    llm: "ProxyLLM",
    prompts: Sequence[Any],
    params: "Sequence[SamplingParams]",
    *,
    top: int,
    use_tqdm: bool = True,
    arguments: Sequence[dict[str, Any]] | None = None,
    ids: Sequence[str | int] | None = None,
) -> list[Explanation]:
    """Answer prompts and explain the answers in one pass.

    Args:
        prompts: each as for ``ProxyLLM.generate``, or the messages of a chat.
        params: of each prompt.
        top: how many of the likeliest tokens to show.
        arguments: more of ``ProxyLLM.enqueue`` or ``enqueue_chat``, for each prompt.
        ids: of each prompt; its place if not given.
    """
    entered: list[str] = []
    try:
        for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            more: dict[str, Any] = {"use_tqdm": False, **(arguments[i] if arguments else {})}
            if _is_chat(prompt):
                entered += llm.enqueue_chat([prompt], [asking(own, top)], **more)
            else:
                entered += llm.enqueue([_as_prompt(prompt)], [asking(own, top)], **more)
    except BaseException:
        llm.llm_engine.abort_request(entered)
        raise
    outputs = llm.wait_for_completion(use_tqdm=use_tqdm)
    names = range(len(outputs)) if ids is None else ids
    return [
        explained
        for name, output, own in zip(names, outputs, params, strict=True)
        for explained in _of_output(llm, name, output, own)
    ]


def _of_output(
    llm: "ProxyLLM", name: str | int, output: "RequestOutput", params: "SamplingParams"
) -> list[Explanation]:
    from proxy_vllm.explain.front_end import explanations  # needs vLLM, and pages do not

    prompt = output.prompt
    if prompt is None and llm.llm_engine.renderer.tokenizer is not None:
        prompt = llm.get_tokenizer().decode(output.prompt_token_ids)
    alpha = llm.proxy_config.alpha_of(params.extra_args)
    return [
        Explanation(
            id=name,
            prompt=prompt or "",
            text=answer.text,
            alpha=alpha,
            finish_reason=answer.finish_reason,
            tokens=tuple(explanations(answer)),
            lora=output.lora_request.lora_name if output.lora_request else None,
        )
        for answer in output.outputs
    ]


def is_single(prompts: Any) -> bool:
    """Whether what stands for prompts is one prompt."""
    if isinstance(prompts, (str, dict)):
        return True
    return bool(prompts) and (isinstance(prompts[0], int) or _is_chat(prompts))


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and isinstance(prompt[0], dict)
        and "role" in prompt[0]
        and prompt[0].keys().isdisjoint(ROLES)
    )


def _as_prompt(prompt: Any) -> Any:
    return {"prompt_token_ids": list(prompt)} if isinstance(prompt, (list, tuple)) else prompt
