"""What GPUs can do: figures of those that users ask about, and of any other that they give."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from proxy_vllm.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory bandwidth, dense bfloat16 tensor rate without sparsity, memory."""

    name: str
    bandwidth_tbps: float  # 1e12 bytes a second
    tflops: float  # 1e12 operations a second
    memory_gib: float
    source: str = "data sheet"


# memory_gib is what is left to a program (a little under the name's figure, as ECC and the driver
# take their share). A measured copy reaches about nine tenths of a data sheet's bandwidth.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 8.0, 2250.0, 178.3),
        Gpu("h200", 4.3, 790.0, 139.8, "measured copy and bfloat16 matmul"),
        Gpu("h100-sxm", 3.35, 989.0, 79.1),
        Gpu("h100-pcie", 2.0, 756.0, 79.1),
        Gpu("h100-nvl", 3.9, 835.0, 93.1),
        Gpu("a100-80g", 2.039, 312.0, 79.1),
        Gpu("a100-40g", 1.555, 312.0, 39.4),
        Gpu("l40s", 0.864, 362.0, 44.4),
        Gpu("l4", 0.3, 121.0, 22.0),
        Gpu("a10g", 0.6, 70.0, 22.0),
        Gpu("rtx4090", 1.008, 165.0, 23.5),
        Gpu("rtx3090", 0.936, 71.0, 23.5),
        Gpu("mi300x", 5.3, 1307.0, 191.5),
    )
}


def find_gpu(
    name: str | None,
    *,
    bandwidth_tbps: float | None = None,
    tflops: float | None = None,
    memory_gib: float | None = None,
) -> Gpu:
    """The GPU called `name`, with any figure replaced; or one made of the three figures.

    Raises `UserError` for a name that is not in `GPUS` unless all three figures are given.
    """
    given = {"bandwidth_tbps": bandwidth_tbps, "tflops": tflops, "memory_gib": memory_gib}
    for key, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{key.replace('_', '-')} {value}: give a positive number")
    figures = {key: value for key, value in given.items() if value is not None}
    known = GPUS.get((name or "").lower())
    if known is None:
        if len(figures) < len(given):
            what = "no GPU given" if name is None else f"unknown GPU {name!r}"
            raise UserError(
                f"{what}: choose one of {', '.join(GPUS)}, "
                "or give --bandwidth-tbps, --tflops and --memory-gib"
            )
        return Gpu(name or "custom", **figures, source="given")
    if not figures:
        return known
    source = "given" if len(figures) == len(given) else f"{known.source}, in part given"
    return Gpu(**{**asdict(known), **figures, "source": source})
