"""`proxy-vllm doctor`: what it finds on this machine, and that it finds what is wrong."""

import json

import engines
import pytest

import proxy_vllm.cli.doctor as doctor
from proxy_vllm.cli.main import main

GPU = engines.torch.cuda.is_available()


def spoiled(function):
    """Gives another token in one row."""

    def call(*args, **kwargs):
        tokens = function(*args, **kwargs)
        tokens[3] = (tokens[3] + 1) % 7
        return tokens

    return call


def test_every_check(tmp_path, capsys):
    main(["doctor", "--json", str(tmp_path / "doctor.json")])
    out = capsys.readouterr().out
    found = {f["check"]: f for f in json.loads((tmp_path / "doctor.json").read_text())["findings"]}
    assert list(found) == ["versions", "device", "kernels", "tokens", "graphs"]
    assert found["tokens"]["result"] == "passed" and "96 greedy tokens" in found["tokens"]["detail"]
    assert found["kernels"]["result"] == ("passed" if engines.V2 else "not checked")
    assert found["graphs"]["result"] == ("passed" if GPU else "not checked")
    unchecked = [name for name, f in found.items() if f["result"] == "not checked"]
    if unchecked:
        assert out.splitlines()[-1].endswith(f"not checked here: {', '.join(unchecked)}")


@pytest.mark.skipif(not engines.V2, reason="runs kernels")
def test_a_wrong_kernel(monkeypatch):
    from proxy_vllm.kernels import combine_sample

    assert doctor._kernels()[0].result == doctor.PASSED
    monkeypatch.setattr(combine_sample, "proxy_sample", spoiled(combine_sample.proxy_sample))
    (found,) = doctor._kernels()
    assert found.result == doctor.FAILED and "row 3" in found.detail


class FakeChild:
    """In place of the process of an engine: the loop's own tokens, one of them changed."""

    def __init__(self, *_, **__) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def __call__(self, function, folders, prompts):
        ids = [[5 + i, 6, 7] for i in range(len(prompts))]
        tokens = doctor._loop_tokens(folders, ids)
        tokens[1][-1] += 1
        return tokens, ids, "NONE"


def test_wrong_tokens_and_a_check_that_cannot_run(monkeypatch, capsys):
    import proxy_vllm.demo.child as child

    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(child, "ChildProcess", FakeChild)
    monkeypatch.setattr(doctor, "_device", broken)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "OSError: no such thing" in out and "differ from Transformers' at alpha 0.5" in out
    assert out.splitlines()[-1].startswith("failed: device, tokens")
