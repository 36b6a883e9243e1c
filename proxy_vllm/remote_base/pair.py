"""The local pair: its shift after some tokens, from an engine whose base is the antiexpert.

With ``base = antiexpert`` the formula gives the antiexpert itself at alpha 0, and the expert at
alpha 1. Two requests for one token with the log-probabilities of the whole vocabulary are both
members' rows; the engine's prefix cache makes the next ones cost little more than a token each.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from proxy_vllm.config import ALPHA_KEY

_PREFIX = "proxy-pair-"
_EXPERT, _ANTIEXPERT = 1.0, 0.0  # as alpha


class LocalPair:
    """Rows of the pair, asked of an engine core.

    Args:
        vocab_size: of the pair, V.
        send: hands a request to the engine core.
        abort: takes requests back, by their ids.
    """

    def __init__(
        self,
        vocab_size: int,
        send: Callable[[EngineCoreRequest], Any],
        abort: Callable[[list[str]], Any],
    ) -> None:
        self.vocab_size = vocab_size
        self._send, self._abort = send, abort
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._received: dict[str, list[EngineCoreOutput]] = {}
        self._numbers = itertools.count()

    async def shift(self, ids: Sequence[int], alpha: float) -> np.ndarray:  # [V] float64
        """``alpha * (expert - antiexpert)`` after the tokens ``ids``, up to a constant.

        A token that either member rules out has ``-inf``.
        """
        if alpha == 0:
            return np.zeros(self.vocab_size)
        expert, antiexpert = await asyncio.gather(
            self._row(ids, _EXPERT), self._row(ids, _ANTIEXPERT)
        )
        with np.errstate(invalid="ignore"):
            shift = alpha * (expert - antiexpert)
        shift[~np.isfinite(shift)] = -np.inf
        return shift

    async def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """The expert's own greedy continuation of ``ids`` by ``count`` tokens."""
        params = _params(_EXPERT, max_tokens=count)
        return [token for o in await self._run(ids, params) for token in o.new_token_ids]

    async def _row(self, ids: Sequence[int], alpha: float) -> np.ndarray:  # [V] float64
        (output,) = await self._run(ids, _params(alpha, max_tokens=1, logprobs=-1))
        assert output.new_logprobs is not None
        row = np.full(self.vocab_size, -np.inf)
        row[output.new_logprobs.logprob_token_ids[0]] = output.new_logprobs.logprobs[0]
        return row

    async def _run(self, ids: Sequence[int], params: SamplingParams) -> list[EngineCoreOutput]:
        request_id = f"{_PREFIX}{next(self._numbers)}"
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=list(ids),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        future = asyncio.get_running_loop().create_future()
        self._waiting[request_id], self._received[request_id] = future, []
        self._send(request)
        try:
            await future
            return self._received[request_id]
        except asyncio.CancelledError:
            self._abort([request_id])
            raise
        finally:
            del self._waiting[request_id], self._received[request_id]

    def take(self, outputs: list[EngineCoreOutput]) -> None:
        """Hand results of the engine core to those who wait; runs on their event loop."""
        for output in outputs:
            future = self._waiting.get(output.request_id)
            if future is None or future.done():
                continue
            self._received[output.request_id].append(output)
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                future.set_exception(RuntimeError("the local pair could not be run"))
            elif output.finish_reason is not None:
                future.set_result(None)

    def fail(self, error: BaseException) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


def _params(alpha: float, **more: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, ignore_eos=True, detokenize=False, extra_args={ALPHA_KEY: alpha}, **more
    )
