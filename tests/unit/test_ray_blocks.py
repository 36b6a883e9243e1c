"""Blocks of a Ray batch, without Ray: cut, read, answered, written, tried again after deaths."""

import json
import os
import random
import resource
import threading
import time

import pytest
from scripted_llm import ScriptedLLM, lines

from proxy_vllm.batch import ray_generator
from proxy_vllm.batch.jsonl import read_jsonl
from proxy_vllm.batch.ray_blocks import BlockReader, InputFile, OutputFolder, blocks_of, find_files
from proxy_vllm.batch.ray_generator import BlockWriter, ProxyGenerator
from proxy_vllm.batch.request import LineOptions, request_fields
from proxy_vllm.batch.shared import EngineFailure, SharedGenerator
from proxy_vllm.errors import UserError

request_fields()  # imports vLLM, which may take longer than a thread is waited for


def texts(results):
    return [r.output["text"] if r.output else r.error for r in results]


def in_threads(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_blocks_of_several_threads_share_one_engine():
    # The first step lasts until every thread has asked, however late the machine starts them.
    llm = ScriptedLLM(max_num_seqs=8, on_step=lambda llm: llm.steps or time.sleep(0.5))
    shared = SharedGenerator(llm)
    rng = random.Random(3)
    blocks = [lines(*(rng.randint(1, 30) for _ in range(40))) for _ in range(5)]
    results = {}

    def answer(index):
        results[index] = shared.answer(blocks[index])

    in_threads(*(lambda i=i: answer(i) for i in range(5)))
    shared.close()
    for index, block in enumerate(blocks):
        assert texts(results[index]) == [f"P{i}" for i in range(1, 41)]
        assert [r.completion_tokens for r in results[index]] == [d["max_tokens"] for _, d in block]
    total = sum(data["max_tokens"] for block in blocks for _, data in block)
    assert llm.most_live == 16 and llm.steps < 1.2 * total / 16


def test_alone_means_alone():
    seen = []
    llm = ScriptedLLM(on_step=lambda llm: seen.append({entry[0] for entry in llm.live.values()}))
    shared = SharedGenerator(llm)
    others = [lambda: shared.answer(lines(*[20] * 6)) for _ in range(3)]
    alone = [(1, {"prompt": "alone", "max_tokens": 4})]
    in_threads(*others, lambda: shared.answer(alone, alone=True), *others)
    shared.close()
    assert [s for s in seen if "alone" in s] == [{"alone"}] * 4


def test_a_broken_engine_fails_every_waiting_thread():
    def on_step(llm):
        if llm.steps == 3:
            raise RuntimeError("out of memory")

    shared = SharedGenerator(ScriptedLLM(on_step=on_step))
    failures = []

    def answer():
        try:
            shared.answer(lines(9, 9))
        except EngineFailure as error:
            failures.append(str(error))

    in_threads(answer, answer)
    answer()
    assert failures == ["out of memory"] * 3


@pytest.mark.parametrize("ending", ["\n", "", "\n\n"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_jsonl_blocks_together_are_the_file(tmp_path, rows, ending):
    rng = random.Random(4)
    rows_of_text = [json.dumps({"prompt": "é" * rng.randint(0, 60)}) for _ in range(100)]
    for index in (0, 13, 55):
        rows_of_text[index] = ["", "nonsense", "  "][index % 3]
    path = tmp_path / "in.jsonl"
    path.write_text("\r\n".join(rows_of_text) + ending)
    blocks = list(blocks_of(InputFile(str(path), "in.jsonl"), rows))
    assert all(block.rows <= rows for block in blocks)
    read = [item for b in blocks for item in BlockReader().read(b, id_prefix=None)]
    with path.open("rb") as stream:
        whole = list(read_jsonl(stream))
    assert [(n, str(d)) for n, d in read] == [(n, str(d)) for n, d in whole]
    names = [block.name for block in blocks]
    assert len(set(names)) == len(names) and names == sorted(names)


def test_parquet_blocks_together_are_the_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"p{i}", "seed": i if i % 3 else None} for i in range(50)]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=12)
    blocks = list(blocks_of(InputFile(str(path), "x/in.parquet"), 5))
    reader = BlockReader()
    read = [item for b in blocks for item in reader.read(b, id_prefix="x/in.parquet")]
    assert read == [(i + 1, {**row, "id": f"x/in.parquet:{i + 1}"}) for i, row in enumerate(rows)]


