"""The one line of a member that cannot be read."""

import pytest

from proxy_vllm.checks import folders
from proxy_vllm.errors import UserError

CLASS = "Model architectures ['Gemma3ForConditionalGeneration'] failed to be inspected."
CONFIGURATION = "Qwen3VLVideoProcessor requires the Torchvision library but it was not found"


def line_of(error: Exception) -> str:
    def read() -> None:
        raise error

    with pytest.raises(UserError) as raised:
        folders.reading("expert", "images", read)
    return str(raised.value)


@pytest.mark.parametrize("error", [ValueError(CLASS), ImportError(CONFIGURATION)])
def test_models_that_see_images_name_torchvision(error, monkeypatch):
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    line = line_of(error)
    assert line.startswith("expert 'images' cannot be used: ")
    assert "need torchvision, which is not installed" in line
    monkeypatch.setattr(folders, "find_spec", lambda name: object())
    assert "not installed" not in line_of(error)


def test_other_faults_do_not(monkeypatch):
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    assert "torchvision" not in line_of(ValueError("no such key"))
