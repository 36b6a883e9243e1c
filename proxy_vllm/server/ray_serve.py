"""A Ray Serve application: `proxy-vllm serve` in as many replicas as Ray Serve's settings say.

    serve run proxy_vllm.serving:app options="BASE --expert E --antiexpert A"

`options` is what would follow `proxy-vllm serve`. docs/serving.md has a file with replicas and
autoscaling. A replica is one engine on one machine behind vLLM's own HTTP application, admission
included; Ray gives it a GPU a rank. Ray's `ray.serve.llm` takes the trio too, but its HTTP layer
passes our admission by: it answers an alpha that cannot run with status 200 and another alpha.
"""

import asyncio
import os
import shlex
from argparse import Namespace
from typing import Any, NoReturn

import click
from ray import serve
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from proxy_vllm.cli.arguments import apply_to_namespace
from proxy_vllm.cli.serve import DRAIN_SECONDS, ProxyServeSubcommand
from proxy_vllm.errors import UserError
from proxy_vllm.server import add_middleware

# Options of the process that Ray Serve takes the place of, and what to do instead.
_TAKEN = {
    **dict.fromkeys(("host", "port", "uds", "ssl_certfile"), "set Ray Serve's http_options"),
    **dict.fromkeys(("data_parallel_size", "nnodes", "headless"), "set Ray Serve's num_replicas"),
    "distributed_executor_backend": "a replica's GPUs are on one machine",
    **dict.fromkeys(("tool_parser_plugin", "reasoning_parser_plugin"), "not loaded in Ray Serve"),
}


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(options: str) -> Namespace:
    """Parse and check what would follow `proxy-vllm serve`; `UserError` for what cannot be."""
    parser, command = _Parser(prog="proxy-vllm"), ProxyServeSubcommand()
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *shlex.split(options)])
    for name, instead in _TAKEN.items():
        if getattr(args, name) != serve_parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: {instead}")
    command.validate(args)
    apply_to_namespace(args)
    add_middleware(args)
    args.ranks = args.tensor_parallel_size * args.pipeline_parallel_size
    # Inside a Ray actor vLLM might look for a placement group.
    args.distributed_executor_backend = "mp" if args.ranks > 1 else None
    return args


class _EndOfReplica:
    """Stands for vLLM's HTTP server, which vLLM tells to end when its engine has died.

    Here the process ends, once the requests that met the death have their answers. Ray then sends
    no more to it and starts another. Until a health check had failed three times, Ray would prefer
    such a replica: nothing else answers as fast as an error.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "should_exit" and value:
            asyncio.get_running_loop().call_later(0.5, os._exit, 1)


@serve.deployment(
    max_ongoing_requests=1024, graceful_shutdown_timeout_s=DRAIN_SECONDS, health_check_period_s=2
)
@serve.ingress()
class ProxyServer:
    """One engine, and vLLM's OpenAI application before it."""

    async def __init__(self, options: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        # vLLM binds threads to cores, not knowing of replicas beside it; Ray limits their number.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        args = parse(options)
        self._running = build_async_engine_client(args)
        self.engine = await self._running.__aenter__()
        tasks = await self.engine.get_supported_tasks()
        self._app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, self._app.state, args, tasks)
        self._app.state.server = _EndOfReplica()

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        await self.engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "engine"):
            await self._running.__aexit__(None, None, None)


def app(args: dict[str, str]) -> serve.Application:
    """Build the application from Ray Serve's `args`: `options`, as after `proxy-vllm serve`."""
    try:
        if set(args) != {"options"}:
            raise UserError(f"the one argument is options, not {', '.join(args) or 'nothing'}")
        ranks = parse(args["options"]).ranks
    except (UserError, ValueError) as error:  # click shows it in one line
        raise click.ClickException(f"proxy_vllm.serving: {' '.join(str(error).split())}") from None
    cpu = current_platform.is_cpu()
    resources = {"num_cpus": ranks if cpu else 1, "num_gpus": 0 if cpu else ranks}
    deployment: Any = ProxyServer
    return deployment.options(ray_actor_options=resources).bind(args["options"])
