"""JSONL files answered by a scripted engine: resuming, bad lines, signals, full disks."""

import dataclasses
import json
import os
import random
import resource
import signal
from pathlib import Path

import pytest
from scripted_llm import PROXY, ScriptedLLM, lines

from proxy_vllm.batch.file_job import FileJob
from proxy_vllm.batch.jsonl import ResultFile, read_jsonl
from proxy_vllm.batch.ray_blocks import InputFile, blocks_of
from proxy_vllm.batch.settings import settings_of
from proxy_vllm.errors import UserError


def test_reading_lines(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n[1]\n{"prompt": "\xff"}\n{"prompt": NaN}\n'
        b'{"prompt": "\\ud800"}\n{"prompt": "\\ud83d\\ude00"}\n'
        + b"[" * 100_000
        + b"\n"
        + b'{"id": '
        + b"9" * 5000
        + b'}\n{"prompt": "half'
    )
    with path.open("rb") as stream:
        got = [(n, str(d) if isinstance(d, UserError) else d) for n, d in read_jsonl(stream)]
    assert got[0] == (1, {"prompt": "a"}) and got[5] == (8, {"prompt": "\U0001f600"})
    kept = {n: text for n, text in got if isinstance(text, str)}
    for number, reason in {
        4: "a JSON object is needed, this is a list",
        5: "not UTF-8",
        6: "NaN",
        7: "surrogate",
        9: "nested too deeply",
        10: "not usable JSON",
        11: "not JSON",
    }.items():
        assert reason in kept.pop(number)
    assert not kept


def test_an_endless_line_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("proxy_vllm.batch.jsonl.MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "in"
    path.write_bytes(b"x" * (3 << 20) + b'\n{"prompt": "a"}\n')
    with path.open("rb") as stream:
        (first, second) = read_jsonl(stream)
    assert "longer than 1 MiB" in str(first[1]) and second == (2, {"prompt": "a"})


def write_lines(path, items):
    path.write_text("".join(json.dumps(data) + "\n" for _, data in items))


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def job(tmp_path):
    """A job over 40 lines of unequal lengths, with ids on every other line."""
    rng = random.Random(2)
    items = lines(*(rng.randint(1, 20) for _ in range(40)))
    for number, data in items[::2]:
        data["id"] = f"id {number}"
    write_lines(tmp_path / "in.jsonl", items)
    return FileJob(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))


def want(job):
    ids = [f"id {i}" if i % 2 else i for i in range(1, 41)]
    return [(request_id, f"P{i}") for i, request_id in enumerate(ids, start=1)]


def got(job):
    with open(job.target) as file:
        return [(r["id"], r["text"]) for r in map(json.loads, file)]


def test_a_file_is_answered(job, capfd):
    assert job.run(ScriptedLLM) == 0
    assert got(job) == want(job)
    assert capfd.readouterr().err == ""  # no terminal, no progress bar


@pytest.mark.parametrize("whole, half", [(0, 0), (0, 30), (7, 0), (7, 1), (39, 20), (40, 0)])
def test_resume_adds_what_is_missing_and_cuts_half_a_line(job, whole, half):
    job.run(ScriptedLLM)
    with open(job.target, "rb") as file:
        full = file.read()
    kept = full.splitlines(keepends=True)
    with open(job.target, "wb") as file:
        file.write(b"".join(kept[:whole]) + (kept[whole][:half] if half else b""))
    llm = ScriptedLLM()
    job.resume = True
    assert job.run(lambda: llm) == 0
    with open(job.target, "rb") as file:
        assert file.read() == full
    assert llm.request_counter.counter == 40 - whole


def test_resume_starts_no_engine_for_a_finished_file(job):
    job.run(ScriptedLLM)
    job.resume = True
    assert job.run(lambda: pytest.fail("an engine was started")) == 0


