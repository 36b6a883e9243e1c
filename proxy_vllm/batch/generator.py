"""Many requests through one engine that is never left to run empty, answered in input order."""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from proxy_vllm.batch import openai_lines
from proxy_vllm.batch.request import LineOptions, Request, id_of, is_openai, parse_request
from proxy_vllm.batch.result import result_json
from proxy_vllm.errors import UserError, one_line

if TYPE_CHECKING:
    from proxy_vllm.llm import ProxyLLM

# A numbered line: the object that it holds, or what is wrong with it.
Item = tuple[int, "dict[str, Any] | UserError"]

# Requests that enter between two steps: enough to fill a batch soon, few enough not to stall it.
_ADMITTED_A_STEP = 64


@dataclass(frozen=True)
class Result:
    """What became of one line: ``output`` to be written, or the reason why there is none."""

    number: int
    id: str | int | None
    output: dict[str, Any] | None = None
    error: str | None = None
    completion_tokens: int = 0
    openai: bool = False

    def refusal(self, **place: Any) -> dict[str, Any]:
        """The line that names the reason; ``place`` says where the request stands."""
        if self.openai:
            return openai_lines.refusal(self.number, self.id, self.error or "")
        return {**place, "line": self.number, "id": self.id, "error": self.error}


@dataclass
class Slot:
    number: int
    result: Result | None = None


class RequestPool:
    """The requests that are in one engine, and what has become of them.

    Args:
        llm: the engine, for this pool alone while it holds requests.
        options: how lines are read and answered.
        max_running: sequences in the engine at once; twice what it can batch, if None.
    """

    def __init__(
        self,
        llm: "ProxyLLM",
        options: LineOptions | None = None,
        *,
        max_running: int | None = None,
    ) -> None:
        self.llm = llm
        options = options or LineOptions()
        models = llm.model_config.get_diff_sampling_param() or {}
        served = llm.model_config.served_model_name or llm.model_config.model
        config = llm.llm_engine.vllm_config
        self.options = replace(
            options,
            defaults={**models, **options.defaults},
            adapters=None if config.lora_config is None else tuple(llm.adapters),
            served=tuple(served) if isinstance(served, list) else (served,),
        )
        self._openai: openai_lines.OpenAIAnswers | None = None
        scheduler = config.scheduler_config
        self.max_running = max_running or 2 * scheduler.max_num_seqs
        self._running: dict[str, tuple[Slot, Request]] = {}
        self._sequences = 0

    def __len__(self) -> int:
        return len(self._running)

    def has_room(self) -> bool:
        return self._sequences < self.max_running

    def start(self, slot: Slot, data: "dict[str, Any] | UserError") -> None:
        """Hand a line to the engine; if that cannot be, the slot has its result at once."""
        request_id = None
        openai = isinstance(data, dict) and is_openai(data)
        try:
            if isinstance(data, UserError):
                raise data
            request_id = id_of(slot.number, data)
            request = parse_request(slot.number, data, self.llm.proxy_config, self.options)
            if openai:
                request = self._answers().prepare(request, self.options.defaults)
            self._running[self._enqueue(request)] = (slot, request)
            self._sequences += request.params.n
        except Exception as error:
            if engine_is_dead(error):
                raise
            slot.result = Result(slot.number, request_id, error=one_line(error), openai=openai)

    def _answers(self) -> openai_lines.OpenAIAnswers:
        if self._openai is None:
            self._openai = openai_lines.OpenAIAnswers(self.llm, self.options.tool_parser)
        return self._openai

    def _enqueue(self, request: Request) -> str:
        """Hand a request to the engine; return the id under which its output will come."""
        llm = self.llm
        request_id = str(llm.request_counter.counter)
        adapter = llm.adapters[request.lora] if request.lora is not None else None
        try:
            if request.messages is not None:
                llm.enqueue_chat(
                    [request.messages],
                    [request.params],
                    use_tqdm=False,
                    lora_request=adapter,
                    **request.chat,
                )
            else:
                prompt: Any = request.prompt
                if isinstance(prompt, list):
                    prompt = {"prompt_token_ids": prompt}
                llm.enqueue([prompt], [request.params], use_tqdm=False, lora_request=adapter)
        except BaseException:
            # It may have entered vLLM's tables before it failed, and would be waited for.
            llm.llm_engine.abort_request([request_id])
            raise
        return request_id

    def step(self) -> list[Slot]:
        """One step of the engine; return the slots whose requests it ended, with results."""
        return [self._finish(o) for o in self.llm.llm_engine.step() if o.finished]

    def _finish(self, output: Any) -> Slot:
        slot, request = self._running.pop(output.request_id)
        self._sequences -= request.params.n
        reasons = {completion.finish_reason for completion in output.outputs}
        done = Result(slot.number, request.id, openai=request.asked is not None)
        if reasons & {"error", "abort"}:
            why = next((c.stop_reason for c in output.outputs if c.stop_reason), None)
            reason = str(why or "the engine could not finish this request")
            slot.result = replace(done, error=reason)
            return slot
        if done.openai:
            data = self._answers().answer(slot.number, request, output)
        else:
            data = result_json(request, output, token_ids=self.options.token_ids)
        tokens = sum(len(completion.token_ids) for completion in output.outputs)
        slot.result = replace(done, output=data, completion_tokens=tokens)
        return slot

    def abort(self) -> None:
        """Leave the engine empty."""
        running, self._running = list(self._running), {}
        self._sequences = 0
        if running:
            try:
                self.llm.llm_engine.abort_request(running)
            except Exception as error:
                if not engine_is_dead(error):
                    raise