def test_folders_are_searched_and_nothing_is_passed_over_in_silence(tmp_path):
    for name in ("b.jsonl", "a/x.parquet", "a/y.ndjson", ".hidden.jsonl", "_made/z.jsonl", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    found = find_files([str(tmp_path)])
    shown = [os.path.relpath(file.shown, tmp_path) for file in found]
    assert shown == ["b.jsonl", "gone.jsonl", "a/x.parquet", "a/y.ndjson"]
    with pytest.raises(UserError, match=r"gone.jsonl: cannot read .No such file"):
        list(blocks_of(found[1], 5))
    with pytest.raises(UserError, match=r"x.parquet: cannot read"):
        list(blocks_of(found[2], 5))
    with pytest.raises(UserError, match="no such file or folder"):
        find_files([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file that ends in"):
        find_files([str(tmp_path / "empty")])


def test_an_output_folder_goes_on_only_with_what_it_was_begun_with(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    files = find_files([str(source)])
    out = str(tmp_path / "out")

    def folder(settings=None, **flags):
        return OutputFolder(out, settings or {"alpha": "1.0"}, files, **flags)

    folder().open()
    result = tmp_path / "out" / "block.jsonl"
    result.write_text("{}\n")
    (tmp_path / "out" / ".half.jsonl.1234").write_text("{")
    with pytest.raises(UserError, match=r"holds results: --resume adds"):
        folder()
    with pytest.raises(UserError, match=r"begun with alpha 1.0, now it is 2.0"):
        folder({"alpha": "2.0"}, resume=True)
    folder(resume=True).open()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "block.jsonl",
        "_manifest.json",
        "_errors",
    }
    source.write_text('{"prompt": "xy"}\n')
    with pytest.raises(UserError, match=r"in.jsonl changed since"):
        folder(resume=True)
    folder({"alpha": "2.0"}, overwrite=True).open()
    assert not result.exists()


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_of_others_is_left_alone(tmp_path, flag):
    (tmp_path / "thesis.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="holds files of others"):
        OutputFolder(str(tmp_path), {}, [], **{flag: True})


class Restart(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def make_writer(tmp_path, monkeypatch):
    """Writers over a scripted engine, as Ray would start them one after another."""
    (tmp_path / "out" / "_errors").mkdir(parents=True)

    def exit_process(status):
        raise Restart

    monkeypatch.setattr(os, "_exit", exit_process)

    def make(llm=None, **options):
        monkeypatch.setattr(ray_generator, "start_engine", lambda arguments: llm or ScriptedLLM())
        return BlockWriter(str(tmp_path / "out"), {}, LineOptions(), plain_ids=True, **options)

    return make


@pytest.fixture
def block(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(data) + "\n" for _, data in lines(3, 1, 4, 1, 5)))
    (block,) = blocks_of(InputFile(str(path), "in.jsonl"), 100)
    return block


def written(tmp_path, block, folder="."):
    path = tmp_path / "out" / folder / block.name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def test_a_block_is_written_once(tmp_path, make_writer, block):
    report = make_writer().write(block)
    assert (report["prompts"], report["errors"], report["completion_tokens"]) == (5, 0, 14)
    assert [(r["id"], r["text"]) for r in written(tmp_path, block)] == [
        (i, f"P{i}") for i in range(1, 6)
    ]
    assert written(tmp_path, block, "_errors") is None
    again = ScriptedLLM()
    assert make_writer(again).write(block)["prompts"] == 0 and again.steps == 0
    assert [p for p in os.listdir(tmp_path / "out") if p.startswith(".")] == []


def bad_block(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p1"}\n{"prompt": "too long"}\nnonsense\n{"prompt": "p4"}\n')
    (block,) = blocks_of(InputFile(str(path), "bad.jsonl"), 100)
    return block


def test_bad_rows_are_skipped_with_their_reasons(tmp_path, make_writer):
    block = bad_block(tmp_path)
    report = make_writer(skip_errors=True).write(block)
    assert [r["text"] for r in written(tmp_path, block)] == ["P1", "P4"]
    errors = written(tmp_path, block, "_errors")
    assert [(e["file"], e["line"], e["id"]) for e in errors] == [
        ("bad.jsonl", 2, 2),
        ("bad.jsonl", 3, None),
    ]
    assert "longer" in errors[0]["error"] and "not JSON" in errors[1]["error"]
    assert report["errors"] == 2 and report["said"][0].startswith("bad.jsonl:2: the prompt is")


def test_a_bad_row_fails_its_block(tmp_path, make_writer):
    block = bad_block(tmp_path)
    assert make_writer().write(block)["failed"].startswith("bad.jsonl:3: not JSON")
    assert written(tmp_path, block) is None


def test_an_unreadable_file_is_a_reason_too(tmp_path, make_writer, block):
    os.unlink(block.path)
    assert make_writer().write(block)["failed"].startswith("in.jsonl: cannot read")
    report = make_writer(skip_errors=True).write(block)
    assert (report["errors"], report["prompts"]) == (1, 0)
    assert written(tmp_path, block) is None
    assert "cannot read" in written(tmp_path, block, "_errors")[0]["error"]


def test_a_full_disk_is_told_and_leaves_no_half_block(tmp_path, make_writer, block):
    writer = make_writer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        report = writer.write(block)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write (File too large)" in report["fatal"]
    assert written(tmp_path, block) is None
    assert all(
        not name.startswith(f".{block.name}.") or name.endswith(".tries")
        for name in os.listdir(tmp_path / "out")
    )


def test_a_full_disk_keeps_the_blocks_that_are_whole(tmp_path, make_writer, small_disk):
    folder, resize = small_disk
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(data) + "\n" for _, data in lines(*[2] * 60)))
    blocks = list(blocks_of(InputFile(str(source), "in.jsonl"), 10))
    writer = make_writer()
    writer.folder = folder
    resize(16)
    reports = [writer.write(block) for block in blocks]
    full = [report.get("fatal") for report in reports]
    assert full[0] is None and full[-1] == f"{folder}: cannot write (No space left on device)"
    kept = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    whole = [b.name for b, reason in zip(blocks, full) if reason is None]
    assert sorted(kept) == whole
    assert all(data.count(b"\n") == 10 for data in kept.values())
    resize(256)
    assert not any("fatal" in writer.write(block) for block in blocks)
    assert sorted(os.listdir(folder)) == [block.name for block in blocks]
    assert kept.items() <= {n: (folder / n).read_bytes() for n in os.listdir(folder)}.items()


def test_a_full_disk_is_told_before_any_engine_starts(tmp_path, small_disk):
    folder, _ = small_disk
    (folder / ".others").write_bytes(b"x" * 4096)
    output = OutputFolder(str(folder / "out"), {}, [])
    with pytest.raises(UserError, match=r"out: cannot write .No space left on device"):
        output.open()


def test_a_damaged_row_group_is_a_reason_too(tmp_path, make_writer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "in.parquet"
    rows = [{"prompt": f"p{i}", "max_tokens": 1} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, compression="zstd")
    with path.open("r+b") as file:  # the first group's data, which the footer does not tell
        file.seek(4)
        file.write(b"\xff" * 60)
    damaged, whole = blocks_of(InputFile(str(path), "in.parquet"), 20)
    assert make_writer().write(damaged)["failed"].startswith("in.parquet: cannot read (")
    writer = make_writer(skip_errors=True)
    assert writer.write(damaged)["errors"] == 1
    assert writer.write(whole)["prompts"] == 20
    assert "cannot read" in written(tmp_path, damaged, "_errors")[0]["error"]
    assert len(written(tmp_path, whole)) == 20


def test_an_engine_that_does_not_start_is_told(tmp_path, monkeypatch, block):
    def broken(arguments):
        raise UserError("no such folder")

    monkeypatch.setattr(ray_generator, "start_engine", broken)
    report = BlockWriter(str(tmp_path), {}, LineOptions()).write(block)
    assert report["fatal"] == "an engine did not start: no such folder"


def write_through_deaths(make_writer, block, **llm_options):
    """Start writers until one finishes the block; the report and the number of deaths."""
    for deaths in range(100):
        try:
            return make_writer(ScriptedLLM(**llm_options), skip_errors=True).write(block), deaths
        except Restart:
            continue
    pytest.fail("the block is never finished")


def test_a_line_that_kills_engines_is_found_and_given_up(tmp_path, make_writer, block):
    def on_step(llm):
        if any(entry[0] == "p3" for entry in llm.live.values()):
            raise RuntimeError("segmentation fault")

    report, deaths = write_through_deaths(make_writer, block, on_step=on_step)
    assert deaths == 4  # two together, two alone
    assert [r["text"] for r in written(tmp_path, block)] == ["P1", "P2", "P4", "P5"]
    (error,) = written(tmp_path, block, "_errors")
    assert (error["line"], error["id"]) == (3, 3) and "died 2 times" in error["error"]
    assert report["prompts"] == 5
    assert [p for p in os.listdir(tmp_path / "out") if p.startswith(".")] == []


def test_whatever_dies_each_line_has_an_answer_or_a_reason(tmp_path, make_writer, block):
    rng, total = random.Random(5), 0

    def on_step(llm):
        if rng.random() < 0.2:
            raise RuntimeError("preempted")

    for _ in range(10):
        report, deaths = write_through_deaths(make_writer, block, on_step=on_step)
        total += deaths
        answered = [r["text"] for r in written(tmp_path, block)]
        lost = [e["line"] for e in written(tmp_path, block, "_errors") or ()]
        assert sorted([*answered, *(f"P{n}" for n in lost)]) == [f"P{i}" for i in range(1, 6)]
        assert report["prompts"] == 5 and report["errors"] == len(lost)
        (tmp_path / "out" / block.name).unlink()
    assert total > 10, "the seed shows nothing"


def test_engines_that_always_die_end_the_job(tmp_path, make_writer):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(data) + "\n" for _, data in lines(*[2] * 20)))
    (block,) = blocks_of(InputFile(str(path), "in.jsonl"), 100)

    def on_step(llm):
        raise RuntimeError("no memory")

    report, _ = write_through_deaths(make_writer, block, on_step=on_step)
    assert "engines die again and again" in report["fatal"]
    assert written(tmp_path, block) is None


def test_rows_of_a_dataset(monkeypatch):
    import numpy as np
    import pyarrow as pa

    monkeypatch.setattr(ray_generator, "start_engine", lambda arguments: ScriptedLLM())
    generator = ProxyGenerator(sampling={"max_tokens": 3}, token_ids=True, model="unused")
    table = generator(
        {
            "question": np.array([7, 8, 9]),
            "prompt": np.array(["a", "too long", "c"], dtype=object),
            "max_tokens": np.array([np.nan, 2, 1]),  # what Ray makes of integers and a null
            "temperature": np.array([0.5, np.nan, 1]),
        }
    )
    assert table.schema.field("error").type == pa.string()
    assert table.to_pydict() == {
        "question": [7, 8, 9],
        "prompt": ["a", "too long", "c"],
        "max_tokens": [None, 2, 1],
        "temperature": [0.5, None, 1.0],
        "text": ["A", None, "C"],
        "finish_reason": ["length", None, "length"],
        "token_ids": [[0, 1, 2], None, [0]],
        "prompt_tokens": [1, None, 1],
        "completion_tokens": [3, None, 1],
        "proxy_alpha": [1.5, None, 1.5],
        "error": [None, "the prompt is longer than the model", None],
    }
    chat = pa.table({"messages": [[{"role": "user", "content": "hi"}]]})
    assert generator(chat).column("text").to_pylist() == ["HI"]
