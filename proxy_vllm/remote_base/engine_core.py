"""An engine core that steers a base elsewhere, in the place of vLLM's own core client.

vLLM's front ends (``LLMEngine``, ``AsyncLLM``) hand requests to an engine core and read tokens from
it. Here that core is this one: each request becomes a task that asks the endpoint and the local
pair; detokenization, stop strings, streaming, several answers and the HTTP routes stay vLLM's. The
core that vLLM made runs behind it, with the pair's requests alone.
"""

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.remote_base.endpoint import Endpoint
from proxy_vllm.remote_base.pair import LocalPair
from proxy_vllm.remote_base.reports import Report, Reports
from proxy_vllm.remote_base.sampling import check_parameters
from proxy_vllm.remote_base.steering import Choice, Steering
from proxy_vllm.remote_base.usage import BaseUnavailable, Usage, count_in_metrics, counters

logger = init_logger(f"vllm.{__name__}")


class Steersman:
    """Runs requests as tasks of one event loop.

    Args:
        vllm_config: of the local engine.
        endpoint: of the base, probed.
        states: vLLM's state of each request in the front end, by its id.
        send, abort: of the local engine core.
        emit: takes each output of a request.
        fail: takes the id of a request that cannot be answered, and why.
    """

    def __init__(
        self,
        vllm_config: Any,
        endpoint: Endpoint,
        states: Mapping[str, Any],
        *,
        send: Callable[[EngineCoreRequest], Any],
        abort: Callable[[list[str]], Any],
        emit: Callable[[EngineCoreOutput], Any],
        fail: Callable[[str, Exception], Any],
    ) -> None:
        self.proxy = ProxyConfig.from_vllm_config(vllm_config)
        self.max_model_len = vllm_config.model_config.max_model_len
        self.pair = LocalPair(vllm_config.model_config.get_vocab_size(), send, abort)
        self.endpoint, self._emit, self._fail = endpoint, emit, fail
        self._reports = Reports(states, endpoint.guard.price)
        self._tasks: dict[str, asyncio.Task] = {}
        counters()  # on the page of /metrics before there is anything to count

    def start(self, request: EngineCoreRequest) -> None:
        task = asyncio.ensure_future(self._run(request))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    def stop(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if task := self._tasks.get(request_id):
                task.cancel()

    async def _run(self, request: EngineCoreRequest) -> None:
        try:
            await self._answer(request)
        except UserError as error:
            self._fail(request.request_id, VLLMValidationError(str(error)))
        except BaseUnavailable as error:
            logger.warning("Request %s: %s", request.request_id, error)
            self._fail(request.request_id, GracefulHTTPError(str(error), HTTPStatus.BAD_GATEWAY))
        except Exception as error:
            logger.exception("Request %s failed", request.request_id)
            self._fail(request.request_id, error)

    async def _answer(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            raise UserError("a base elsewhere takes prompts of text or token ids, and writes text")
        check_parameters(params)
        alpha = self.proxy.alpha_of(params.extra_args)
        state = Request.from_engine_core_request(request, None)
        steering = Steering(
            self.endpoint,
            lambda ids: self.pair.shift(ids, alpha),
            self.pair.draft if alpha else None,
            params,
            request.prompt_token_ids,
            self.pair.vocab_size,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            end_token=params.eos_token_id,
        )
        room = self.max_model_len - len(request.prompt_token_ids)
        limit = min(room, room if params.max_tokens is None else params.max_tokens)
        try:
            await self._emit_choices(state, steering.choices(limit), steering.usage)
        finally:
            count_in_metrics(steering.usage)

    async def _emit_choices(
        self, state: Request, choices: AsyncGenerator[Choice, None], usage: Usage
    ) -> None:
        params, report = state.sampling_params, Report()
        assert params is not None
        async for choice in choices:
            report.add(choice)
            state.append_output_token_ids(choice.token)
            finished = check_stop(state, self.max_model_len)
            self._emit(
                EngineCoreOutput(
                    state.request_id,
                    [choice.token],
                    new_logprobs=_logprobs(choice, params.logprobs),
                    finish_reason=state.get_finished_reason() if finished else None,
                    stop_reason=state.stop_reason if finished else None,
                    kv_transfer_params=self._reports.field(state.request_id, report, usage),
                )
            )
            if finished:
                return


def _logprobs(choice: Choice, count: int | None) -> LogprobsLists | None:
    """The chosen token's steered log-probability, and the largest ``count`` of the known ones."""
    if count is None:
        return None
    order = np.argsort(-choice.logprobs, kind="stable")
    at = np.flatnonzero(choice.ids[order] == choice.token)
    rank = int(at[0]) if len(at) else len(order)
    own = choice.logprobs[order[rank]] if len(at) else -np.inf
    # vLLM reads a fixed width. Where fewer tokens are known, the last one is repeated.
    top = order[np.minimum(np.arange(count), len(order) - 1)]
    ids = np.concatenate([[choice.token], choice.ids[top]])
    logprobs = np.concatenate([[own], choice.logprobs[top]])
    return LogprobsLists(
        ids[None].astype(np.int32), logprobs[None].astype(np.float32), np.array([rank + 1])
    )


class AsyncSteeredCore:
    """For ``AsyncLLM``: everything but requests and outputs is the local core's own."""

    def __init__(
        self,
        core: Any,
        vllm_config: Any,
        endpoint: Endpoint,
        states: Mapping[str, Any],
        fail: Callable[[str, Exception], Any],
    ) -> None:
        self._core = core
        self._outputs: asyncio.Queue[EngineCoreOutputs | BaseException] = asyncio.Queue()
        self._sends: set[asyncio.Task] = set()
        self._steersman = Steersman(
            vllm_config,
            endpoint,
            states,
            send=lambda request: self._soon(core.add_request_async(request)),
            abort=lambda ids: self._soon(core.abort_requests_async(ids)),
            emit=lambda output: self._outputs.put_nowait(EngineCoreOutputs(outputs=[output])),
            fail=fail,
        )
        self._reader: asyncio.Task | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def _soon(self, sending: Any) -> None:
        task = asyncio.ensure_future(sending)
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self._steersman.start(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.stop(request_ids)

    def stop(self, request_ids: list[str]) -> None:
        self._steersman.stop(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_pair())
        item = await self._outputs.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def _read_pair(self) -> None:
        """Results of the pair to those who wait; the local engine's statistics to the front end."""
        try:
            while True:
                outputs = await self._core.get_output_async()
                self._steersman.pair.take(outputs.outputs)
                if outputs.scheduler_stats is not None:
                    stats = EngineCoreOutputs(
                        engine_index=outputs.engine_index, scheduler_stats=outputs.scheduler_stats
                    )
                    self._outputs.put_nowait(stats)
        except Exception as error:
            self._steersman.pair.fail(error)
            self._outputs.put_nowait(error)

    def shutdown(self, timeout: float | None = None) -> None:
        if self._reader is not None and not self._reader.get_loop().is_closed():
            self._reader.get_loop().call_soon_threadsafe(self._reader.cancel)
        self._core.shutdown(timeout=timeout)


class SteeredCore:
    """For ``LLMEngine``: tasks run on an event loop in a thread, the local core in the caller's."""

    def __init__(
        self, core: Any, vllm_config: Any, endpoint: Endpoint, states: Mapping[str, Any]
    ) -> None:
        self._core = core
        self._lock = threading.Condition()
        self._requests: list[EngineCoreRequest] = []
        self._aborted: list[str] = []
        self._outputs: list[EngineCoreOutput] = []
        self._unanswered: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.endpoint = endpoint
        self._steersman = Steersman(
            vllm_config,
            endpoint,
            states,
            send=self._send,
            abort=self._take_back,
            emit=self._emit,
            fail=self._fail,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def add_request(self, request: EngineCoreRequest) -> None:
        self._loop.call_soon_threadsafe(self._steersman.start, request)

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids:
            self._loop.call_soon_threadsafe(self._steersman.stop, list(request_ids))

    def get_output(self) -> EngineCoreOutputs:
        with self._lock:
            if not (self._requests or self._outputs or self._aborted or self._unanswered):
                self._lock.wait(timeout=0.2)  # returns now and then, so that Ctrl-C is heard
            requests, self._requests = self._requests, []
            aborted, self._aborted = self._aborted, []
            outputs, self._outputs = self._outputs, []
        for request in requests:
            self._core.add_request(request)
            self._unanswered.add(request.request_id)
        if aborted:
            self._core.abort_requests(aborted)
            self._unanswered.difference_update(aborted)
        stats = None
        if self._unanswered and not outputs:
            found = self._core.get_output()
            stats = found.scheduler_stats
            self._unanswered.difference_update(
                o.request_id for o in found.outputs if o.finish_reason is not None
            )
            self._loop.call_soon_threadsafe(self._steersman.pair.take, found.outputs)
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)

    def shutdown(self, timeout: float | None = None) -> None:
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.endpoint.close(), self._loop).result(timeout=10)
            self._stop_loop()
        self._core.shutdown(timeout=timeout)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _send(self, request: EngineCoreRequest) -> None:
        with self._lock:
            self._requests.append(request)
            self._lock.notify()

    def _take_back(self, request_ids: list[str]) -> None:
        with self._lock:
            # One that was not sent yet is only forgotten.
            unsent = {r.request_id for r in self._requests} & set(request_ids)
            self._requests = [r for r in self._requests if r.request_id not in unsent]
            self._aborted += [r for r in request_ids if r not in unsent]
            self._lock.notify()

    def _emit(self, output: EngineCoreOutput) -> None:
        with self._lock:
            self._outputs.append(output)
            self._lock.notify()

    def _fail(self, request_id: str, error: Exception) -> None:
        """Offline there is no queue for an error: the output says why in ``stop_reason``."""
        output = EngineCoreOutput(
            request_id, [], finish_reason=FinishReason.ERROR, stop_reason=str(error)
        )
        self._emit(output)
