"""Arguments of a plain engine become those of a proxy-tuned one, or are refused by name."""

from types import SimpleNamespace

import pytest

from proxy_vllm import ProxyConfig
from proxy_vllm.config import CONFIG_KEY
from proxy_vllm.engine_args import apply_to_engine_args, cpu_kv_cache
from proxy_vllm.errors import UserError

MEMBERS = {"expert": "e", "antiexpert": "a"}


def test_engine_arguments_keep_what_the_user_set():
    kwargs = {
        "model": "b",
        "hf_overrides": {"rope_theta": 1e6},
        "additional_config": {"mine": 1},
        "kv_cache_memory_bytes": 123,
    }
    out = apply_to_engine_args(kwargs, ProxyConfig(**MEMBERS, speculative_tokens=3))
    assert out["hf_overrides"]["rope_theta"] == 1e6
    assert out["additional_config"]["mine"] == 1
    assert out["additional_config"][CONFIG_KEY]["expert"] == "e"
    assert out["kv_cache_memory_bytes"] == 123
    assert out["speculative_config"]["num_speculative_tokens"] == 3
    assert kwargs["hf_overrides"] == {"rope_theta": 1e6}, "the caller's dictionary is not changed"


@pytest.mark.parametrize(
    "kwargs, tokens, named",
    [
        ({"worker_cls": "my.Worker"}, None, "worker_cls"),
        ({"hf_overrides": len}, None, "hf_overrides"),
        ({"speculative_config": {"method": "ngram"}}, 2, "--speculative-config"),
        ({"pipeline_parallel_size": 2}, 2, "--pipeline-parallel-size 2.*cannot draft"),
        ({"pipeline_parallel_size": 2}, "auto", "--pipeline-parallel-size 2.*cannot draft"),
        ({"return_sampling_mask": True}, 2, "--return-sampling-mask"),
        ({"enable_trace_replay": True}, 2, "--enable-trace-replay"),
        ({}, -1, "--speculative-tokens is -1: a number from 1 to 16"),
        ({}, 0, "--speculative-tokens is 0"),
        ({}, "17", "--speculative-tokens is 17"),
        ({}, "some", "--speculative-tokens is some"),
        ({}, 2.0, "--speculative-tokens is 2.0"),
        ({}, True, "--speculative-tokens is True"),
    ],
)
def test_arguments_that_cannot_be_honoured(kwargs, tokens, named):
    with pytest.raises(UserError, match=named):
        proxy = ProxyConfig(**MEMBERS, speculative_tokens=tokens)
        apply_to_engine_args({"model": "b", **kwargs}, proxy)


def test_drafts_a_step_as_typed():
    assert ProxyConfig(**MEMBERS, speculative_tokens="4").speculative_tokens == 4
    assert not ProxyConfig(**MEMBERS).expert_drafts


@pytest.mark.parametrize(
    "on_cpu, kwargs, named",
    [
        (True, {}, "no CUDA graphs on a CPU"),
        (False, {"enforce_eager": True}, "--enforce-eager"),
        (False, {"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        (False, {"speculative_config": {"method": "ngram"}}, "verify drafts"),
    ],
)
def test_graphs_of_the_sampler_are_refused_where_they_would_do_nothing(
    monkeypatch, on_cpu, kwargs, named
):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    asked = ProxyConfig(**MEMBERS, sampler_cuda_graphs=True)
    with pytest.raises(UserError, match=r"^--sampler-cuda-graphs: ") as refused:
        apply_to_engine_args({"model": "b", **kwargs}, asked)
    assert named in str(refused.value)
    apply_to_engine_args({"model": "b", **kwargs}, ProxyConfig(**MEMBERS))


def test_the_fused_head_is_refused_on_the_runner_that_has_none():
    proxy = ProxyConfig(**MEMBERS, fused_head_max_batch=4)
    with pytest.raises(UserError, match="--fused-head-max-batch needs Model Runner V2"):
        apply_to_engine_args({"model": "b"}, proxy)


@pytest.mark.parametrize(
    "sizes, engines, ranks",
    [
        ({}, 1, 1),
        ({"tensor_parallel_size": 2}, 1, 2),
        ({"pipeline_parallel_size": 2, "data_parallel_size": None}, 2, 4),
        ({"pipeline_parallel_size": 2, "data_parallel_size": 3}, 1, 6),
    ],
)
def test_a_cpus_memory_is_shared_among_all_ranks_of_all_engines(monkeypatch, sizes, engines, ranks):
    """One rule for an engine alone and for replicas on Ray: they once differed by a factor of 2."""
    import psutil

    available = 8 << 30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert cpu_kv_cache(sizes, engines) == {"kv_cache_memory_bytes": available // 4 // ranks}
    if engines == 1:
        out = apply_to_engine_args({"model": "m", **sizes}, ProxyConfig(**MEMBERS))
        assert out["kv_cache_memory_bytes"] == available // 4 // ranks
    assert cpu_kv_cache({**sizes, "kv_cache_memory_bytes": 5}, engines) == {}
    assert cpu_kv_cache({**sizes, "gpu_memory_utilization": 0.5}, engines) == {}


def test_generate_passes_no_argument_that_the_class_lacks():
    import dataclasses
    import inspect

    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from proxy_vllm import ProxyLLM
    from proxy_vllm.cli.generate import cmd_init, llm_arguments
    from proxy_vllm.demo import model_path

    parser = FlexibleArgumentParser()
    cmd_init()[0].subparser_init(parser.add_subparsers(dest="subparser"))
    base, expert, antiexpert = (str(model_path(r)) for r in ("base", "expert", "antiexpert"))
    args = ["generate", base, "--expert", expert, "--antiexpert", antiexpert, "-i", "in", "-o", "x"]
    known = {*inspect.signature(ProxyLLM.__init__).parameters, "chat_template"}
    known |= {field.name for field in dataclasses.fields(EngineArgs)}
    assert llm_arguments(parser.parse_args(args)).keys() - known == set()
