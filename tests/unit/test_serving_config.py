"""Options of scale-out pass through `proxy-vllm serve` into vLLM's configuration.

The command lines are those of docs/serving.md; what cannot run without GPUs or a second machine is
checked here, up to the executor class that vLLM would start.
"""

import re
import shlex
from pathlib import Path

import pytest
from families import make_family
from vllm import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from proxy_vllm.cli.arguments import apply_to_namespace
from proxy_vllm.cli.serve import ProxyServeSubcommand
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.validate import validate_trio

DOCS = Path(__file__).resolve().parents[2] / "docs/serving.md"


@pytest.fixture(scope="module")
def parser():
    parser = FlexibleArgumentParser()
    ProxyServeSubcommand().subparser_init(parser.add_subparsers())
    return parser


@pytest.fixture
def build(parser, trio):
    """The configuration that a command line makes, and its namespace."""

    def build(options: str):
        members = [trio["model"], "--expert", trio["expert"], "--antiexpert", trio["antiexpert"]]
        args = parser.parse_args(["serve", *members, *shlex.split(options)])
        apply_to_namespace(args)
        return AsyncEngineArgs.from_cli_args(args).create_engine_config(), args

    return build


def executor(config) -> str:
    from vllm.v1.executor.abstract import Executor

    return Executor.get_class(config).__name__


def test_the_trio_and_the_worker_reach_every_layout(build, trio):
    for options in ("--tensor-parallel-size 2", "--data-parallel-size 2", "--alpha 0.5"):
        config, _ = build(options)
        proxy = ProxyConfig.from_vllm_config(config)
        assert (proxy.expert, proxy.antiexpert) == (trio["expert"], trio["antiexpert"])
        assert config.parallel_config.worker_cls.startswith("proxy_vllm.")
        assert config.model_config.architectures == ["ProxyTunedForCausalLM"]
    assert proxy.alpha == 0.5


def test_tensor_and_data_parallel(build):
    parallel = build("--tensor-parallel-size 2 --data-parallel-size 3")[0].parallel_config
    assert (parallel.tensor_parallel_size, parallel.data_parallel_size) == (2, 3)
    assert (parallel.world_size, parallel.world_size_across_dp) == (2, 6)


def test_the_two_machines_of_data_parallel(build):
    shared = (
        "--data-parallel-size 8 --data-parallel-size-local 4 --data-parallel-address 10.0.0.1"
        " --data-parallel-rpc-port 13345"
    )
    first, args = build(shared)
    assert not args.headless
    assert first.parallel_config.data_parallel_rank == 0
    second, args = build(f"--headless --data-parallel-start-rank 4 {shared}")
    assert args.headless
    assert second.parallel_config.data_parallel_rank == 4
    for config in (first, second):
        parallel = config.parallel_config
        assert (parallel.data_parallel_size, parallel.data_parallel_size_local) == (8, 4)
        address = (parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port)
        assert address == ("10.0.0.1", 13345)


def test_one_engine_over_two_machines(build):
    for rank in (0, 1):
        config, _ = build(
            "--tensor-parallel-size 2 --pipeline-parallel-size 2 --nnodes 2"
            f" --node-rank {rank} --master-addr 10.0.0.1"
        )
        parallel = config.parallel_config
        assert (parallel.nnodes, parallel.node_rank) == (2, rank)
        assert (parallel.master_addr, parallel.world_size) == ("10.0.0.1", 4)
        assert executor(config) == "MultiprocExecutor"


def test_ray_executor(build):
    config, _ = build(
        "--tensor-parallel-size 2 --pipeline-parallel-size 2 --distributed-executor-backend ray"
    )
    assert config.parallel_config.distributed_executor_backend == "ray"
    assert config.parallel_config.world_size == 4
    assert executor(config).startswith("Ray")
    ranks = build("--data-parallel-size 2 --data-parallel-backend ray")[0].parallel_config
    assert (ranks.data_parallel_size, ranks.data_parallel_backend) == (2, "ray")


