"""A Ray Serve application: replicas of the OpenAI server, scaled by Ray Serve's own configuration.

    serve run proxy_vllm.serving:app options="BASE --expert E --antiexpert A --max-model-len 4096"

`options` is what would follow `proxy-vllm serve`. A configuration file sets replicas and
autoscaling, as for any deployment:

    applications:
      - name: proxy
        import_path: proxy_vllm.serving:app
        args: {options: "BASE --expert E --antiexpert A --tensor-parallel-size 2"}
        deployments:
          - {name: ProxyServer, autoscaling_config: {min_replicas: 1, max_replicas: 4}}

Each replica is an engine with its server on one machine; Ray gives it a GPU a rank.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from ray import serve

from proxy_vllm.errors import UserError


def parse(options: str | Sequence[str]) -> argparse.Namespace:
    """Parse what would follow `proxy-vllm serve`. Raises `UserError` for an unknown option."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from proxy_vllm.cli.serve import ProxyServeSubcommand

    words = shlex.split(options) if isinstance(options, str) else list(options)
    parser = FlexibleArgumentParser(prog="proxy-vllm")
    ProxyServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    try:
        args = parser.parse_args(["serve", *words])
    except SystemExit:
        raise UserError(
            f"proxy_vllm.serving: `proxy-vllm serve {shlex.join(words)}` does not parse"
        ) from None
    if args.data_parallel_size > 1 or args.nnodes > 1 or args.headless:
        raise UserError(
            "proxy_vllm.serving: a replica is one engine on one machine; set num_replicas in"
            " Ray Serve's configuration instead of --data-parallel-size, --nnodes or --headless"
        )
    return args


@serve.deployment(health_check_timeout_s=60, max_ongoing_requests=1024)
@serve.ingress()
class ProxyServer:
    """One engine, and vLLM's OpenAI application before it."""

    # Ray Serve awaits it.
    async def __init__(self, options: str | Sequence[str]) -> None:  # type: ignore[misc]
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        from proxy_vllm.cli.arguments import apply_to_namespace

        args = parse(options)
        apply_to_namespace(args)
        args.middleware = [*args.middleware, "proxy_vllm.admission.AdmissionMiddleware"]
        self._running = build_async_engine_client(args)
        self.engine = await self._running.__aenter__()
        tasks = await self.engine.get_supported_tasks()
        self._app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, self._app.state, args, tasks)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        await self.engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "engine"):
            await self._running.__aexit__(None, None, None)


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application from Ray Serve's `args`: `options`, as after `proxy-vllm serve`."""
    if set(args) != {"options"}:
        raise UserError(f"proxy_vllm.serving takes `options` alone, not {sorted(args)}")
    from vllm.platforms import current_platform

    parsed = parse(args["options"])
    ranks = parsed.tensor_parallel_size * parsed.pipeline_parallel_size
    gpus = 0 if current_platform.is_cpu() else ranks
    actor = {"num_cpus": 1 if gpus else ranks, "num_gpus": gpus}
    deployment: Any = ProxyServer
    return deployment.options(ray_actor_options=actor).bind(args["options"])
