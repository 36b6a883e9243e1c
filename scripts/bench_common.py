"""What benchmarks share: engines, provenance, memory, percentiles, the gate of correctness."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proxy_vllm.demo import child

ROOT = Path(__file__).resolve().parent.parent

# Parts of the device names that CUDA gives, and the keys of `proxy_vllm.plan.gpus.GPUS`. The
# first that is found counts.
_GPU_NAMES = {
    "B200": "b200",
    "H200": "h200",
    "H100 PCIE": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H100 80GB HBM3": "h100-sxm",
    "A100-SXM4-80GB": "a100-80g",
    "A100 80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g",
    "A100-PCIE-40GB": "a100-40g",
    "L40S": "l40s",
    "NVIDIA L4": "l4",
    "A10G": "a10g",
    "RTX 4090": "rtx4090",
    "RTX 3090": "rtx3090",
    "MI300X": "mi300x",
}

# Settings of the caller that change what is measured; as they are before a script adds its own.
_SETTINGS = ("VLLM_", "PROXY_VLLM_", "OMP_", "KMP_", "TRITON_", "CUDA_", "LD_PRELOAD")
ENVIRONMENT = {
    name: value
    for name, value in sorted(os.environ.items())
    if name.startswith(_SETTINGS) and not any(word in name for word in ("KEY", "TOKEN"))
}

# A token counts as the reference's choice when its logit lies this share of the row's standard
# deviation below the largest: what rounding of that type can move.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.25, "float16": 0.1}


def device_name() -> str:
    """The GPU's name, or the processor and its cores where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def gpu_key(name: str) -> str | None:
    """The key of `proxy_vllm.plan.gpus.GPUS` for a device name, None for a device not listed.

    >>> gpu_key("NVIDIA H200"), gpu_key("CPU x86_64, 2 cores")
    ('h200', None)
    """
    upper = name.upper()
    return next((key for part, key in _GPU_NAMES.items() if part in upper), None)


def provenance(argv: Sequence[str]) -> dict:
    """Device, versions, commit, command and settings: what makes results repeatable."""
    import torch
    import transformers
    import vllm

    import proxy_vllm

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or os.environ.get("PROXY_VLLM_COMMIT", "unknown")
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", "proxy_vllm", "kernels")
    return {
        "command": shlex.join(["python", *argv]),
        "environment": ENVIRONMENT,
        "commit": commit + ("+changes" if dirty else ""),
        "device": device_name(),
        "versions": {
            "proxy_vllm": proxy_vllm.__version__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def result_file(text: str) -> Path:
    """What ``--json`` names, its folder made now rather than after an hour of measuring."""
    # Here, since bench_pairs.py imports this file over older trees.
    from proxy_vllm.cli.json_file import check_json_file
    from proxy_vllm.errors import UserError

    file = Path(text)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_json_file(file)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--json ")) from None
    return file


def write_result(file: Path | None, result: dict) -> None:
    """Write a benchmark's result, if a file was named."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")


def percentiles(values: Sequence[float], which: Sequence[int] = (20, 50, 80, 99)) -> dict | None:
    """``{"p50": ...}`` by linear interpolation; None without values."""
    import numpy as np

    if not len(values):
        return None
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in which}


class ChildProcess(child.ChildProcess):
    """A process for one engine; a call that fails there ends the benchmark."""

    def __call__(self, function: Callable, *args: Any) -> Any:
        try:
            return super().__call__(function, *args)
        except child.ChildFailed as error:
            sys.exit(f"{Path(sys.argv[0]).name}: error: {function.__name__} failed: {error}")


def engine(models: Sequence[str], **kwargs: Any) -> Any:
    """`vllm.LLM` of one model, or `ProxyLLM` of base, expert and antiexpert; for token ids."""
    kwargs = {"skip_tokenizer_init": True, **kwargs}
    if len(models) == 1:
        from vllm import LLM

        return LLM(models[0], **kwargs)
    from proxy_vllm import ProxyLLM

    base, expert, antiexpert = models
    return ProxyLLM(base, expert=expert, antiexpert=antiexpert, **kwargs)


def greedy(
    llm: Any,
    prompts: Sequence[list[int] | dict[str, list[int]]],
    tokens: int,
    alphas: Sequence[float] | None = None,
) -> list:
    """Greedy outputs of exactly `tokens` tokens; a prompt may be one for each role.

    An engine's adapters are taken in turn.
    """
    from vllm import SamplingParams

    adapters = list(getattr(llm, "adapters", {}).values())
    own = [adapters[i % len(adapters)] for i in range(len(prompts))] if adapters else None

    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=None if alphas is None else {"proxy_alpha": alphas[i]},
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    asked = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    return llm.generate(asked, params, lora_request=own, use_tqdm=False)


class PeakMemory(threading.Thread):
    """The largest sum of memory seen: of GPUs, or, without one, of processes and their children.

    Args:
        pids: processes to follow on a CPU; each page counts once (proportional set size).
        gpus: indices of GPUs; what is in use there counts, whoever uses it.
    """

    def __init__(self, pids: Sequence[int], gpus: Sequence[int] = (), every: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.pids, self.gpus, self.every = list(pids), list(gpus), every
        self.bytes = 0
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            self.bytes = max(self.bytes, self._on_gpus() if self.gpus else self._of_processes())
            self._ended.wait(self.every)

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return self.bytes

    def _of_processes(self) -> int:
        import psutil

        total = 0
        for pid in self.pids:
            try:
                parent = psutil.Process(pid)
                family = [parent, *parent.children(recursive=True)]
            except psutil.Error:
                continue
            for process in family:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
        return total

    def _on_gpus(self) -> int:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in self.gpus]
        return sum(pynvml.nvmlDeviceGetMemoryInfo(h).used for h in handles)


def compare_with_loop(
    trio,  # reference_loop.Trio
    prompts: Sequence[Sequence[int] | dict[str, Sequence[int]]],
    generated: Sequence[Sequence[int]],
    dtype: str,
    alphas: Sequence[float],
) -> dict:
    """Hold greedy output against the Transformers models, each token after the engine's own prefix.

    A prompt may be one for each role. Returns counts, and `gap`: the largest distance of a chosen
    token's logit from the row's largest, as a share of the row's standard deviation. `passed` says
    whether rounding explains it.
    """
    from reference_loop import answer_logits

    exact = total = 0
    worst = 0.0
    for prompt, tokens, alpha in zip(prompts, generated, alphas, strict=True):
        rows = answer_logits(trio, prompt, tokens, alpha)
        for row, token in zip(rows, tokens, strict=True):
            exact += int(row.argmax()) == token
            total += 1
            worst = max(worst, float((row.max() - row[token]) / row.std()))
    return {
        "tokens": total,
        "exact": exact,
        "gap": round(worst, 5),
        "tolerance": TOLERANCE[dtype],
        "passed": total > 0 and worst <= TOLERANCE[dtype],
    }


def random_prompts(count: int, length: int, vocab: int, seed: int = 7) -> list[list[int]]:
    """Token ids, without the first ten, where special tokens lie."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab, (count, length), generator=generator).tolist()


def script_argv(name: str) -> list[str]:
    return [f"scripts/{name}", *sys.argv[1:]]
