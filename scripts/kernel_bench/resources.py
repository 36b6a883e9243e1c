"""Compiles every kernel for Ampere, Hopper and Blackwell and reports registers, spills and size.

Needs no GPU: the host code runs as it is, on tensors of the device "meta", which have shapes and no
memory, with launches replaced by compilation, so what is measured is what a GPU would run. Uses the
assembler that ships with Triton.

    python -m kernel_bench.resources [--arch 90] [--json FILE]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ARCHITECTURES = (80, 90, 100)


def _prepare() -> None:
    """Before Triton and vLLM are imported: compile, do not interpret; let vLLM use Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton.backends

    # No active GPU driver is needed to compile; vLLM's CPU build wants a backend named "cpu".
    idle = SimpleNamespace(is_active=lambda: True)
    never = SimpleNamespace(supports_target=lambda target: False)
    triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=idle, compiler=never))


def compile_only(compiled: dict, arch: int = 90) -> None:
    """From now on this process launches nothing: kernels are compiled and put into `compiled`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        # Triton remembers kernels by device.
        get_current_device=lambda: arch,
        get_current_stream=lambda device=None: 0,
    )

    def getitem(self, grid):
        def launch(*args, **kwargs):
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if kernel is None:  # a hook of Triton's wants no compilation
                return
            named = {**dict(zip(self.arg_names, args)), **kwargs}
            shape = {k: v for k, v in named.items() if k.isupper() or k.startswith("num_warps")}
            absent = [n for n, a in named.items() if a is None]
            shape["without"] = ",".join(n.removesuffix("_ptr") for n in absent) or "nothing"
            dtype = next(a.dtype for a in named.values() if hasattr(a, "dtype"))
            name = f"{self.fn.__name__}[{str(dtype).removeprefix('torch.')}]"
            compiled[arch, name, tuple(sorted(shape.items()))] = kernel

        return launch

    JITFunction.__getitem__ = getitem
    triton.runtime.driver.set_active(driver)


def _run_all(quick: bool) -> None:
    """Every public function at a small and a large batch, with and without filters."""
    from dataclasses import replace

    import torch

    from proxy_vllm.kernels import combine_sample, fused_head
    from proxy_vllm.kernels.columns import Columns
    from proxy_vllm.kernels.row_parameters import RowParameters
    from proxy_vllm.kernels.sharded import Exchange, ShardedSampler

    vocab = 128256

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def parameters(rows: int, filtered: bool) -> RowParameters:
        ids = empty(rows, dtype=torch.int64)
        filters = {}
        if filtered:
            top_k = empty(rows, dtype=torch.int32)
            filters = {"top_k": top_k, "top_p": empty(rows), "min_p": empty(rows)}
        return RowParameters(empty(rows), empty(rows), ids, ids, **filters, log_beta=empty(rows))

    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for rows in (64,) if quick else (1, 64):
            logits = [empty(rows, vocab, dtype=dtype)] * 3
            for filtered in (False, True):
                combine_sample.proxy_sample(*logits, parameters(rows, filtered))
            combine_sample.proxy_combine(*logits, empty(rows), log_beta=empty(rows))
            ShardedSampler(Exchange()).sample(
                *logits, parameters(rows, True), columns=Columns.of(*logits)
            )
            hidden = [empty(rows, d, dtype=dtype) for d in (4096, 2048, 2048)]
            weights = [empty(1024, h.shape[1], dtype=dtype) for h in hidden]
            # A scale other than 1 is where a compiler may contract what has to cancel.
            fused_head.fused_head_sample(
                hidden,
                weights,
                replace(parameters(rows, False), used=frozenset()),
                scales=(1.0, 0.5, 0.5),
            )
    if not quick:
        # Float64 noise changes the launches that draw.
        logits = [empty(1, vocab)] * 3
        combine_sample.proxy_sample(*logits, parameters(1, True), use_fp64_gumbel=True)


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def measure(kernel) -> dict[str, int]:
    """Registers a thread, bytes of local memory (spills), shared memory, instructions."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(cubin)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        code = subprocess.run(
            [_tool("nvdisasm"), str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    return {
        "registers": int(found["REG"]),
        "spill_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "shared_bytes": kernel.metadata.shared,
        "sums_with_products": sums_with_products(kernel.asm["ptx"]),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+[@A-Z]", code, re.M)),
    }


def sums_with_products(ptx: str) -> int:
    """Fused operations that add or take off a product which the program rounds by itself.

    Where equal products must cancel, there may be none: only one of the two would be rounded.
    """
    products = set(re.findall(r"mul\.f32\s+(%\w+),", ptx))
    addends = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx)
    return sum(addend in products for addend in addends)


def collect(quick: bool = False, architectures: Sequence[int] = ARCHITECTURES) -> list[dict]:
    """One record a compiled kernel; quick: bfloat16 logits and 64 rows alone."""
    compiled: dict = {}
    for arch in architectures:
        compile_only(compiled, arch)
        _run_all(quick)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = pool.map(measure, compiled.values())
    return [
        {"arch": arch, "kernel": name, "constants": dict(constants), **record}
        for (arch, name, constants), record in zip(compiled, measured)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--quick", action="store_true", help="bfloat16 and 64 rows alone")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    _prepare()
    import triton

    started = time.monotonic()
    records = collect(options.quick, options.arch)
    seconds = round(time.monotonic() - started, 1)
    print(f"triton {triton.__version__}, {len(records)} kernels in {seconds} s")
    print(f"{'arch':>6} {'registers':>9} {'spills':>6} {'shared':>6} {'instr':>6}  kernel")
    for record in records:
        constants = " ".join(f"{k}={v}" for k, v in record["constants"].items())
        print(
            f"sm_{record['arch']:<3} {record['registers']:>9} {record['spill_bytes']:>6} "
            f"{record['shared_bytes']:>6} {record['instructions']:>6} "
            f" {record['kernel']} {constants}"
        )
    if options.json:
        content = {"triton": triton.__version__, "seconds": seconds, "kernels": records}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any(record["spill_bytes"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
