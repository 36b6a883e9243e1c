"""`proxy-vllm serve --base-url`: vLLM's server over an engine core that steers a base elsewhere."""

import asyncio
from argparse import Namespace
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, setup_server
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from proxy_vllm.remote_base.endpoint import Endpoint
from proxy_vllm.remote_base.engine_core import AsyncSteeredCore
from proxy_vllm.remote_base.start import endpoint_of


class RemoteBaseLLM(AsyncLLM):
    """``AsyncLLM`` whose engine core is a steered one, once ``steer`` has been called."""

    engine_core: Any

    def _run_output_handler(self) -> None:
        # vLLM's own constructor starts it too early: it would read from the local core.
        if isinstance(self.engine_core, AsyncSteeredCore):
            super()._run_output_handler()

    def steer(self, endpoint: Endpoint) -> None:
        """Answer requests with this base from now on; called within the event loop."""
        self.engine_core = AsyncSteeredCore(
            self.engine_core,
            self.vllm_config,
            endpoint,
            self.output_processor.request_states,
            self._fail,
        )
        self._run_output_handler()

    def _fail(self, request_id: str, error: Exception) -> None:
        """End a request, and those that answer the same prompt, with an error."""
        state = self.output_processor.request_states.get(request_id)
        if state is None or state.queue is None:
            return
        queue, parent = state.queue, state.parent_req
        first = request_id if parent is None else parent.request_id
        ended = self.output_processor.abort_requests([first], internal=True)
        # After the output of the abort, which it replaces.
        queue.put(error)
        self.engine_core.stop([i for i in ended if i != request_id])


async def run_server(args: Namespace) -> None:
    """Serve until told to stop; as vLLM's ``run_server``, with one engine behind one server."""
    listen_address, sock = setup_server(args, reuse_port=False)
    vllm_config: VllmConfig = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        UsageContext.OPENAI_API_SERVER
    )
    engine = await asyncio.to_thread(_start, vllm_config, args)
    endpoint = endpoint_of(vllm_config)
    try:
        engine.steer(endpoint)
        shutdown = await build_and_serve(engine, listen_address, sock, args)
    finally:
        engine.shutdown(timeout=vllm_config.shutdown_timeout)
        await endpoint.close()
    try:
        await shutdown
    finally:
        sock.close()


def _start(vllm_config: VllmConfig, args: Namespace) -> RemoteBaseLLM:
    engine = RemoteBaseLLM.from_vllm_config(
        vllm_config,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
        usage_context=UsageContext.OPENAI_API_SERVER,
    )
    assert isinstance(engine, RemoteBaseLLM)
    return engine