def test_resume_goes_on_with_the_same_settings_alone(job):
    job.settings = {"alpha": "1.5", "expert": "e"}
    job.run(ScriptedLLM)
    with open(job.target, "rb+") as file:
        file.truncate(400)
    job.resume = True
    none = lambda: pytest.fail("an engine was started")  # noqa: E731
    for other, named in (
        ({"alpha": "-3.0", "expert": "e"}, r"begun with alpha 1.5, now it is -3.0"),
        ({"alpha": "1.5"}, "begun with expert e, now it is not given"),
    ):
        job.settings = other
        with pytest.raises(UserError, match=named):
            job.run(none)
    job.settings = {"alpha": "1.5", "expert": "e"}
    assert job.run(ScriptedLLM) == 0
    assert got(job) == want(job)

    os.unlink(f"{job.target}.settings.json")
    with pytest.raises(UserError, match=r"has no out.jsonl.settings.json beside it"):
        job.run(none)
    job.resume, job.overwrite, job.settings = False, True, {"alpha": "2.0"}
    assert job.run(ScriptedLLM) == 0
    assert json.loads(Path(f"{job.target}.settings.json").read_text()) == job.settings


TRIO = {"model": "b", "expert": "e", "antiexpert": "a", "alpha": 1.0}


@pytest.mark.parametrize(
    "name, value",
    [
        ("alpha", 1.5), ("expert", "e2"), ("expert_args", {"dtype": "float16"}), ("dtype", "half"),
        ("generation_config", "vllm"), ("override_generation_config", {"temperature": 0.1}),
        ("load_format", "dummy"), ("tokenizer_mode", "slow"), ("model_impl", "transformers"),
        ("logits_processors", ["mine:Processor"]), ("max_model_len", 99), ("quantization", "fp8"),
        ("expert_chat_template", "{{ x }}"), ("chat_template", "file"), ("speculative_tokens", 3),
        ("compilation_config", {"mode": 0}), ("seed", 1), ("attention_backend", "FLASH_ATTN"),
    ],
)  # fmt: skip
def test_every_argument_that_answers_may_depend_on_is_a_setting(name, value):
    with_it = settings_of({**TRIO, name: value}, sampling={})
    assert with_it.keys() - settings_of(TRIO, sampling={}).keys() <= {name}
    assert with_it != settings_of(TRIO, sampling={})
    assert json.loads(json.dumps(with_it)) == with_it


def test_settings_have_one_spelling(tmp_path, monkeypatch):
    """Defaults given or not, paths relative or not; a token for the hub is never written."""
    from vllm import EngineArgs

    plain = settings_of(TRIO, sampling={"max_tokens": 5})
    cli = EngineArgs(model=str(tmp_path))
    all_of_them = {f.name: getattr(cli, f.name) for f in dataclasses.fields(EngineArgs)}
    given = {**all_of_them, **TRIO, "dtype": "auto", "quantization": None, "expert_args": {}}
    assert settings_of(given, sampling={"max_tokens": 5}) == plain
    harmless = {"hf_token": "secret", "tensor_parallel_size": 2, "max_num_seqs": 3}
    assert settings_of({**TRIO, **harmless}, sampling={"max_tokens": 5}) == plain

    (tmp_path / "base").mkdir()
    (tmp_path / "chat.jinja").write_text("one")
    monkeypatch.chdir(tmp_path)
    relative, whole = (
        settings_of({**TRIO, "model": f"{at}base", "chat_template": f"{at}chat.jinja"})
        for at in ("", f"{tmp_path}/")
    )
    assert relative == whole
    (tmp_path / "chat.jinja").write_text("two")
    assert settings_of({**TRIO, "model": "base", "chat_template": "chat.jinja"}) != relative


def test_resume_refuses_a_file_that_is_no_result(job):
    with open(job.target, "w") as file:
        file.write('{"id": 1}\n{"text": "no id"}\n')
    job.resume = True
    with pytest.raises(UserError, match=r"out.jsonl:2 is no result of this command"):
        job.run(ScriptedLLM)


