"""Build an engine's configuration and its members' on a pretended H100; print what became of them.

Run in a process of its own by ``unit/test_member_configs.py``. The argument is a JSON list of
trios: name, engine arguments, arguments of the proxy.
"""

import dataclasses
import json
import sys

import pretended_h100  # isort: skip
from vllm import EngineArgs

from proxy_vllm.composite.member_configs import member_vllm_configs
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.engine_args import apply_to_engine_args
from proxy_vllm.plugin import register


def snapshot(config: object, path: str = "config", depth: int = 0) -> dict[str, str]:
    """Every value in a configuration, by its path."""
    found = {}
    for name, value in vars(config).items():
        here = f"{path}.{name}"
        if dataclasses.is_dataclass(value) and depth < 4:
            found |= snapshot(value, here, depth + 1)
        elif hasattr(value, "to_dict"):
            found[here] = repr(value.to_dict())
        elif name != "static_forward_context":
            found[here] = repr(value)
    return found


def configure(args: dict, proxy_args: dict) -> dict:
    proxy = ProxyConfig(**proxy_args)
    args = {"load_format": "dummy", "skip_tokenizer_init": True, **args}
    config = EngineArgs(**apply_to_engine_args(args, proxy)).create_engine_config()
    before = snapshot(config)
    members = member_vllm_configs(config, proxy)
    after = snapshot(config)
    changed = {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
    views = [members[role] for role in ROLES]
    return {
        "device": type(pretended_h100.vllm.platforms.current_platform).__name__,
        "changed": changed,
        "shared": [view.compilation_config is config.compilation_config for view in views],
        "architectures": [view.model_config.architecture for view in views],
        "quantised": [view.quant_config and view.quant_config.get_name() for view in views],
        "moe": config.parallel_config.is_moe_model,
        "fused": config.compilation_config.pass_config.fuse_allreduce_rms,
    }


if __name__ == "__main__":
    register()
    for name, args, proxy_args in json.loads(sys.argv[1]):
        print(f"BEGIN {name}", flush=True)
        print("RESULT", json.dumps(configure(args, proxy_args)), flush=True)
