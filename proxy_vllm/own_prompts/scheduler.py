"""vLLM's scheduler for requests whose three models read different prompts (see prompts.py).

Such a request becomes one of the longest prompt's length here, behind the front end: usage, echo
and the prompt in the output stay those of the base. Blocks of its KV cache are keyed by all three
prompts.
"""

import copy
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from proxy_vllm.config import ROLES
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.member_prompts import MemberPrompts
from proxy_vllm.own_prompts.prompts import (
    PROMPT_KEYS,
    RESOLVED_KEY,
    OwnPrompts,
    check_parameters,
    names_own_prompts,
    unsupported_reason,
)
from proxy_vllm.spec_decode.scheduler import DraftingScheduler

logger = init_logger(f"vllm.{__name__}")


class ProxyScheduler(DraftingScheduler):
    """vLLM's scheduler, taking requests with own prompts; every other passes untouched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_prompts_unsupported = unsupported_reason(self.vllm_config)
        self.member_prompts = MemberPrompts(self.vllm_config)
        self._guided = self.member_prompts.proxy.guided
        if self.own_prompts_unsupported is None:
            _ = self.member_prompts.configs  # read now, and not while requests run
        # Base's padding of each request with own prompts that has not been scheduled yet.
        self._base_pads: dict[str, int] = {}
        self._refused: set[str] = set()

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if self._guided and params is not None and request.prompt_token_ids:
            params = request.sampling_params = _with_negative_prompt(
                params, request.prompt_token_ids
            )
        extra_args = params.extra_args if params is not None else None
        if extra_args and (names_own_prompts(extra_args) or RESOLVED_KEY in extra_args):
            try:
                self._take_own_prompts(request)
            except UserError as error:
                # Admission refuses such requests. One that came past it must not harm others, nor
                # answer from prompts that it did not name: it runs one step and reports an error.
                logger.error("request %s: %s", request.request_id, error)
                request.max_tokens = 1
                self._refused.add(request.request_id)
        super().add_request(request)

    def _take_own_prompts(self, request: Request) -> None:
        params = copy.copy(request.sampling_params)  # children of one request share theirs
        assert params is not None and params.extra_args is not None
        extra_args = dict(params.extra_args)
        extra_args.pop(RESOLVED_KEY, None)
        named = {key: extra_args.pop(key, None) for key in PROMPT_KEYS.values()}
        params.extra_args = extra_args
        request.sampling_params = params
        if request.prompt_token_ids is None or request.resumable:
            raise UserError("own prompts need a base prompt of token ids, all at once")
        own = OwnPrompts.of(request.prompt_token_ids, named)
        if own is None:
            return
        if self.own_prompts_unsupported:
            raise UserError(f"own prompts: {self.own_prompts_unsupported}")
        check_parameters(params, self._guided)
        for role, key in PROMPT_KEYS.items():
            if named[key] is not None:
                self.member_prompts.check(role, own.of_role(role))
        extra_args[RESOLVED_KEY] = own.to_worker()

        padded = own.padded_base()
        request.prompt_token_ids = padded
        request.num_prompt_tokens = len(padded)
        request._all_token_ids[:] = padded
        if request._block_hasher is not None:
            request.block_hashes.clear()
            hash_fn = get_hash_fn_by_name(self.vllm_config.cache_config.prefix_caching_hash_algo)
            request._block_hasher = own_block_hasher(own, self.hash_block_size, hash_fn)
            request.update_block_hashes()
        if own.pads[0]:
            self._base_pads[request.request_id] = own.pads[0]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if self._base_pads:
            for data in output.scheduled_new_reqs:
                self._count_for_base(data.req_id)
        return output

    def _count_for_base(self, request_id: str) -> None:
        """Report cached and computed prompt tokens as the base counts them."""
        pad = self._base_pads.pop(request_id, 0)
        stats = self.requests[request_id].prefill_stats
        if pad and stats is not None:
            stats.set(
                num_prompt_tokens=stats.num_prompt_tokens - pad,
                num_local_cached_tokens=max(0, stats.num_local_cached_tokens - pad),
                num_external_cached_tokens=0,
            )

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        refused = set(self._refused)  # before it is emptied, as requests finish
        outputs = super().update_from_output(*args, **kwargs)
        if refused:
            for output in (o for group in outputs.values() for o in group.outputs):
                if output.request_id in refused:
                    output.new_token_ids = []
                    output.finish_reason = FinishReason.ERROR
        return outputs

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._base_pads.pop(request.request_id, None)
        self._refused.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)


def _with_negative_prompt(params: SamplingParams, prompt: list[int]) -> SamplingParams:
    """A request that names none is guided away from its prompt's last token alone.

    So Sanchez et al. 2023 (section 3) have it: the unconditional model still has to see something.
    """
    if (params.extra_args or {}).get(PROMPT_KEYS["antiexpert"]) is not None:
        return params
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), PROMPT_KEYS["antiexpert"]: prompt[-1:]}
    return params


class ProxyAsyncScheduler(ProxyScheduler, AsyncScheduler):
    """The same on top of vLLM's asynchronous scheduler."""


def make_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls as its scheduler class: it settles late whether it schedules ahead."""
    cls = ProxyAsyncScheduler if vllm_config.scheduler_config.async_scheduling else ProxyScheduler
    return cls(vllm_config=vllm_config, **kwargs)


def own_block_hasher(
    own: OwnPrompts, block_size: int, hash_fn: Callable[[Any], bytes]
) -> Callable[[Request], list[BlockHash]]:
    """The hashes of a request's full blocks that are not computed yet, as vLLM's own hasher.

    The scheduler takes block ``k`` for full at ``(k + 1) * block_size`` tokens. A model that is
    ``pad`` behind writes its last ``pad`` slots later, and so does every request that reuses the
    block. They write the same values as long as the block holds prompt tokens alone, all three
    models' tokens are in the key, and the pads agree. A block that will hold generated tokens of a
    model that is behind belongs to its request alone.
    """
    prompts = [own.of_role(role) for role in ROLES]
    pads = own.pads
    behind = any(pads)
    shared_until = min(map(len, prompts))
    secret = uuid.uuid4().hex  # a request id may return

    def hash_blocks(request: Request) -> list[BlockHash]:
        hashes: list[BlockHash] = []
        previous = request.block_hashes[-1] if request.block_hashes else None
        first = len(request.block_hashes)
        for start in range(
            first * block_size, request.num_tokens // block_size * block_size, block_size
        ):
            end = start + block_size
            keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            extra: list[Any] = [*(keys or ())]
            if start == 0:
                extra.append(("proxy_pads", pads))
            if behind and end > shared_until:
                tokens: Sequence[int] = request.all_token_ids[start:end]
                extra.append(("proxy_request", secret))
            else:
                common = request.all_token_ids
                tokens, *others = (
                    (*ids[start:end], *common[max(start, len(ids)) : end]) for ids in prompts
                )
                extra.append(("proxy_prompts", *others))
            previous = hash_block_tokens(hash_fn, previous, tokens, tuple(extra))
            hashes.append(previous)
        return hashes

    return hash_blocks
