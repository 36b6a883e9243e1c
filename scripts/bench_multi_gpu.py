#!/usr/bin/env python
"""Proxy-tuned decoding over replicas and tensor-parallel sizes, beside what else one could do.

    python scripts/bench_multi_gpu.py BASE --expert E --antiexpert A [--tuned D] \
        --replicas 1 2 4 --tp 1 2 --batch 8 64 --request-rate 4 \
        --json benchmarks/results/multi_gpu.json
    python scripts/bench_multi_gpu.py --smoke --json /tmp/smoke.json     # the trio in the box, CPU

Peers in the same run: the base, the expert and (if given) the directly tuned model alone in vLLM;
the Transformers loop; and three vLLM servers whose top logprobs a client combines. Batches run
offline, one engine a replica, each batch started by all replicas together; request rates run
against one server (`--data-parallel-size`) under `proxy-vllm bench serve`. Each figure comes from
processes of its own. Nothing is measured unless the engine's tokens equal the Transformers models'
choice. The Markdown table (.md) and the plot (.png) are written beside the JSON.
"""

import argparse
import json
import signal
import sys

from bench_common import ROOT, TOLERANCE, provenance, result_file, script_argv

SYSTEMS = ("proxy", "base", "expert", "tuned", "loop", "remote-logprobs")
SMOKE = {
    "replicas": [1, 2], "tp": [1], "batch": [2], "request_rate": [4.0], "num_prompts": 4,
    "input_len": 16, "output_len": 8, "dtype": "float32", "peers_once": True,
    "rate_systems": ["proxy"], "warmups": 1,
    "engine_args": {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, "block_size": 32},
    "environment": {
        "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    },
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", nargs="?", help="the large model")
    add("--expert")
    add("--antiexpert")
    add("--tuned", help="the directly tuned large model")
    add("--smoke", action="store_true", help="the trio in the box and tiny loads, for a CPU")
    add("--replicas", type=int, nargs="+", default=[1])
    add("--tp", type=int, nargs="+", default=[1], help="tensor-parallel sizes")
    add("--batch", type=int, nargs="*", default=[8, 64], help="requests at once, each replica")
    add("--request-rate", type=float, nargs="*", default=[], help="requests a second to a server")
    add("--num-prompts", type=int, default=200, help="requests of each rate")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--rate-systems", nargs="*", choices=SYSTEMS[:4], default=list(SYSTEMS[:4]))
    add("--peers-once", action="store_true", help="peers on the first cell of the grid alone")
    add("--input-len", type=int, default=512)
    add("--output-len", type=int, default=128)
    add("--logprobs", type=int, default=100, help="of the logprob way (default: 100)")
    add("--warmups", type=int, default=2)
    add("--dtype", choices=list(TOLERANCE), default="bfloat16")
    add("--gpu", help="name in proxy_vllm.plan.gpus.GPUS, where the device's own is not known")
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="for every engine")
    add("--json", type=result_file, help="write the result here, with .md and .png beside")
    args = parser.parse_args(argv)
    args.environment = {}
    if args.smoke:
        from proxy_vllm.demo import model_path

        given = sys.argv[1:] if argv is None else argv
        for name, value in SMOKE.items():
            if f"--{name.replace('_', '-')}" not in given:
                setattr(args, name, value)
        for role in ("base", "expert", "antiexpert", "tuned"):
            setattr(args, role, getattr(args, role) or str(model_path(role)))
    if not (args.base and args.expert and args.antiexpert):
        parser.error("name BASE, --expert and --antiexpert, or give --smoke")
    for name in ("replicas", "tp", "batch", "input_len", "output_len", "num_prompts"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: whole numbers from 1")
    if not (args.batch or args.request_rate):
        parser.error("give --batch, --request-rate, or both")
    return args


def measure(args: argparse.Namespace) -> dict:
    """Run the grid and return the JSON's content."""
    from multi_gpu.cells import Bench

    about = provenance(script_argv("bench_multi_gpu.py"))
    bench = Bench(args, about)
    # Few devices first: the first cell of a system is what its scaling is held against.
    grid = sorted(((r, t) for r in args.replicas for t in args.tp), key=lambda c: c[0] * c[1])
    checked = bench.check(grid[0][1])
    print(f"token-exact: {checked}", file=sys.stderr, flush=True)

    def on_grid(system: str) -> list[tuple[int, int]]:
        return grid[:1] if args.peers_once and system != "proxy" else grid

    if args.batch:
        if "loop" in args.systems:  # first: others are held against its tokens
            bench.offline("loop", 1, 1)
        for system in SYSTEMS[:4]:
            if system in args.systems and (system in bench.models or system == "proxy"):
                for replicas, tp in on_grid(system):
                    bench.offline(system, replicas, tp)
        if "remote-logprobs" in args.systems:
            bench.remote()
    for system in args.rate_systems if args.request_rate else ():
        if system in args.systems and (system in bench.models or system == "proxy"):
            for replicas, tp in on_grid(system):
                bench.served(system, replicas, tp)
    return {**about, "models": bench.models, "correctness": checked, "rows": bench.rows}


def main() -> None:
    from multi_gpu.processes import Failed
    from multi_gpu.report import markdown, plot

    from proxy_vllm.errors import UserError

    # An end by SIGTERM must end servers and replicas too, which `finally` does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse()
    try:
        result = measure(args)
    except (Failed, UserError, OSError) as error:
        sys.exit(f"bench_multi_gpu.py: error: {error}")
    table = markdown(result)
    print(table)
    if path := args.json:
        # The models in the box have the same names in every checkout.
        path.write_text(json.dumps(result, indent=2).replace(f"{ROOT}/", "") + "\n")
        path.with_suffix(".md").write_text(table)
        plot(result, path.with_suffix(".png"))
    if failed := [row for row in result["rows"] if row["error"]]:
        sys.exit(f"bench_multi_gpu.py: error: {len(failed)} of {len(result['rows'])} rows failed")


if __name__ == "__main__":
    main()
