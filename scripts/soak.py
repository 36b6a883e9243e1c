#!/usr/bin/env python
"""Endurance: thousands of requests of every kind on one server, or on two replicas that are killed.

    python scripts/soak.py --json benchmarks/results/soak_cpu.json
    python scripts/soak.py --replicas --requests 2000 --json benchmarks/results/soak_ray_cpu.json

The trio in the box, a KV cache that is too small for what may run at once, bursts above
`--max-num-seqs`, and a third of the clients hang up in the middle. Greedy and seeded answers must
be those that the same server gave when asked alone, and greedy ones those of three Transformers
models; every request is answered once or refused with a reason. Memory, file handles and threads of
every process are recorded. At the end SIGTERM comes while requests run: they finish. With
`--replicas`, two engines are killed; requests that met it are asked again. Exit status 1 if any
of that did not hold.
"""

import argparse
import asyncio
import json
import random
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from bench_common import provenance, result_file, script_argv, write_result
from soaking.asking import Ask, Client, Tally, make_asks
from soaking.servers import Replicas, Server
from soaking.watching import Watcher, grown, judged

BURSTS = (4, 16, 48, 8, 32)  # 16 run at once


def loop_check(asks: list[Ask]) -> int:
    """Compare known greedy answers with three Transformers models; how many were compared."""
    import torch
    from reference_loop import Trio, greedy
    from transformers import AutoTokenizer

    from proxy_vllm.demo import model_path

    folders = [str(model_path(role)) for role in ("base", "expert", "antiexpert")]
    trio, tokenizer = Trio.load(*folders, torch.float32), AutoTokenizer.from_pretrained(folders[0])
    compared = 0
    for ask in asks:
        if ask.kind != "greedy":
            continue
        alpha = ask.body.get("vllm_xargs", {}).get("proxy_alpha", 1.0)
        ids, _ = greedy(
            trio, tokenizer(ask.body["prompt"]).input_ids, ask.body["max_tokens"], alpha,
            [tokenizer.eos_token_id],
        )  # fmt: skip
        want = tokenizer.decode(ids, skip_special_tokens=True)
        if want != ask.text:
            raise RuntimeError(f"{ask.body}: {ask.text!r}, Transformers' loop {want!r}")
        compared += 1
    return compared


