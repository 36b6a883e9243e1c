"""What the answers of a batch depend on: kept beside them, and compared by ``--resume``."""

import dataclasses
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from proxy_vllm.config import ProxyConfig
from proxy_vllm.envs import CPU_RUNNER, cpu_runner
from proxy_vllm.errors import UserError

# Arguments that say where, how fast and in how much memory the models run, what is logged, and
# what a line may ask for. They move an answer by rounding at most; every other argument counts.
_HARMLESS = {
    "adapters", "aggregate_engine_logging", "allow_tokenizer_mismatch", "alpha_range",
    "async_scheduling", "block_size", "cpu_offload_gb", "device_ids", "disable_custom_all_reduce",
    "disable_log_stats", "distributed_executor_backend", "download_dir", "enable_chunked_prefill",
    "enable_prefix_caching", "enforce_eager", "fused_head_max_batch", "gpu_memory_utilization",
    "hf_token", "kv_cache_memory_bytes", "log_config_file", "log_level", "logging_config",
    "master_addr", "master_port", "max_cpu_loras", "max_logprobs", "max_loras",
    "max_num_batched_tokens", "max_num_seqs", "max_parallel_loading_workers",
    "num_gpu_blocks_override", "own_prompts", "pipeline_parallel_size", "sampler_cuda_graphs",
    "served", "served_model_name", "tensor_parallel_size", "trust_remote_code", "use_tqdm_on_load",
}  # fmt: skip


def settings_of(llm_arguments: dict[str, Any], **job: Any) -> dict[str, str]:
    """Settings that answers depend on, each as text; those that are as by default are left out.

    Args:
        llm_arguments: of ``proxy_vllm.ProxyLLM``.
        **job: what else counts, such as sampling parameters.
    """
    from vllm import EngineArgs

    defaults = {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for cls in (EngineArgs, ProxyConfig)
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.init
    }
    given = {**llm_arguments, **job, CPU_RUNNER: cpu_runner()}
    defaults[CPU_RUNNER] = "v1"
    return {
        name: _text(value)
        for name, value in sorted(given.items())
        if name not in _HARMLESS
        and value not in (None, "auto", "", [], {}, ())
        and (name in job or value != defaults.get(name))
    }


def _text(value: Any) -> str:
    """A value in one spelling: a folder's full path, and a file's with a digest of its content."""
    if isinstance(value, str) and os.path.exists(value):
        path = Path(value).resolve()
        if not path.is_file():
            return str(path)
        return f"{path} ({hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()})"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else str(value)


def check_same(shown: str, old: dict[str, str], new: dict[str, str]) -> None:
    """Raise ``UserError`` unless the results ``shown`` were begun with the settings of now."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = (s.get(name, "not given") for s in (old, new))
            raise UserError(
                f"{shown} was begun with {name} {was}, now it is {now}: --resume goes on with the"
                " same, --overwrite starts anew"
            )


class SettingsFile:
    """The record of one results file, ``RESULTS.settings.json``."""

    def __init__(self, results: str, settings: dict[str, str]) -> None:
        self._results, self._settings = results, settings
        self._path = Path(f"{results}.settings.json")

    def check(self) -> None:
        """Raise ``UserError`` unless the results that are there were begun with these settings."""
        try:
            old = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self._results} has no {self._path.name} beside it, which says how its answers"
                " were made: --resume cannot tell whether it goes on with the same; --overwrite"
                " starts anew"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error})") from None
        check_same(self._results, old, self._settings)

    def write(self) -> None:
        try:
            write_whole(self._path, json.dumps(self._settings, indent=1).encode())
        except OSError as error:
            raise UserError(f"{self._path}: cannot write ({error.strerror or error})") from None


def write_whole(path: Path, data: bytes) -> None:
    """Let a file appear with all of its bytes, or not at all. Raises ``OSError``."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