class BatchGenerator:
    """Answers a stream of requests with one engine that is never left to run empty.

    Args:
        llm: the engine, for this generator alone while it runs.
        options: how lines are read and answered.
        stop_on_error: read nothing more after a line that cannot be answered.
        max_running: sequences in the engine at once; twice what it can batch, if None.
        max_held: requests read and not yet yielded, running ones and those that wait for a
            predecessor; this bounds the memory, whatever the length of the input.
    """

    def __init__(
        self,
        llm: "ProxyLLM",
        options: LineOptions | None = None,
        *,
        stop_on_error: bool = False,
        max_running: int | None = None,
        max_held: int | None = None,
    ) -> None:
        self._pool = RequestPool(llm, options, max_running=max_running)
        self.stop_on_error = stop_on_error
        self.max_held = max_held or 16 * self._pool.max_running

    def run(self, items: Iterable[Item], *, background: bool = False) -> Iterator[Result]:
        """Yield one result for each item, in their order, each as soon as it can be had.

        Args:
            items: numbered lines, read only as far as there is room for them.
            background: read them in a thread, so that a slow source (a pipe) delays no request
                that has been read.
        """
        source = _Source(items, background)
        waiting: deque[Slot] = deque()
        stopped = False
        try:
            while True:
                for _ in range(_ADMITTED_A_STEP):
                    if stopped or len(waiting) >= self.max_held or not self._pool.has_room():
                        break
                    # With nothing to compute and nothing to hand out, wait for the next line.
                    item = source.next(wait=not waiting)
                    if item is None:
                        break
                    slot = Slot(item[0])
                    waiting.append(slot)
                    self._pool.start(slot, item[1])
                    stopped = self._stops(slot)
                while waiting and (result := waiting[0].result) is not None:
                    waiting.popleft()
                    yield result
                if len(self._pool):
                    ended = self._pool.step()
                    stopped = stopped or any(map(self._stops, ended))
                elif not waiting and (stopped or source.ended):
                    return
        finally:
            source.close()
            self._pool.abort()

    def _stops(self, slot: Slot) -> bool:
        return self.stop_on_error and slot.result is not None and slot.result.error is not None


def engine_is_dead(error: BaseException) -> bool:
    """Did the engine's process end, rather than refuse one request?"""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


class _Source:
    """Items one by one; with a thread, only those that are there already, unless asked to wait."""

    def __init__(self, items: Iterable[Item], background: bool) -> None:
        self.ended = False
        self._items = iter(items)
        self._closed = threading.Event()
        self._queue: queue.Queue | None = None
        if background:
            self._queue = queue.Queue(maxsize=_ADMITTED_A_STEP)
            # A daemon: it may hang in a read that nothing can interrupt.
            threading.Thread(target=self._pump, daemon=True, name="proxy-vllm-input").start()

    def next(self, *, wait: bool) -> Item | None:
        """The next item, or None at the end and (unless ``wait``) when none is there yet."""
        if self.ended:
            return None
        if self._queue is None:
            item = next(self._items, None)
        else:
            try:
                item = self._queue.get(block=wait)
            except queue.Empty:
                return None
            if isinstance(item, BaseException):
                raise item
        self.ended = item is None
        return item

    def close(self) -> None:
        self._closed.set()

    def _pump(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        assert self._queue is not None
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