def test_earlier_results_are_not_lost_by_mistake(job):
    job.run(ScriptedLLM)
    before = got(job)
    with pytest.raises(UserError, match=r"--resume adds .* --overwrite replaces"):
        job.run(ScriptedLLM)

    def broken_engine():
        raise UserError("no such folder")

    job.overwrite = True
    with pytest.raises(UserError, match="no such folder"):
        job.run(broken_engine)
    assert got(job) == before
    write_lines(Path(job.source), lines(1, 1))
    assert job.run(ScriptedLLM) == 0
    assert got(job) == [(1, "P1"), (2, "P2")]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_lines_and_resume_goes_on(job, stop, capfd):
    def on_step(llm):
        if llm.steps == 25:
            os.kill(os.getpid(), stop)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert job.run(lambda: ScriptedLLM(on_step=on_step)) == 128 + stop
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    done = got(job)
    assert 0 < len(done) < 40 and done == want(job)[: len(done)]
    assert f"stopped by {stop.name}; answers written: {len(done)};" in capfd.readouterr().err
    job.resume = True
    assert job.run(ScriptedLLM) == 0
    assert got(job) == want(job)


def test_a_signal_during_a_write_waits_for_its_end(job, monkeypatch):
    real, calls = os.write, []

    def slow_write(fd, data):
        calls.append(fd)
        if len(calls) == 3:
            written = real(fd, bytes(data[:5]))
            os.kill(os.getpid(), signal.SIGTERM)
            return written
        return real(fd, data)

    monkeypatch.setattr(os, "write", slow_write)
    assert job.run(ScriptedLLM) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert got(job) == want(job)[:3]


BAD = [
    '{"prompt": "p1", "max_tokens": 3}',
    '{"prompt": "p2", "max_tokens": "x"}',
    "nonsense",
    '{"id": "four", "prompt": "too long"}',
    '{"id": 1, "prompt": "again"}',
    '{"prompt": "p6", "max_tokens": 1}',
]


def test_skip_reports_every_bad_line(tmp_path, capfd):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(BAD) + "\n")
    assert FileJob(str(source), str(target), skip_errors=True).run(ScriptedLLM) == 1
    assert [(r["id"], r["text"]) for r in read_results(target)] == [(1, "P1"), (6, "P6")]
    errors = read_results(tmp_path / "out.jsonl.errors.jsonl")
    assert [(e["line"], e["id"]) for e in errors] == [(2, 2), (3, None), (4, "four"), (5, None)]
    for error, reason in zip(errors, ["max_tokens is 'x'", "not JSON", "longer", "id 1 stands"]):
        assert reason in error["error"]
    said = capfd.readouterr().err.splitlines()
    assert [f"proxy-vllm: {source}:{e['line']}: {e['error']}" for e in errors] == said

    # Mended lines are answered by --resume, and the list of faults shrinks to what is left.
    source.write_text("\n".join([*BAD[:2], '{"prompt": "p3"}', *BAD[3:]]) + "\n")
    job = FileJob(str(source), str(target), skip_errors=True, resume=True)
    assert job.run(ScriptedLLM) == 1
    assert [r["id"] for r in read_results(target)] == [1, 6, 3]
    errors = read_results(tmp_path / "out.jsonl.errors.jsonl")
    assert [e["line"] for e in errors] == [2, 4, 5]


def test_fail_keeps_what_came_before_and_names_the_line(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(BAD) + "\n")
    with pytest.raises(UserError, match=r"in.jsonl:2: max_tokens is 'x'"):
        FileJob(str(source), str(target)).run(ScriptedLLM)
    assert [r["id"] for r in read_results(target)] == [1]
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()