async def soak(server: Server, args: argparse.Namespace, tally: Tally) -> dict[str, Any]:
    from proxy_vllm.demo.problems import make_problems

    rng = random.Random(args.seed)
    asks = make_asks([p.prompt for p in make_problems("test", args.questions, 0)], args.seed)
    kills: list[str] = []
    async with Client(server.url, tally, retries=40 if args.replicas else 0) as client:
        await client.know(asks)
        compared = await asyncio.to_thread(loop_check, asks)
        print(f"{len(asks)} requests known, {compared} as Transformers' loop", file=sys.stderr)
        watcher = Watcher(server.process, args.sample_seconds)
        watcher.start()
        begun = time.monotonic()
        done = burst = 0
        kill_at = [args.requests // 3, 2 * args.requests // 3] if args.replicas else []
        while done < args.requests and time.monotonic() - begun < 60 * args.minutes:
            size = min(BURSTS[burst % len(BURSTS)], args.requests - done)
            burst += 1
            wave = []
            for _ in range(size):
                ask = rng.choice(asks)
                leaves = ask.refused is None and rng.random() < 0.45  # some are answered before
                wave.append(client.ask(ask, rng.uniform(0.002, 0.15) if leaves else None))
            killing = None
            if kill_at and done >= kill_at[0]:
                kill_at.pop(0)
                assert isinstance(server, Replicas)
                # On a busy machine the one killed before may still be starting.
                await asyncio.to_thread(server.wait_until, lambda: len(server.engines()) == 2, 180)
                killing = asyncio.create_task(kill_an_engine(server, kills))
            await asyncio.gather(*wave)
            if killing is not None:
                await killing
            done += size
            if burst % 50 == 0:
                print(f"{done} requests, {len(tally.wrong)} wrong", file=sys.stderr, flush=True)
        seconds = time.monotonic() - begun
        watcher.sample()
        trends = watcher.stop()
        state = {} if args.replicas else await settle(server)
        end = await end_while_running(server, client, asks, rng)
    return {
        "requests": done,
        "requests_wanted": args.requests,
        "seconds": round(seconds, 1),
        "requests_per_s": round(done / seconds, 2),
        "known_before": {"asked_alone": sum(a.text is not None for a in asks), "loop": compared},
        "killed": kills,
        "server_at_rest": state,
        "end": end,
        "processes": trends,
    }


async def kill_an_engine(server: Server, kills: list[str]) -> None:
    assert isinstance(server, Replicas)
    await asyncio.sleep(0.3)  # in the middle of a burst
    engine = server.engines()[0]
    kills.append(f"engine {engine.pid}")
    engine.kill()


async def settle(server: Server) -> dict[str, float]:
    """Nothing may be left running, also of the clients that hung up."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    for _ in range(60):
        left = {name: await asyncio.to_thread(server.metric, name) for name in names}
        if not any(left.values()):
            break
        await asyncio.sleep(0.5)
    left["vllm:num_preemptions"] = await asyncio.to_thread(
        server.metric, "vllm:num_preemptions_total"
    )
    return left


async def end_while_running(
    server: Server, client: Client, asks: list[Ask], rng: random.Random
) -> dict[str, Any]:
    """SIGTERM (to Ray: SIGINT) while a burst runs."""
    chosen = [ask for ask in asks if ask.kind in ("greedy", "stream", "seeded")]
    tally, client.tally, client.retries = client.tally, Tally(), 0
    wave = asyncio.gather(*(client.ask(rng.choice(chosen)) for _ in range(32)))
    await asyncio.sleep(0.2)
    family = server.family()
    server.terminate()
    begun = time.monotonic()
    await wave
    status = await asyncio.to_thread(server.process.wait, 180)
    last, client.tally = client.tally, tally
    await asyncio.sleep(2)
    return {
        "in_flight": last.as_dict(),
        "exit_status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "processes_left": sum(
            p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family
        ),
    }


def faults(result: dict[str, Any], tally: Tally, args: argparse.Namespace) -> list[str]:
    found = [*tally.wrong, *tally.lost]
    counted = sum(sum(c.values()) for c in (tally.answered, tally.refused, tally.hung_up))
    wrong = sum(tally.asked.values()) - counted - len(tally.lost)
    if wrong > len(tally.wrong):
        found.append(f"{wrong} requests are unaccounted for")
    at_rest, end = result["server_at_rest"], result["end"]
    if not args.replicas:
        if at_rest["vllm:num_requests_running"] or at_rest["vllm:num_requests_waiting"]:
            found.append(f"requests are left over: {at_rest}")
        if not at_rest["vllm:num_preemptions"]:
            found.append("nothing was preempted: the KV cache is too large for this test")
        if end["in_flight"]["wrong"] or end["in_flight"]["lost"] or end["exit_status"] != 0:
            found.append(f"the end: {end}")
    elif len(result["killed"]) != 2:
        found.append(f"killed {result['killed']}, not two engines")
    if end["processes_left"]:
        found.append(f"{end['processes_left']} processes are left behind")
    if not args.replicas:
        found += grown(result["processes"], args.growth_mib, 8)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=int, default=10000)
    add("--minutes", type=float, default=60, help="stop asking then")
    add("--questions", type=int, default=20, help="different prompts, each in 8 kinds of request")
    add("--replicas", action="store_true", help="two replicas on Ray Serve, with two kills")
    add("--seed", type=int, default=0)
    add("--sample-seconds", type=float, default=10)
    add("--growth-mib", type=float, default=24, help="that a process may grow in the second half")
    add("--engine-args", default="--enforce-eager", help="options of the server, in one string")
    add("--json", type=result_file, help="write the result here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        kind = Replicas if args.replicas else Server
        server = kind(Path(folder), shlex.split(args.engine_args))
        try:
            result = asyncio.run(soak(server, args, tally))
            log = server.log.read_text()
        finally:
            server.end()
    result = {**provenance(script_argv("soak.py")), **result, "tally": tally.as_dict()}
    # Where vLLM logged errors; one of a cut tool call is the parser's way to say so.
    result["errors_in_log"] = Counter(re.findall(r" ERROR \S+ \S+ \[(\S+:\d+)\] Traceback", log))
    found = faults(result, tally, args)
    # None in a run of under two minutes, and a killed replica's successor begins small.
    result["growth_judged"] = [] if args.replicas else sorted(judged(result["processes"]))
    result["faults"] = [text[:400] for text in found[:30]]
    print(json.dumps(result, indent=2))
    write_result(args.json, result)
    if found:
        sys.exit(f"soak.py: error: {len(found)} faults, the first: {found[0][:400]}")


if __name__ == "__main__":
    main()
