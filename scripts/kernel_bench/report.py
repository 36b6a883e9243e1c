"""What the rows of bench_kernels.py say: the decisions that hang on them, and the plot."""

from pathlib import Path

KINDS = ("greedy", "plain", "top-p", "top-k+top-p", "mixed")


CELL = ("source", "vocab", "batch", "dtype", "kind", "logits")


def ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a and b else None


def decisions(rows: list[dict]) -> dict:
    """What the settings and targets hang on, read off the rows; None where a row is missing.

    Of bfloat16 and the first vocabulary measured, which is the one that the targets are stated for.
    """
    batches = sorted({row["batch"] for row in rows})
    vocab = rows[0]["vocab"] if rows else None

    def of(provider: str, batch: int, kind: str, field: str = "p50_us") -> float | None:
        source = "logits" if provider in ("proxy", "eager+vllm") else "heads"
        wanted = dict(zip(CELL, (source, vocab, batch, "bfloat16", kind, "peaked")))
        wanted["provider"] = provider
        return next((row[field] for row in rows if wanted.items() <= row.items()), None)

    def table(kinds, value) -> dict[str, float | None]:
        return {f"{kind} {batch}": value(kind, batch) for kind in kinds for batch in batches}

    fused = table(
        ("greedy", "plain"),
        lambda kind, batch: ratio(of("heads+proxy", batch, kind), of("fused_head", batch, kind)),
    )
    worth = 0
    for batch in batches:
        gains = [fused[f"{kind} {batch}"] for kind in ("greedy", "plain")]
        if any(gain is None or gain < 1 for gain in gains):
            break
        worth = batch
    result = {
        "graph_speedup_of_heads_and_sampler": table(
            ("greedy", "plain", "mixed"),
            lambda kind, batch: ratio(
                of("heads+proxy", batch, kind, "eager_us"), of("heads+proxy", batch, kind)
            ),
        ),
        "fused_head_speedup": fused,
        "fused_head_max_batch": worth,
        "share_of_copy": table(("plain",), lambda k, b: of("proxy", b, k, "share_of_copy")),
        "us_at_batch_1": of("proxy", 1, "plain"),
        "speedup_over_eager_and_vllm": table(
            KINDS,
            lambda kind, batch: ratio(of("eager+vllm", batch, kind), of("proxy", batch, kind)),
        ),
        "slower_than_flashinfer": slower_than(rows, "eager+flashinfer"),
    }
    return {**result, "targets_met": targets_met(rows, result)}


def targets_met(rows: list[dict], read: dict) -> dict[str, bool | None]:
    """Whether each target for an H200 holds in every batch measured; None where none was."""

    def every(values: list[float | None], least: float) -> bool | None:
        known = [value for value in values if value is not None]
        return min(known) >= least if known else None

    large = {r["batch"] for r in rows if r["batch"] >= 64}
    first, speedups = read["us_at_batch_1"], read["speedup_over_eager_and_vllm"]
    peers = any(row["provider"] == "eager+flashinfer" for row in rows)
    return {
        "80 % of copy bandwidth from batch 64": every(
            [read["share_of_copy"][f"plain {batch}"] for batch in large], 0.8
        ),
        "under 10 us at batch 1": None if first is None else first < 10,
        "3 times eager and vLLM, plain": every(
            [v for name, v in speedups.items() if name.startswith("plain ")], 3
        ),
        "1.5 times eager and vLLM, top-k + top-p": every(
            [v for name, v in speedups.items() if name.startswith("top-k+top-p ")], 1.5
        ),
        "faster than FlashInfer in every cell": (
            not read["slower_than_flashinfer"] if peers else None
        ),
    }


def slower_than(rows: list[dict], peer: str) -> list[dict]:
    """Cells, of any size and dtype, in which `proxy` takes longer than the peer."""
    ours = {tuple(r[k] for k in CELL): r["p50_us"] for r in rows if r["provider"] == "proxy"}
    cells = []
    for row in rows:
        own = ours.get(tuple(row[k] for k in CELL))
        if row["provider"] == peer and own is not None and own > row["p50_us"]:
            cells.append({k: row[k] for k in CELL} | {"p50_us": row["p50_us"], "ours_us": own})
    return cells


def plot(result: dict, path: Path) -> None:
    """Median against batch, one panel a kind; the first vocabulary of the results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if r["dtype"] == "bfloat16"]
    vocab = rows[0]["vocab"]
    panels = [("logits", k, "peaked") for k in KINDS] + [("logits", "top-p", "flat")]
    panels += [("heads", k, "peaked") for k in ("plain", "mixed")]
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), sharex=True)
    for axis, (source, kind, shape) in zip(axes.flat, panels):
        chosen = [
            r for r in rows
            if (r["source"], r["kind"], r["logits"], r["vocab"]) == (source, kind, shape, vocab)
        ]  # fmt: skip
        for name in dict.fromkeys(r["provider"] for r in chosen):
            mine = [r for r in chosen if r["provider"] == name]
            axis.errorbar(
                [r["batch"] for r in mine],
                [r["p50_us"] for r in mine],
                yerr=[
                    [r["p50_us"] - r["p20_us"] for r in mine],
                    [r["p80_us"] - r["p50_us"] for r in mine],
                ],
                marker="o",
                capsize=3,
                label=name,
            )
        axis.set(xscale="log", yscale="log", title=f"{source}, {kind}, {shape}")
        axis.set(xlabel="batch", ylabel="microseconds")
        if chosen:
            axis.legend(fontsize=7)
    figure.suptitle(f"{result['device']}, V = {vocab}, bfloat16, median with p20 to p80")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
