"""`proxy-vllm doctor`: whether this installation runs right on this machine, in a few minutes."""

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.entrypoints.cli.types import CLISubcommand

from proxy_vllm.cli.json_file import check_json_file, write_json_file

PASSED, FAILED, UNCHECKED = "passed", "failed", "not checked"
_PACKAGES = ("proxy_vllm", "vllm", "torch", "triton", "transformers")
_ALPHAS = (1.0, 0.5, 0.0, -1.0)
_TOKENS = 24
_V2_HINT = "needs a GPU (or PROXY_VLLM_CPU_RUNNER=v2: Triton's interpreter)"


@dataclass
class Finding:
    """One line of the table."""

    check: str
    result: str  # PASSED, FAILED or UNCHECKED
    detail: str
    seconds: float = 0.0


def run_checks(say: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Every check, each in order, also after one has failed; ``say`` hears which one runs."""
    findings: list[Finding] = []
    for name, check in (
        ("versions", _versions),
        ("device", _device),
        ("kernels", _kernels),
        ("tokens", _tokens),
    ):
        say(name)
        start = time.monotonic()
        try:
            found = check()
        except Exception as error:  # a check that cannot run has failed
            found = [Finding(name, FAILED, f"{type(error).__name__}: {error}")]
        found[0].seconds = round(time.monotonic() - start, 1)
        findings += found
    return findings


def _versions() -> list[Finding]:
    from proxy_vllm.config import check_vllm_version

    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {_version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    check_vllm_version()
    return [Finding("versions", PASSED, f"Python {sys.version.split()[0]}, {', '.join(found)}")]


def _version(name: str) -> str:
    import proxy_vllm

    if name == "proxy_vllm":
        return proxy_vllm.__version__
    if name == "vllm":  # its build for CPUs has another name
        import vllm

        return vllm.__version__
    return importlib.metadata.version(name)


def _device() -> list[Finding]:
    import torch
    from vllm.platforms import current_platform

    if torch.cuda.is_available() and not current_platform.is_cuda():
        detail = "PyTorch sees a GPU and vLLM does not: vLLM's CPU build is installed"
        return [Finding("device", FAILED, detail)]
    if current_platform.is_cuda():
        major, minor = torch.cuda.get_device_capability()
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30
        detail = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {gigabytes:.0f} GiB"
        return [Finding("device", PASSED, f"{detail}, {torch.cuda.device_count()} of them")]
    from proxy_vllm.envs import cpu_runner

    name = current_platform.get_cpu_architecture().name
    return [Finding("device", PASSED, f"CPU ({name}), {cpu_runner().upper()} runner; no GPU")]


def _kernels() -> list[Finding]:
    """The fused sampler against float64: greedy rows, seeds, every filter."""
    import torch
    from vllm.platforms import current_platform

    from proxy_vllm.envs import cpu_runner

    gpu = current_platform.is_cuda()
    if not gpu and cpu_runner() != "v2":
        return [Finding("kernels", UNCHECKED, _V2_HINT)]
    from proxy_vllm.kernels import reference
    from proxy_vllm.kernels.combine_sample import proxy_combine, proxy_sample
    from proxy_vllm.kernels.row_parameters import RowParameters

    rows, generator = 16, torch.Generator().manual_seed(0)
    index = torch.arange(rows)
    parameters = RowParameters(
        alpha=index / 8 - 0.5,
        temperature=torch.where(index % 4 == 0, 0.0, 0.5 + index / rows),
        seeds=index * 7919,
        positions=index + 3,
        top_k=torch.where(index % 2 == 0, 0, 20).to(torch.int32),
        top_p=torch.where(index % 3 == 0, 0.9, 1.0),
        min_p=torch.where(index % 5 == 0, 0.05, 0.0),
    )
    device, wrong = "cuda" if gpu else "cpu", []
    for vocab in (128256, 32003) if gpu else (1013,):
        b, e, a = (3 * torch.randn(rows, vocab, generator=generator) for _ in range(3))
        on_device = b.to(device), e.to(device), a.to(device)
        vectors = {n: v for n, v in vars(parameters).items() if isinstance(v, torch.Tensor)}
        there = RowParameters(**{name: vector.to(device) for name, vector in vectors.items()})
        combined = proxy_combine(*on_device, there.alpha).cpu()
        want = reference.combine(b, e, a, parameters.alpha).float()
        if not torch.allclose(combined, want, atol=1e-4):
            wrong.append(f"combined logits at {vocab} tokens")
        tokens = proxy_sample(*on_device, there).cpu()
        scores = reference.scores(b, e, a, parameters)
        best, ours = scores.max(-1).values, scores.gather(1, tokens[:, None])[:, 0]
        # A draw may differ where float32 cannot tell two scores apart.
        off = (best - ours > 1e-3).nonzero().flatten().tolist()
        wrong += [f"row {row} at {vocab} tokens" for row in off]
    detail = f"{rows} rows against float64" + (f": wrong {', '.join(wrong)}" if wrong else "")
    return [Finding("kernels", FAILED if wrong else PASSED, detail)]


def _tokens() -> list[Finding]:
    """The trio in the box: an engine's greedy tokens against three Transformers models'."""
    from proxy_vllm.demo import model_path
    from proxy_vllm.demo.child import ChildFailed, ChildProcess
    from proxy_vllm.demo.problems import make_problems

    prompts = [p.prompt for p in make_problems("test", len(_ALPHAS), 0)]
    folders = [str(model_path(role)) for role in ("base", "expert", "antiexpert")]
    env = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Attention in float32 as it is written, not as TF32.
        "TRITON_F32_DEFAULT": "ieee",
        "VLLM_GPU_SYNC_CHECK": "error",
        **os.environ,
    }
    try:
        with ChildProcess(env, quiet="VLLM_LOGGING_LEVEL" not in os.environ) as child:
            tokens, ids, graphs = child(_engine_tokens, folders, prompts)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        detail = "the engine did not run: its last messages are above"
        return [Finding("tokens", FAILED, detail), Finding("graphs", UNCHECKED, "no engine")]
    want = _loop_tokens(folders, ids)
    wrong = [alpha for alpha, got, expected in zip(_ALPHAS, tokens, want) if got != expected]
    count = sum(map(len, want))
    detail = f"{count} greedy tokens of the trio in the box, as Transformers' three models"
    if wrong:
        detail = f"greedy tokens differ from Transformers' at alpha {', '.join(map(str, wrong))}"
    return [Finding("tokens", FAILED if wrong else PASSED, detail), _graphs(graphs)]


def _graphs(mode: str) -> Finding:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return Finding("graphs", UNCHECKED, "CUDA graphs need a GPU")
    return Finding("graphs", FAILED if mode == "NONE" else PASSED, f"CUDA graphs: {mode}")


def _engine_tokens(
    folders: Sequence[str], prompts: Sequence[str]
) -> tuple[list[list[int]], list[list[int]], str]:
    """Tokens and prompts of an engine in this process, and the mode of its CUDA graphs."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    from proxy_vllm import ProxyLLM

    # As a server starts, but in float32, so that tokens can be told apart exactly; a step that
    # waits for the GPU or compiles a kernel is an error.
    more: dict[str, Any] = {
        "attention_backend": "TRITON_ATTN",
        "gpu_memory_utilization": 0.3,
        "jit_monitor_mode": "error",
    }
    if not current_platform.is_cuda():
        more = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    llm = ProxyLLM(
        folders[0],
        expert=folders[1],
        antiexpert=folders[2],
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        disable_log_stats=True,
        **more,
    )
    asked = [
        SamplingParams(
            temperature=0.0, max_tokens=_TOKENS, ignore_eos=True, extra_args={"proxy_alpha": alpha}
        )
        for alpha in _ALPHAS
    ]
    outputs = llm.generate(list(prompts), asked, use_tqdm=False)
    mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    return (
        [list(output.outputs[0].token_ids) for output in outputs],
        [list(output.prompt_token_ids or []) for output in outputs],
        getattr(mode, "name", str(mode)),
    )


def _loop_tokens(folders: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The formula over three Transformers models, a token at a time without any cache."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
    tokens = []
    with torch.inference_mode():
        for prompt, alpha in zip(prompts, _ALPHAS):
            ids = list(prompt)
            for _ in range(_TOKENS):
                base, expert, antiexpert = (m(torch.tensor([ids])).logits[0, -1] for m in models)
                ids.append(int((base + alpha * (expert - antiexpert)).argmax()))
            tokens.append(ids[len(prompt) :])
    return tokens


class DoctorSubcommand(CLISubcommand):
    """The `doctor` subcommand."""

    name = "doctor"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        if args.json is not None:
            check_json_file(args.json)
        findings = run_checks(lambda name: print(f"{name} ...", file=sys.stderr, flush=True))
        width = max(len(f.check) for f in findings)
        for f in findings:
            print(
                f"{f.check:<{width}}  {f.result:<{len(UNCHECKED)}}  {f.seconds:5.1f} s  {f.detail}"
            )
        failed = [f.check for f in findings if f.result == FAILED]
        unchecked = [f.check for f in findings if f.result == UNCHECKED]
        verdict = f"failed: {', '.join(failed)}" if failed else "all that was checked passed"
        if unchecked:
            verdict += f"; not checked here: {', '.join(unchecked)}"
        print(verdict)
        if args.json is not None:
            write_json_file(args.json, {"findings": [asdict(f) for f in findings]})
        if failed:
            sys.exit(1)

    def subparser_init(self, subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            self.name,
            help="Check this installation on this machine.",
            description=(
                "Check versions and device, the kernels against a float64 reference, and the trio"
                " in the box through an engine against three Transformers models. Exit status 1 if"
                " a check failed; what this machine cannot check is named."
            ),
        )
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
        return parser


def cmd_init() -> list[CLISubcommand]:
    return [DoctorSubcommand()]
