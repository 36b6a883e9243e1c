"""Which GPUs, or which processor cores, each replica of a grid cell gets."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What there is to place on: GPU indices, or none and the processor's cores."""

    gpus: tuple[str, ...]
    cores: tuple[int, ...]

    @classmethod
    def here(cls) -> "Machine":
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        names = [x.strip() for x in visible.split(",")] if visible else map(str, range(count))
        return cls(tuple(names)[:count], tuple(sorted(os.sched_getaffinity(0))))

    def check(self, replicas: int, tp: int) -> str | None:
        """Why so many replicas of `tp` ranks do not fit here, or None."""
        need = replicas * tp
        if self.gpus:
            if need > len(self.gpus):
                return f"{replicas} x TP {tp} needs {need} GPUs, there are {len(self.gpus)}"
        elif need > len(self.cores):
            return f"{replicas} x TP {tp} needs {need} cores, there are {len(self.cores)}"
        return None

    def environment(self, index: int, replicas: int, tp: int) -> dict[str, str]:
        """Variables that give process `index` of `replicas` its own `tp` GPUs or its cores."""
        if self.gpus:
            first = index * tp if replicas * tp <= len(self.gpus) else index % len(self.gpus)
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[first : first + tp])}
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(self._shares(index, replicas, tp))}

    def server_environment(self, data_parallel: int, tp: int) -> dict[str, str]:
        """The same for one server that holds all replicas."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[: data_parallel * tp])}
        shares = [s for i in range(data_parallel) for s in self._shares(i, data_parallel, tp)]
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(shares)}

    def _shares(self, index: int, replicas: int, tp: int) -> list[str]:
        """Core lists of the ranks of one replica; processes beyond the cores share them."""
        each = max(1, len(self.cores) // (replicas * tp))
        shares = []
        for rank in range(index * tp, (index + 1) * tp):
            first = rank * each % len(self.cores)
            shares.append(",".join(map(str, self.cores[first : first + each])))
        return shares

    def indices(self, used: int) -> list[int]:
        """NVML indices of the first `used` GPUs; empty on a CPU."""
        return [int(x) for x in self.gpus[:used] if x.isdigit()]