def test_a_size_that_does_not_divide_a_members_heads_is_one_line(build, trio):
    with pytest.raises(UserError, match=r"--tensor-parallel-size 3 does not divide") as refused:
        build("--tensor-parallel-size 3")
    assert trio["model"] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ranks_beyond_the_kv_heads_of_a_model_without_copies(tmp_path):
    """gpt-oss dies inside vLLM; a Llama of as few KV heads, and a base with enough, do not."""
    small = {"expert": ("gpt_oss", 2), "antiexpert": ("llama", 3)}
    trio = {role: make_family(tmp_path / role, *kind, small=True) for role, kind in small.items()}
    args = {"model": make_family(tmp_path / "base", "gpt_oss", 1), "tensor_parallel_size": 2}
    with pytest.raises(UserError) as refused:
        validate_trio(args, ProxyConfig(**trio))
    assert str(refused.value) == (
        f"expert {trio['expert']!r} has too few heads for keys and values (1) for"
        " --tensor-parallel-size 2: vLLM gives no two ranks of a model of type gpt_oss the same"
        " one; use at most --tensor-parallel-size 1"
    )
    validate_trio({**args, "tensor_parallel_size": 1}, ProxyConfig(**trio))
    trio["expert"] = trio["antiexpert"]
    validate_trio(args, ProxyConfig(**trio))


def test_ray_and_nnodes_exclude_each_other(build):
    with pytest.raises(ValueError, match="nnodes > 1"):
        build("--tensor-parallel-size 2 --nnodes 2 --distributed-executor-backend ray")


def test_every_documented_option_is_one_of_the_parser(parser):
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.S)
    lines = [x for b in blocks for x in re.sub(r"\\\n\s*", " ", b).splitlines()]
    commands = [x for x in lines if "proxy-vllm serve" in x]
    assert len(commands) >= 8
    for line in commands:
        words = shlex.split(line.split("proxy-vllm serve", 1)[1], comments=True)
        members = ["base", "--expert", "e", "--antiexpert", "a"]
        parser.parse_args(["serve", *members, *words[1:]])  # exits for an option it does not know


@pytest.mark.parametrize(
    "options, message",
    [
        ("{base} --expert {expert}", "antiexpert: a model folder or hub name is needed"),
        ("{base} --expert {expert} --antiexpert /nowhere", "antiexpert '/nowhere': no such folder"),
        ("{trio} --port 3", "--port: set Ray Serve's http_options"),
        ("{trio} --data-parallel-size 2", "--data-parallel-size: set Ray Serve's num_replicas"),
        ("{trio} --nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("{trio} --max-model-len many", "--max-model-len"),
        ("{trio} --tensor-parallel-size 3", "--tensor-parallel-size 3 does not divide"),
        ("{trio} 'x", "No closing quotation"),
    ],
)
def test_bad_options_of_the_ray_serve_application_are_one_line(trio, options, message):
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
    import click

    from proxy_vllm.server.ray_serve import app

    whole = f"{trio['model']} --expert {trio['expert']} --antiexpert {trio['antiexpert']}"
    options = options.format(base=trio["model"], expert=trio["expert"], trio=whole)
    with pytest.raises(click.ClickException) as refused:
        app({"options": options})
    assert message in refused.value.message
    assert "\n" not in refused.value.message
    with pytest.raises(click.ClickException, match="the one argument is options, not model"):
        app({"model": whole})


def test_the_documented_ray_serve_file_is_one(parser):
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from proxy_vllm.server.ray_serve import ProxyServer

    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.S)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "proxy_vllm.serving:app"
    assert [d.name for d in application.deployments] == [ProxyServer.name]
    # Up to the models, which are not here.
    options = application.args["options"]
    args = parser.parse_args(["serve", *shlex.split(options)])
    assert (args.expert, args.tensor_parallel_size) == ("Qwen/Qwen2.5-7B-Instruct", 4)
