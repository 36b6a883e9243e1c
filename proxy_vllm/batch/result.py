"""The answer to one line of a batch: a request's output as JSON."""

from typing import TYPE_CHECKING, Any

from proxy_vllm.batch.request import LORA_KEY, Request
from proxy_vllm.config import ALPHA_KEY
from proxy_vllm.explain.request import EXPLAIN_KEY
from proxy_vllm.member_alone import MEMBER_KEY

if TYPE_CHECKING:
    from vllm import RequestOutput

# vLLM's server answers this where a log-probability is minus infinity, which JSON cannot say.
_LOWEST_LOGPROB = -9999.0


def result_json(request: Request, output: "RequestOutput", *, token_ids: bool) -> dict[str, Any]:
    """The output line of a finished request."""
    from proxy_vllm.explain import explanations

    texts = []
    for completion in output.outputs:
        text: dict[str, Any] = {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
        }
        if len(output.outputs) > 1:
            text["completion_tokens"] = len(completion.token_ids)
        if token_ids:
            text["token_ids"] = list(completion.token_ids)
        if explained := explanations(completion):
            text[EXPLAIN_KEY] = [token.to_dict() for token in explained]
        if completion.logprobs is not None and request.params.num_logprobs is not None:
            text["logprobs"] = [
                {**_logprob(token, position[token]), "top": _ranked(position)}
                for token, position in zip(completion.token_ids, completion.logprobs)
                if position is not None
            ]
        texts.append(text)
    counts: dict[str, Any] = {
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "completion_tokens": sum(len(c.token_ids) for c in output.outputs),
        ALPHA_KEY: request.alpha,
    }
    if member := (request.params.extra_args or {}).get(MEMBER_KEY):
        counts[MEMBER_KEY] = member
    if request.lora is not None:
        counts[LORA_KEY] = request.lora
    if output.prompt_logprobs is not None:
        counts["prompt_logprobs"] = [_ranked(p) if p else None for p in output.prompt_logprobs]
    # What was certified of an answer whose base lives elsewhere.
    if report := (output.kv_transfer_params or {}).get("proxy"):
        counts["proxy"] = report
    if len(texts) > 1:
        return {**request.kept, "id": request.id, "outputs": texts, **counts}
    (text,) = texts
    return {**request.kept, "id": request.id, **text, **counts}


def _logprob(token: int, entry: Any) -> dict[str, Any]:
    value = max(entry.logprob, _LOWEST_LOGPROB)
    return {"token_id": token, "token": entry.decoded_token, "logprob": value}


def _ranked(position: dict[int, Any]) -> list[dict[str, Any]]:
    ranked = sorted(position.items(), key=lambda entry: entry[1].rank or 0)
    return [_logprob(token, entry) for token, entry in ranked]
