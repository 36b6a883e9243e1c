"""What a command says of models that the hub does not give: which fault it is, in seconds."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_bad_input import refused
from tiny_models import make_model

TINY = {"hidden": 32, "heads": 1, "layers": 1}
# What the hub answers, by the name of the model: status and X-Error-Code of its files.
ANSWERS = {
    "some/gated": (403, "GatedRepo"),
    "some/missing": (404, "RepoNotFound"),
    "some/private": (401, "RepoNotFound"),
    "some/revision": (404, "RevisionNotFound"),
    "some/forbidden": (403, None),
    "some/busy": (429, None),
    "some/down": (503, None),
    "some/adapter": (404, "EntryNotFound"),
    "some/gguf": (404, "EntryNotFound"),
    "some/dataset": (404, "EntryNotFound"),
}
FILES = {
    "some/adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "some/gguf": ["model-Q4_K_M.gguf"],
    "some/dataset": ["README.md"],
}


class Hub(BaseHTTPRequestHandler):
    def answer(self) -> None:
        self.server.asked.append(self.path)
        name = next((n for n in ANSWERS if n in self.path), None)
        if name is not None and self.path.startswith("/api/models/"):
            body = str([{"rfilename": file} for file in FILES[name]]).replace("'", '"')
            body = f'{{"id": "{name}", "siblings": {body}}}'.encode()
            self.send_response(200)
        else:
            status, code = ANSWERS.get(name, (404, "RepoNotFound"))
            body = b""
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Let Hugging Face's library ask this hub, with an empty store of downloads."""
    from huggingface_hub import constants

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )

    return use


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("hub") / "good", **TINY)


CASES = {
    "some/gated": ["is gated", "accept its terms at http", "some/gated", "HF_TOKEN"],
    "some/missing": ["has no such model, or it is private", "check the name"],
    "some/private": ["has no such model, or it is private", "log in"],
    "some/revision": ["has no revision 'v9'"],
    "some/forbidden": ["answers 403", "token is not accepted"],
    "some/busy": ["answers 429", "too many requests"],
    "some/down": ["answers 503", "in trouble", "HF_HUB_OFFLINE=1"],
    "some/adapter": ["LoRA adapter", "merge"],
    "some/gguf": ["GGUF", "from_pretrained(..., gguf_file=...)"],
    "some/dataset": ["no config.json"],
    "a/name/too/long": ["neither a folder nor a name of the hub"],
}


@pytest.mark.parametrize("name", CASES)
def test_which_it_is(name, hub, online, good, capfd):
    online(f"http://127.0.0.1:{hub.server_port}")
    hub.asked.clear()
    argv = ["serve", good, "--expert", name, "--antiexpert", good, "--dtype", "float32"]
    if name == "some/revision":
        argv += ["--expert-args", '{"revision": "v9"}']
    start = time.monotonic()
    line = refused(argv, capfd)
    took = time.monotonic() - start
    print(line)
    assert line.startswith(f"expert {name!r}")
    for part in CASES[name]:
        assert part in line
    assert took < 10 and len(hub.asked) <= 3, hub.asked


def test_the_base_and_its_revision_are_asked_too(hub, online, good, capfd):
    online(f"http://127.0.0.1:{hub.server_port}")
    argv = ["serve", "some/revision", "--expert", good, "--antiexpert", good, "--revision", "v9"]
    assert refused(argv, capfd).startswith("base 'some/revision' has no revision 'v9'")


def test_nobody_answers(online, good, capfd):
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        online(f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        argv = ["serve", good, "--expert", good, "--antiexpert", "some/model"]
        line = refused(argv, capfd)
    assert time.monotonic() - start < 15
    for part in ("antiexpert 'some/model'", "cannot be reached", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        assert part in line


def test_a_downloaded_model_needs_no_hub(online, tmp_path):
    from proxy_vllm.checks.hub import check_hub

    online("http://127.0.0.1:1")
    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    check_hub("expert", "some/model")
