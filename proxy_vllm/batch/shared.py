"""One engine for several threads, so that one block's last texts run beside the next block's."""

import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proxy_vllm.batch.generator import Item, RequestPool, Result, Slot
from proxy_vllm.batch.request import LineOptions

if TYPE_CHECKING:
    from proxy_vllm.llm import ProxyLLM


class EngineFailure(RuntimeError):
    """The engine broke down while it answered; nothing more can be asked of it."""


class SharedGenerator:
    """Answers blocks of requests for any number of threads with one engine.

    Args:
        llm: the engine, for this generator alone from now on.
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
        self._pool = RequestPool(llm, options, max_running=max_running)
        self._inbox: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        threading.Thread(target=self._loop, daemon=True, name="proxy-vllm-engine").start()

    def answer(self, items: Sequence[Item], *, alone: bool = False) -> list[Result]:
        """Wait for the results of all items, in their order.

        Args:
            items: numbered lines.
            alone: have nothing else in the engine meanwhile.

        Raises:
            EngineFailure: the engine broke down, because of these items or of others beside them.
        """
        block = _Block(items, alone)
        self._inbox.put(block)
        # A block that was put into the inbox while the engine failed is never marked as done, so
        # look at the failure once a second.
        while self._failure is None and not block.done.wait(timeout=1.0):
            pass
        if not block.is_done():
            raise EngineFailure(str(self._failure)) from self._failure
        return [slot.result for slot in block.slots if slot.result is not None]

    def close(self) -> None:
        """Let go of the engine once the blocks asked for so far are answered."""
        self._inbox.put(None)

    def _loop(self) -> None:
        blocks: list[_Block] = []
        closing = False
        try:
            while blocks or not closing:
                while not (blocks or closing) or not self._inbox.empty():
                    block = self._inbox.get()
                    closing = closing or block is None
                    if block is not None:
                        blocks.append(block)
                self._start(blocks)
                if len(self._pool):
                    self._pool.step()
                for block in [b for b in blocks if b.is_done()]:
                    blocks.remove(block)
                    block.done.set()
        except BaseException as error:
            self._failure = error
            for block in blocks:
                block.done.set()

    def _start(self, blocks: "list[_Block]") -> None:
        for block in blocks:
            if block.alone and block is not blocks[0]:
                return  # those before it first, and none behind it
            while block.has_more():
                if not self._pool.has_room():
                    return
                self._pool.start(*block.next())
            if block.alone:
                return


class _Block:
    def __init__(self, items: Sequence[Item], alone: bool) -> None:
        self.alone = alone
        self.done = threading.Event()
        self.slots = [Slot(number) for number, _ in items]
        self._items = items
        self._started = 0

    def has_more(self) -> bool:
        return self._started < len(self._items)

    def next(self) -> tuple[Slot, Any]:
        index, self._started = self._started, self._started + 1
        return self.slots[index], self._items[index][1]

    def is_done(self) -> bool:
        return not self.has_more() and all(slot.result for slot in self.slots)
