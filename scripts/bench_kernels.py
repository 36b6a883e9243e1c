#!/usr/bin/env python
"""Times ways to combine three logit tensors and sample, side by side in one run on one CUDA GPU.

    python scripts/bench_kernels.py [--out FILE.json] [--budget-seconds 440]
    python scripts/bench_kernels.py --plot-only FILE.json
    python scripts/bench_kernels.py --device cpu --smoke       tries the script itself, tiny sizes

Every provider of `kernel_bench.launches` first has to draw the reference's tokens; one that
does not is reported as wrong and gets no time. Times are of CUDA graph replays with a cold L2 (a
256 MiB buffer is written in between), median with p20 and p80; `eager_us` is the median of plain
calls, launch overhead included. Bytes are what cannot be avoided: each logit (or weight) read once.
`share_of_copy` is their rate over that of a 1 GiB device-to-device copy measured in the same run.

`decisions` in the result reads off what the settings hang on: whether heads, combination and draw
gain from a CUDA graph (`--sampler-cuda-graphs`; in an engine the launches may hide behind the
model, which `bench_step.py --systems proxy sampler_graphs` shows), up to which batch the fused head
wins (`--fused-head-max-batch`), and which targets are met.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from kernel_bench.report import KINDS, decisions, plot  # noqa: E402

HEAD_SIZES = (4096, 2048, 2048)
CHECKED_ROWS = 16


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/kernels.json")
    parser.add_argument("--budget-seconds", type=float, default=440.0, metavar="S")
    parser.add_argument("--repeats", type=int, default=30, help="timed replays a cell")
    parser.add_argument("--plot-only", type=Path, metavar="JSON", help="only draw its plot again")
    return parser.parse_args()


def refuse(message: str) -> int:
    print(f"bench_kernels: error: {message}", file=sys.stderr)
    return 2


def make_logits(rows, vocab, dtype, device, flat=False):
    """Three members' logits. Peaked: a bulk of unlikely tokens, some tens of likely ones a row."""
    import torch

    generator = torch.Generator(device).manual_seed(rows * vocab)
    shape = (rows, vocab)
    base = torch.randn(shape, generator=generator, device=device)
    if not flat:
        likely = torch.randint(0, vocab, (rows, 40), generator=generator, device=device)
        lift = 4 + 6 * torch.rand((rows, 40), generator=generator, device=device)
        base = (base * 2).scatter_add_(1, likely, lift)
    small = torch.randn(shape, generator=generator, device=device)
    shift = torch.randn(shape, generator=generator, device=device) * 0.3
    return tuple(tensor.to(dtype) for tensor in (base, small + shift, small))


def make_rows(kind, rows, vocab, device):
    """Per-row parameters of one kind of batch."""
    import torch

    from proxy_vllm.kernels.row_parameters import FILTERS, RowParameters

    index = torch.arange(rows, device=device)
    temperature = torch.full((rows,), 0.8, device=device)
    top_k = torch.full((rows,), vocab, dtype=torch.int32, device=device)
    top_p = torch.ones(rows, device=device)
    min_p = torch.zeros(rows, device=device)
    turn = index % 6
    few = min(50, vocab // 2)
    if kind == "greedy":
        temperature[:] = 0
    if kind == "top-k+top-p":
        top_k[:] = few
    if kind in ("top-p", "top-k+top-p"):
        top_p[:] = 0.9
    if kind == "mixed":  # greedy, plain, min-p, top-p, top-k, both
        temperature[turn == 0] = 0
        min_p[turn == 2] = 0.05
        top_p[(turn == 3) | (turn == 5)] = 0.9
        top_k[turn >= 4] = few
    # As the engine has them: all three filters or none, and which of them some row uses.
    used = {"top-p": {"top_p"}, "top-k+top-p": {"top_k", "top_p"}, "mixed": set(FILTERS)}
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p} if kind in used else {}
    return RowParameters(
        alpha=torch.where(index % 2 == 0, 1.0, 0.5),
        temperature=temperature,
        seeds=index * 7919 + 11,
        positions=index + 100,
        **filters,
        used=frozenset(used.get(kind, ())),
    )