@pytest.mark.parametrize(
    "source, target, message",
    [
        ("nowhere.jsonl", "out.jsonl", "nowhere.jsonl: cannot read .No such file"),
        (".", "out.jsonl", "is a folder: --replicas"),
        ("in.jsonl", "no/out.jsonl", "there is no folder"),
        ("in.jsonl", ".", "is a folder: name a file"),
        ("in.jsonl", "in.jsonl", "is the input"),
    ],
)
def test_files_that_cannot_be_used_start_no_engine(tmp_path, monkeypatch, source, target, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", lines(1))
    with pytest.raises(UserError, match=message):
        FileJob(source, target).run(lambda: pytest.fail("an engine was started"))


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n',
            "in.jsonl: a JSON array, and not one JSON",
        ),
        ('\n[{"prompt": "a"}]', "in.jsonl: a JSON array, and not one JSON"),
        ('{\n  "prompt": "a"\n}\n', r"in.jsonl:1: not JSON"),
        ('{"text": "a"}\n{"text": "b"}\n', r"in.jsonl:1: text is not a known field"),
        ('{"custom_id": "a", "body": {}, "url": "/v1/embeddings"}\n', r"in.jsonl:1: url is"),
    ],
)
def test_what_is_wrong_with_a_whole_file_starts_no_engine(tmp_path, text, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text)
    none = lambda: pytest.fail("an engine was started")  # noqa: E731
    with pytest.raises(UserError, match=message):
        FileJob(str(source), str(target), proxy=PROXY).run(none)
    if "array" in message:
        with pytest.raises(UserError, match=message):
            FileJob(str(source), str(target), proxy=PROXY, skip_errors=True).run(none)
        with pytest.raises(UserError, match=message):
            list(blocks_of(InputFile(str(source), "in.jsonl"), 5))
        return
    # With --on-error skip, a file without one good line is answered by its faults.
    assert FileJob(str(source), str(target), proxy=PROXY, skip_errors=True).run(none) == 1
    assert read_results(target) == []
    errors = read_results(tmp_path / "out.jsonl.errors.jsonl")
    assert [e["line"] for e in errors] == list(range(1, text.count("\n") + 1))


def test_bad_lines_before_the_first_good_one_are_reported_once(tmp_path, capfd):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('nonsense\n{"text": "a"}\n{"prompt": "a", "max_tokens": 1}\n')
    assert FileJob(str(source), str(target), proxy=PROXY, skip_errors=True).run(ScriptedLLM) == 1
    assert [r["text"] for r in read_results(target)] == ["A"]
    assert [e["line"] for e in read_results(tmp_path / "out.jsonl.errors.jsonl")] == [1, 2]
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_resume_knows_answers_in_openais_format(tmp_path):
    path = tmp_path / "out"
    path.write_text('{"id": "batch_req_1", "custom_id": "a", "response": {}, "error": null}\n')
    assert ResultFile(str(path), resume=True).done == {"a"}


def test_a_full_device_is_one_clear_line(job):
    job.target = "/dev/full"
    with pytest.raises(UserError, match=r"/dev/full: cannot write .No space left"):
        job.run(ScriptedLLM)


def test_a_full_disk_keeps_whole_lines_and_resume_goes_on(job, small_disk):
    folder, resize = small_disk
    resize(8)  # a page for the settings, a page for the answers
    job.target = str(folder / "out.jsonl")
    with pytest.raises(UserError, match=r"out.jsonl: cannot write .No space left on device"):
        job.run(ScriptedLLM)
    done = got(job)
    assert len(done) > 3 and done == want(job)[: len(done)]
    resize(64)
    job.resume = True
    assert job.run(ScriptedLLM) == 0
    assert got(job) == want(job)


def test_a_file_that_may_not_grow_keeps_whole_lines(job):
    """A file-size limit stands for a full disk: part of a line fits, the rest does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"out.jsonl: cannot write .File too large"):
            job.run(ScriptedLLM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    done = got(job)
    assert len(done) > 3 and done == want(job)[: len(done)]
    job.resume = True
    assert job.run(ScriptedLLM) == 0
    assert got(job) == want(job)


def test_a_result_is_in_the_file_as_soon_as_its_predecessors_are(job):
    def on_step(llm):
        # No line is bad, so request k is line k + 1, and all before the oldest live one are done.
        assert len(got(job)) == min(map(int, llm.live))

    assert job.run(lambda: ScriptedLLM(on_step=on_step)) == 0


def test_a_dead_engine_is_one_clear_line(job):
    from vllm.v1.engine.exceptions import EngineDeadError

    def on_step(llm):
        if llm.steps == 30:
            raise EngineDeadError

    with pytest.raises(UserError, match=r"the engine died.* answers written: \d+; --resume"):
        job.run(lambda: ScriptedLLM(on_step=on_step))
    done = got(job)
    assert 0 < len(done) < 40 and done == want(job)[: len(done)]


def test_result_file_says_nothing_is_lost_before_it_is_opened(tmp_path):
    path = tmp_path / "out"
    path.write_text('{"id": 1}\n')
    ResultFile(str(path), overwrite=True)
    assert path.read_text() == '{"id": 1}\n'
