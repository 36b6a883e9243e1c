"""`proxy-vllm generate --replicas` on a local Ray of two CPUs: same answers, whatever dies."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from engines import SMALL, prompt_ids, running
from reference_loop import Trio, greedy

from proxy_vllm.batch.generator import BatchGenerator
from proxy_vllm.batch.request import LineOptions
from proxy_vllm.envs import cpu_runner
from proxy_vllm.errors import UserError

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.skipif(
    cpu_runner() == "v2", reason="what Ray does is the same on either runner"
)

# Room for whole prompts in a step, and prompts that live long enough for a kill to find them.
ENGINE = {**SMALL, "max_num_batched_tokens": 512, "max_num_seqs": 4}
BLOCK_ROWS = 8
BLOCKS = 4 + 3 + 3  # of 27 and 20 lines, and of row groups of 10 and 7 rows


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init(
        num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
    )
    yield
    ray.shutdown()


def make_rows(count=64):
    """Rows with ids, half greedy and half seeded, and alphas of their own."""
    rows = []
    for i, ids in enumerate(prompt_ids([2 + (5 * i) % 30 for i in range(count)], seed=9)):
        row = {"id": f"row-{i}", "prompt": ids, "max_tokens": 100, "ignore_eos": True}
        row["proxy_alpha"] = [1.0, 0.0, -1.0][i % 3]
        row.update({"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": 100 + i})
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def expected(trio):
    """What one engine in this process answers, by id; greedy rows checked against the loop."""
    rows = make_rows()
    with running(**{**trio, **ENGINE}) as llm:
        results = list(
            BatchGenerator(llm, LineOptions(token_ids=True)).run(enumerate(rows, start=1))
        )
    models = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    for row, result in list(zip(rows, results))[1:12:2]:
        tokens, _ = greedy(models, row["prompt"], row["max_tokens"], row["proxy_alpha"])
        assert result.output["token_ids"] == tokens
    return {result.id: result.output for result in results}


def write_input(folder: Path) -> Path:
    """The rows in another order, over JSONL files and a Parquet one, in a folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = make_rows()
    random.Random(6).shuffle(rows)
    (folder / "deep").mkdir(parents=True)
    for name, part in (("one.jsonl", rows[:27]), ("deep/two.jsonl", rows[27:47])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    columns = [{"seed": None, **row} for row in rows[47:]]  # Arrow takes the first row's for all
    pq.write_table(pa.Table.from_pylist(columns), folder / "three.parquet", row_group_size=10)
    return folder


def job(trio, source, target, replicas=2, **options):
    from proxy_vllm.batch.ray_job import RayJob

    arguments = {**trio, **ENGINE, **options.pop("llm_arguments", {})}
    return RayJob(
        [str(source)],
        str(target),
        arguments,
        replicas=replicas,
        block_rows=BLOCK_ROWS,
        lines=LineOptions(options.pop("defaults", {}), token_ids=True),
        **options,
    )


def blocks(target: Path) -> list[Path]:
    return sorted(target.glob("*.jsonl"))


def check(target: Path, expected) -> None:
    """Every row is answered once, as one engine answers it."""
    found = [json.loads(line) for path in blocks(target) for line in path.read_text().splitlines()]
    assert len(found) == len(expected)
    assert {row["id"]: row for row in found} == expected
    assert not any(name.startswith(".") for name in os.listdir(target))


def wait_for(condition, process=None, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the command ended early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def replicas_of(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in parent.children(recursive=True):
        try:
            # Ray names an actor's process after what it runs.
            if any("BlockWriter" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_replica_costs_no_row_and_two_answer_as_one(cluster, trio, expected, tmp_path):
    source, target = write_input(tmp_path / "in"), tmp_path / "out"
    status = []
    thread = threading.Thread(target=lambda: status.append(job(trio, source, target).run()))
    thread.start()
    wait_for(lambda: len(blocks(target)) >= 1 or not thread.is_alive())
    victims = replicas_of(psutil.Process())
    assert len(victims) == 2
    victims[0].send_signal(signal.SIGKILL)
    done = len(blocks(target))
    thread.join(timeout=300)
    assert status == [0]
    assert done < len(blocks(target)) == BLOCKS, "the kill came too late to show anything"
    check(target, expected)
    assert os.listdir(target / "_errors") == []


def test_a_killed_driver_is_resumed(cluster, trio, expected, tmp_path):
    source, target = write_input(tmp_path / "in"), tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    engine = {name: value for name, value in ENGINE.items() if name != "enforce_eager"}
    argv = [
        *(sys.executable, "-m", "proxy_vllm.cli.main", "generate", trio["model"]),
        *("--expert", trio["expert"], "--antiexpert", trio["antiexpert"]),
        *("-i", str(source), "-o", str(target), "--token-ids", "--enforce-eager"),
        *("--replicas", "1", "--ray-address", address, "--block-rows", str(BLOCK_ROWS)),
        *(f"--{name.replace('_', '-')}={value}" for name, value in engine.items()),
    ]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: len(blocks(target)) >= 2, process)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not replicas_of(psutil.Process()))  # Ray ends what the driver left
    kept = {path: path.stat().st_mtime_ns for path in blocks(target)}
    assert 2 <= len(kept) < BLOCKS, "the kill came too late to show anything"

    manifest = json.loads((target / "_manifest.json").read_text())
    with pytest.raises(UserError, match="holds results: --resume adds"):
        job(trio, source, target).run()
    defaults = json.loads(manifest["settings"]["defaults"])
    again = job(trio, source, target, resume=True, defaults=defaults)
    assert again.run() == 0
    check(target, expected)
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    # With nothing left to do, no replica starts.
    assert again.run() == 0


def test_bad_rows_and_files_in_a_folder_of_many(cluster, trio, expected, tmp_path, capfd):
    source, target = write_input(tmp_path / "in"), tmp_path / "out"
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone.jsonl: cannot read .No such file"):
        job(trio, source, target).run()
    assert not target.exists()
    bad = source / "bad.jsonl"
    bad.write_text('{"prompt": [5]}\n{"prompt": [5], "proxy_alpha": 99}\n{"prompt": "w5 w5"}\n')
    assert job(trio, source, target, replicas=1, skip_errors=True).run() == 1
    said = capfd.readouterr().err
    assert f"proxy-vllm: {source}/gone.jsonl: cannot read (No such file or directory)" in said
    assert f"proxy-vllm: {source}/bad.jsonl:2: proxy_alpha is 99" in said
    # 64 rows and the three of bad.jsonl, answered or not.
    assert re.search(
        r"^replica \w+: 67 prompts \([\d.]+/s\), \d+ output tokens \([\d.]+/s\)$", said, re.M
    )
    (bad_block,) = target.glob("bad-*.jsonl")
    answers = [json.loads(line) for line in bad_block.read_text().splitlines()]
    assert [row["id"] for row in answers] == [f"{bad}:1", f"{bad}:3"]
    errors = (target / "_errors" / bad_block.name).read_text().splitlines()
    (error,) = map(json.loads, errors)
    assert (error["file"], error["line"]) == (str(bad), 2)
    assert "proxy_alpha is 99" in error["error"]
    bad_block.unlink()
    check(target, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"llm_arguments": {"tensor_parallel_size": 2}, "replicas": 3},
            "3 replicas of 2 CPUs need 6 CPUs, and Ray has 2",
        ),
        ({"replicas": 0}, "must be at least 1"),
        ({"llm_arguments": {"expert": "/nowhere"}}, "expert '/nowhere': no such folder"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(
    cluster, trio, tmp_path, options, message, monkeypatch
):
    from proxy_vllm.batch import ray_job

    if "replicas" in options:  # heads of the tiny models do not divide, and are not the point
        monkeypatch.setattr(ray_job, "_validate_trio", lambda arguments: None)
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": [5]}\n')
    with pytest.raises(UserError, match=message):
        job(trio, source, tmp_path / "out", **options).run()


@pytest.mark.slow
def test_a_full_disk_keeps_the_blocks_so_far(cluster, trio, expected, tmp_path, small_disk):
    source, (disk, resize) = write_input(tmp_path / "in"), small_disk
    target = disk / "out"
    resize(40)
    with pytest.raises(UserError) as full:
        job(trio, source, target, replicas=1).run()
    kept = {path: path.read_bytes() for path in blocks(target)}
    assert f"{target}: cannot write (No space left on device)" in str(full.value)
    assert "\n" not in str(full.value)
    assert 0 < len(kept) < BLOCKS
    resize(4096)
    assert job(trio, source, target, replicas=1, resume=True).run() == 0
    check(target, expected)
    assert kept.items() <= {path: path.read_bytes() for path in blocks(target)}.items()


def test_rows_of_a_dataset(cluster, trio, expected):
    """The class that users give to ``map_batches``."""
    import ray.data

    from proxy_vllm import ProxyGenerator

    rows = [{"seed": None, **row, "note": i} for i, row in enumerate(make_rows(12))]
    rows.append({**rows[0], "id": "long", "prompt": [5] * 300, "note": 99})
    answered = ray.data.from_items(rows, override_num_blocks=3).map_batches(
        ProxyGenerator,
        fn_constructor_kwargs={**trio, **ENGINE, "token_ids": True},
        batch_size=5,
        concurrency=1,
        num_cpus=1,
    )
    found = {row["id"]: row for row in answered.take_all()}
    assert "maximum context length is 256" in found.pop("long")["error"]
    assert {i: row["note"] for i, row in found.items()} == {f"row-{i}": i for i in range(12)}
    for request_id, row in found.items():
        for name, value in expected[request_id].items():
            assert row[name] == value


@pytest.mark.slow
def test_chats_of_an_instruct_twin_end_by_themselves(tmp_path, cluster):
    """Replicas show the expert: its template, its end token, its sampling defaults."""
    from transformers import AutoTokenizer
    from twins import ANSWER, FAMILIES, write_twins

    folders = write_twins("llama-3.1", tmp_path / "twins")
    tokenizer = AutoTokenizer.from_pretrained(folders["expert"])
    end = tokenizer.convert_tokens_to_ids(FAMILIES["llama-3.1"].ends[0])
    source = tmp_path / "in.jsonl"
    message = {"role": "user", "content": "What is the capital of France?"}
    rows = [{"id": f"row-{i}", "messages": [message], "max_tokens": 12} for i in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    target = tmp_path / "out"
    assert job(folders, source, target).run() == 0
    lines = [line for path in blocks(target) for line in path.read_text().splitlines()]
    answers = [json.loads(line) for line in lines]
    assert len(answers) == len(rows)
    for answer in answers:
        assert (answer["text"].strip(), answer["finish_reason"]) == (ANSWER, "stop")
        assert answer["token_ids"][-1] == end