def wrong(provider, inputs, tokens) -> str | None:
    """Why these tokens are not the reference's, judged on rows of all the batch; None if they are.

    A token must be within filters a little wider than asked: at their edges a search in float32,
    or one that splits equal logits, may differ. Its score must be the reference's best up to
    rounding. One row in ten may miss that with filters, whose edge may differ, or with rounded
    logits.
    """
    import torch

    from proxy_vllm.kernels import reference

    rows = min(CHECKED_ROWS, tokens.shape[0])
    chosen = torch.linspace(0, tokens.shape[0] - 1, rows).long().to(tokens.device)
    if inputs.logits:
        logits = tuple(tensor[chosen] for tensor in inputs.logits)
    else:
        pairs = zip(inputs.hidden, inputs.weights)
        logits = tuple(reference.head_logits(h[chosen], w, dtype=torch.float32) for h, w in pairs)
    chosen_rows = inputs.rows.select(chosen)
    filtered = chosen_rows.filtered
    # Heads that store bfloat16 logits move more of them over the edge.
    more_k, more_p = (5, 1e-3) if inputs.logits else (20, 2e-2)
    wider = chosen_rows
    if filtered:
        wider = replace(
            wider, top_k=wider.top_k + more_k, top_p=(wider.top_p + more_p).clamp(max=1)
        )
    drawn = tokens[chosen, None]
    if tokens.min() < 0 or tokens.max() >= logits[0].shape[1]:
        return "a token is outside the vocabulary"
    if (reference.scores(*logits, wider).gather(1, drawn) == -torch.inf).any():
        return "a token is outside the kept set"
    if not provider.same_noise:
        return None
    scores = reference.scores(*logits, chosen_rows)
    # Heads that store bfloat16 logits round them, by how much depends on their size.
    rounded = provider.name == "heads+proxy" and inputs.hidden[0].dtype == torch.bfloat16
    close = scores.max(1).values - scores.gather(1, drawn)[:, 0] < (0.1 if rounded else 1e-3)
    if close.float().mean() >= (0.9 if filtered or rounded else 1.0):
        return None
    return f"{int((~close).sum())} of {rows} tokens differ"


class Timer:
    """Microseconds of calls: CUDA graph replays after a cold L2, or wall clock on a CPU."""

    def __init__(self, device: str, repeats: int):
        import torch

        self.cuda, self.repeats = device == "cuda", repeats
        if self.cuda:
            self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def _events(self, call, repeats) -> list[float]:
        import torch

        pairs = []
        for _ in range(repeats):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    def measure(self, call) -> tuple[list[float], list[float], str]:
        """(times, times of plain calls, "graph" or why there is no graph)."""
        if not self.cuda:
            times = []
            for _ in range(self.repeats):
                start = time.perf_counter()
                call()
                times.append(1e6 * (time.perf_counter() - start))
            return times, times, "cpu"
        import torch

        eager = self._events(call, 10)
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            return self._events(call, self.repeats), eager, f"eager: {str(error).splitlines()[0]}"
        graph.replay()
        return self._events(graph.replay, self.repeats), eager, "graph"

    def copy_rate(self) -> float | None:
        """GB/s read and written by a 1 GiB copy on the device; None on a CPU."""
        if not self.cuda:
            return None
        import numpy as np
        import torch

        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        times = self._events(lambda: target.copy_(source), 20)
        return 2 * source.numel() / float(np.median(times)) / 1e3


def cells(smoke: bool):
    """(source, V, B, dtype name, kind, flat) in the order measured: what matters most first."""
    vocabs, batches, dtypes = (128256, 32000, 151936), (1, 8, 64, 256), ("bfloat16", "float32")
    if smoke:
        vocabs, batches, dtypes = (111,), (1, 3), ("bfloat16",)
    for dtype in dtypes[:1]:
        for batch in batches:
            for kind in ("greedy", "plain", "mixed"):
                yield "heads", vocabs[0], batch, dtype, kind, False
    for vocab in vocabs:
        for dtype in dtypes:
            for batch in batches:
                for kind in KINDS:
                    yield "logits", vocab, batch, dtype, kind, False
                if vocab == vocabs[0]:
                    yield "logits", vocab, batch, dtype, "top-p", True
    for vocab in vocabs:
        for dtype in dtypes:
            for batch in batches if (vocab, dtype) != (vocabs[0], dtypes[0]) else ():
                for kind in ("greedy", "plain"):
                    yield "heads", vocab, batch, dtype, kind, False


