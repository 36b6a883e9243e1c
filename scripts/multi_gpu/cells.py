"""One cell of the grid: run it, and make rows of what its processes report."""

import sys
import time
from typing import Any

from bench_common import PeakMemory, gpu_key, percentiles, random_prompts

from multi_gpu.placement import Machine
from multi_gpu.processes import Failed, bench_serve, check_tokens, run_job, servers

# Of the keys of a row; a row of a cell that failed holds `error` in place of its figures.
FIGURES = (
    "output_tokens_per_s", "output_tokens_per_s_per_device", "ttft_ms", "tpot_ms",
    "peak_memory_bytes", "scaling_efficiency", "rows_equal_to_loop", "floor",
)  # fmt: skip
TRIO = ("base", "expert", "antiexpert")
# vLLM's client sends text, and random tokens may come back from it as a few more.
TEXT_SLACK = 16


class Bench:
    """Everything that the cells share: models, machine, options, and rows so far."""

    def __init__(self, args: Any, about: dict[str, Any]) -> None:
        from proxy_vllm.plan.model_size import model_shape

        self.args, self.about = args, about
        self.models = {r: getattr(args, r) for r in (*TRIO, "tuned") if getattr(args, r)}
        self.shapes = {role: model_shape(path) for role, path in self.models.items()}
        self.vocab = min(shape.vocab_size for shape in self.shapes.values())
        self.machine = Machine.here()
        self.rows: list[dict[str, Any]] = []
        self.loop_tokens: dict[int, list[list[int]]] = {}

    def job(self, system: str, tp: int) -> dict[str, Any]:
        args = self.args
        return {
            "system": system, "tp": tp, "models": self.models, "vocab": self.vocab,
            "dtype": args.dtype, "batches": args.batch, "warmups": args.warmups,
            "input_len": args.input_len, "output_len": args.output_len,
            "engine_args": args.engine_args,
        }  # fmt: skip

    def environments(self, replicas: int, tp: int) -> list[dict[str, str]]:
        extra = self.args.environment
        return [{**self.machine.environment(i, replicas, tp), **extra} for i in range(replicas)]

    def check(self, tp: int) -> dict[str, Any]:
        """The engine under test against the Transformers models; raises `Failed` on a fault."""
        result = check_tokens(self.job("proxy", tp), self.environments(1, tp)[0])
        if not result["passed"]:
            raise Failed(f"tokens differ from the Transformers loop's: {result}")
        return result

    def offline(self, system: str, replicas: int, tp: int) -> None:
        """`replicas` engines (or one loop), each with every batch."""
        cell = {"system": system, "mode": "batch", "replicas": replicas, "tp": tp}
        if reason := self.machine.check(replicas, tp):
            self._fail([{**cell, "batch": b} for b in self.args.batch], reason)
            return
        try:
            results, peak = run_job(
                self.job(system, tp),
                self.environments(replicas, tp),
                self.machine.indices(replicas * tp),
            )
        except Failed as error:
            self._fail([{**cell, "batch": b} for b in self.args.batch], str(error))
            return
        for batch in self.args.batch:
            parts = [r[batch] for r in results]
            if system == "loop":
                self.loop_tokens[batch] = parts[0]["tokens"]
            same = system in ("proxy", "loop")
            self._add({**cell, "batch": batch}, parts, peak, parts[0]["tokens"] if same else None)

    def served(self, system: str, replicas: int, tp: int) -> None:
        """One server with `replicas` data-parallel engines, asked by vLLM's own client."""
        args = self.args
        cell = {"system": system, "mode": "rate", "replicas": replicas, "tp": tp}
        cells = [{**cell, "request_rate": rate} for rate in args.request_rate]
        if reason := self.machine.check(replicas, tp):
            self._fail(cells, reason)
            return
        try:
            with servers([self._spec(system, replicas, tp)]) as (server,):
                for current in cells:
                    gpus = self.machine.indices(replicas * tp)
                    memory = PeakMemory([server.process.pid], gpus)
                    rate = current["request_rate"]
                    result, command = bench_serve(server, self.models["base"], rate, args)
                    self._add_served(current, result, memory.stop(), command)
        except Failed as error:
            done = [c for c in cells if not any(c.items() <= r.items() for r in self.rows)]
            self._fail(done, str(error))

    def remote(self) -> None:
        """Three plain servers, and a client that combines their top logprobs."""
        from remote_logprobs import generate

        cell = {"system": "remote-logprobs", "mode": "batch", "replicas": 1, "tp": 1}
        cells = [{**cell, "batch": b} for b in self.args.batch]
        specs = [self._spec(role, 1, 1, share=i) for i, role in enumerate(TRIO)]
        devices = min(3, max(1, len(self.machine.gpus)))
        try:
            with servers(specs) as running:
                urls = {s.name: s.url for s in running}
                for current in cells:
                    batch, args = current["batch"], self.args
                    prompts = random_prompts(batch, args.input_len, self.vocab, seed=0)
                    generate(urls, prompts, min(2, args.output_len), logprobs=args.logprobs)
                    gpus = self.machine.indices(devices)
                    memory = PeakMemory([s.process.pid for s in running], gpus)
                    start = time.time()
                    out = generate(urls, prompts, args.output_len, logprobs=args.logprobs)
                    end = time.time()
                    gaps = [1e3 * (b - a) for a, b in zip(out.times, out.times[1:])]
                    part = {
                        "start": start, "end": end, "tokens": out.tokens,
                        "ttft_ms": [1e3 * out.times[0]] * batch,
                        "tpot_ms": [sum(gaps) / len(gaps)] * batch if gaps else [],
                    }  # fmt: skip
                    self._add(current, [part], memory.stop(), out.tokens, devices)
        except (Failed, SystemExit) as error:
            done = [c for c in cells if not any(c.items() <= r.items() for r in self.rows)]
            self._fail(done, str(error))

    def _spec(self, system: str, replicas: int, tp: int, share: int | None = None) -> dict:
        args = {
            "dtype": self.args.dtype,
            "max_model_len": self.args.input_len + self.args.output_len + TEXT_SLACK,
            **self.args.engine_args,
        }
        env = self.machine.server_environment(replicas, tp)
        if share is not None:
            args["max_logprobs"] = self.args.logprobs
            env = self.machine.environment(share, 3, 1)
            if 0 < len(self.machine.gpus) < 3:
                args.setdefault("gpu_memory_utilization", 0.9 / (4 - len(self.machine.gpus)))
        # Servers keep vLLM's own processes, which the offline engines may do without.
        env = {**env, **self.args.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return {"system": system, "models": self.models, "engine_args": args,
                "dp": replicas, "tp": tp, "env": env}  # fmt: skip

    def _add(self, cell: dict, parts: list[dict], peak: int, tokens: Any, devices: int = 0) -> None:
        devices = devices or cell["replicas"] * cell["tp"]
        produced = sum(len(row) for part in parts for row in part["tokens"])
        took = max(p["end"] for p in parts) - min(p["start"] for p in parts)
        want = self.loop_tokens.get(cell["batch"])
        equal = None
        if tokens is not None and want is not None:
            equal = round(sum(a == b for a, b in zip(tokens, want)) / len(want), 4)
        figures = {
            "output_tokens_per_s": round(produced / took, 3),
            "ttft_ms": percentiles([x for p in parts for x in p["ttft_ms"]]),
            "tpot_ms": percentiles([x for p in parts for x in p["tpot_ms"]]),
            "peak_memory_bytes": peak,
            "rows_equal_to_loop": equal,
        }
        self._row(cell, devices, figures)

    def _add_served(self, cell: dict, result: dict, peak: int, command: str) -> None:
        def of(metric: str) -> dict:
            return {f"p{p}": round(result[f"p{p}_{metric}_ms"], 4) for p in (20, 50, 80, 99)}

        if result["completed"] != self.args.num_prompts:
            raise Failed(f"{result['completed']} of {self.args.num_prompts} requests succeeded")
        figures = {
            "output_tokens_per_s": round(result["output_throughput"], 3),
            "ttft_ms": of("ttft"),
            "tpot_ms": of("tpot"),
            "peak_memory_bytes": peak,
            "rows_equal_to_loop": None,
        }
        row = self._row(cell, cell["replicas"] * cell["tp"], figures)
        row["client_command"] = command

    def _row(self, cell: dict, devices: int, figures: dict) -> dict:
        rate = figures["output_tokens_per_s"] / devices
        row = {
            **{"batch": None, "request_rate": None}, **cell, "devices": devices,
            **figures, "output_tokens_per_s_per_device": round(rate, 3), "error": None,
            "input_len": self.args.input_len, "output_len": self.args.output_len,
            "dtype": self.args.dtype, "floor": self.floor(cell, figures), **self.about,
        }  # fmt: skip
        row["scaling_efficiency"] = self._efficiency(row)
        self.rows.append(row)
        print(_short(row), file=sys.stderr, flush=True)
        return row

    def _efficiency(self, row: dict) -> float | None:
        """Rate a device, as a share of that of the same system's first cell; None without one."""
        same = ("system", "mode", "batch", "request_rate")
        for first in [*self.rows, row]:
            if all(first[k] == row[k] for k in same) and first["error"] is None:
                own = row["output_tokens_per_s_per_device"]
                return round(own / first["output_tokens_per_s_per_device"], 4)
        return None

    def floor(self, cell: dict, figures: dict) -> dict | None:
        """The roofline's least step beside what was measured; None on unknown devices.

        ``share`` is its part of the measured TPOT, ``ratio`` the base's least step over it: the
        speed to expect, as a share of the base alone.

        A server's batch varies, so its floor is that of one row.
        """
        from proxy_vllm.plan.gpus import find_gpu
        from proxy_vllm.plan.model_size import DTYPE_BYTES
        from proxy_vllm.plan.roofline import step_floor

        key = self.args.gpu or gpu_key(self.about["device"])
        if key is None:
            return None
        system, args = cell["system"], self.args
        roles = (system,) if system in self.shapes else TRIO
        batch = cell.get("batch") or 1

        def step_of(roles: tuple[str, ...]) -> float:
            return step_floor(
                [self.shapes[r] for r in roles], find_gpu(key), batch=batch, tp=cell["tp"],
                context=args.input_len + args.output_len // 2, dtype_bytes=DTYPE_BYTES[args.dtype],
            ).step_ms  # fmt: skip

        least, tpot = step_of(roles), figures["tpot_ms"]
        share = float(f"{least / tpot['p50']:.4g}") if tpot and tpot["p50"] else None
        return {
            "gpu": key, "batch": batch, "step_ms": float(f"{least:.5g}"), "share": share,
            "ratio": float(f"{step_of(('base',)) / least:.4g}"),
        }  # fmt: skip

    def _fail(self, cells: list[dict], reason: str) -> None:
        for cell in cells:
            row = {"batch": None, "request_rate": None, **cell, **dict.fromkeys(FIGURES)}
            self.rows.append({**row, "error": reason, **self.about})
            print(_short(self.rows[-1]), file=sys.stderr, flush=True)


def _short(row: dict) -> str:
    load = f"batch {row['batch']}" if row["batch"] else f"{row['request_rate']} requests/s"
    what = f"{row['system']} x{row['replicas']} TP{row['tp']} {load}"
    if row["error"]:
        return f"{what}: FAILED: {row['error']}"
    tpot = row["tpot_ms"]["p50"] if row["tpot_ms"] else "-"
    floor = row["floor"]
    floor = f", floor {floor['step_ms']} ms ({floor['ratio']} x base's speed)" if floor else ""
    return f"{what}: {row['output_tokens_per_s']} tokens/s, TPOT p50 {tpot} ms{floor}"