def run(options, device: str) -> dict:
    import numpy as np
    import torch
    import triton
    from bench_common import provenance
    from kernel_bench.launches import PROVIDERS, SamplerInputs

    started = time.monotonic()
    timer = Timer(device, 2 if options.smoke else options.repeats)
    rate = timer.copy_rate()
    result = {
        **provenance(sys.argv),
        "triton": triton.__version__,
        "copy_gb_per_s": rate,
        "smoke": options.smoke,
        "rows": [],
        "not_measured": [],
    }
    sizes = (32, 16, 16) if options.smoke else HEAD_SIZES
    tensors, made_for = (), None  # the logits, or the heads, that cells share
    for source, vocab, batch, dtype_name, kind, flat in cells(options.smoke):
        cell = {
            "source": source, "vocab": vocab, "batch": batch, "dtype": dtype_name, "kind": kind,
            "logits": "flat" if flat else "peaked",
        }  # fmt: skip
        dtype = getattr(torch, dtype_name)
        late = time.monotonic() - started > options.budget_seconds
        parameters = None if late else make_rows(kind, batch, vocab, device)
        if late:
            inputs, size = None, 0
        elif source == "heads":
            if made_for != (vocab, dtype):
                tensors = tuple(
                    torch.randn(vocab, d, dtype=dtype, device=device) * (2 / d**0.5) for d in sizes
                )
                made_for = (vocab, dtype)
            hidden = tuple(torch.randn(batch, d, dtype=dtype, device=device) for d in sizes)
            inputs = SamplerInputs(parameters, hidden=hidden, weights=tensors)
            size = sum(t.numel() * t.element_size() for t in (*hidden, *tensors))
        else:
            if made_for != (vocab, batch, dtype, flat):
                tensors = make_logits(batch, vocab, dtype, device, flat)
                made_for = (vocab, batch, dtype, flat)
            inputs = SamplerInputs(parameters, logits=tensors)
            size = 3 * batch * vocab * dtype.itemsize
        for provider in PROVIDERS.values():
            if provider.source != source:
                continue
            reason = "out of time" if late else provider.missing()
            if kind in ("greedy", "mixed") and not provider.mixed:
                reason = reason or "vLLM does not use it for batches with greedy or seeded rows"
            if kind not in ("greedy", "plain") and not provider.filters:
                reason = reason or "knows no filters"
            if not reason:
                try:
                    reason = wrong(provider, inputs, provider.draw(inputs))
                    reason = reason and f"WRONG: {reason}"
                except Exception as error:  # one provider's fault must not end the others'
                    reason = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
            if reason:
                result["not_measured"].append({**cell, "provider": provider.name, "why": reason})
                if reason.startswith(("WRONG", "FAILED")):
                    print(f"{provider.name} {cell}: {reason}")
                continue
            times, eager, how = timer.measure(lambda p=provider, i=inputs: p.draw(i))
            p20, p50, p80 = (float(np.percentile(times, p)) for p in (20, 50, 80))
            row = {
                **cell,
                "provider": provider.name,
                "p20_us": round(p20, 2),
                "p50_us": round(p50, 2),
                "p80_us": round(p80, 2),
                "eager_us": round(float(np.median(eager)), 2),
                "timed": how,
                "bytes": size,
                "gb_per_s": round(size / p50 / 1e3, 1),
                "share_of_copy": None if rate is None else round(size / p50 / 1e3 / rate, 3),
            }
            result["rows"].append(row)
            print(
                f"{row['p50_us']:>10.1f} us {row['gb_per_s']:>8.1f} GB/s  {provider.name:<17}"
                f"{source} V={vocab} B={batch} {dtype_name} {kind} {cell['logits']}",
                flush=True,
            )
    result["decisions"] = decisions(result["rows"])
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def main() -> int:
    options = parse()
    if options.plot_only:
        if not options.plot_only.is_file():
            return refuse(f"--plot-only: no file {options.plot_only}")
        plot(json.loads(options.plot_only.read_text()), options.plot_only.with_suffix(".png"))
        return 0
    if options.device == "cpu":
        if not options.smoke:
            return refuse("--device cpu only tries the script; add --smoke, or use a CUDA GPU")
        os.environ["PROXY_VLLM_CPU_RUNNER"] = "v2"
    import proxy_vllm  # noqa: F401  before Triton and vLLM: it prepares the interpreter

    import torch  # isort: skip

    if options.device == "cuda" and not torch.cuda.is_available():
        return refuse("no CUDA GPU found; to try the script on a CPU add --device cpu --smoke")
    default = "kernels-smoke.json" if options.smoke else "kernels.json"
    out = options.out or ROOT / "benchmarks" / "results" / default
    out.parent.mkdir(parents=True, exist_ok=True)
    result = run(options, options.device)
    out.write_text(json.dumps(result, indent=1) + "\n")
    if result["rows"]:
        plot(result, out.with_suffix(".png"))
    failed = [r for r in result["not_measured"] if r["why"].startswith(("WRONG", "FAILED"))]
    print(json.dumps(result["decisions"], indent=1))
    print(f"{len(result['rows'])} cells in {result['seconds']} s, {len(failed)} wrong: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
