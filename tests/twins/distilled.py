"""A distilled expert whose tokens have other names, as in DeepSeek-R1-Distill-Qwen."""

import dataclasses
import json
from pathlib import Path

from twins.byte_level import QWEN25 as QWEN

# DeepSeek-R1-Distill-Qwen gave other names to the first special tokens of Qwen 2.5.
DISTILLED = {
    "<|endoftext|>": "<｜end▁of▁sentence｜>",
    "<|im_start|>": "<｜User｜>",
    "<|im_end|>": "<｜Assistant｜>",
    "<|object_ref_start|>": "<｜begin▁of▁sentence｜>",
    "<|object_ref_end|>": "<|EOT|>",
    "<|box_start|>": "<think>",
    "<|box_end|>": "</think>",
}
_R1 = "<｜end▁of▁sentence｜>"
R1 = dataclasses.replace(
    QWEN,
    tuned=dataclasses.replace(
        QWEN.tuned,
        renamed=DISTILLED,
        config={"bos_token_id": _R1, "eos_token_id": _R1},
        generation={"eos_token_id": _R1},
        tokenizer={"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": _R1, "pad_token": _R1},
        template="{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}"
        "{% endfor %}{{ '<｜Assistant｜>' }}",
    ),
    ends=(_R1,),
)


def same_ids(folders: dict[str, str]) -> dict[int, int]:
    """The map by which the expert's renamed tokens are the base's."""
    tokenizer = json.loads((Path(folders["model"]) / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return {ids[token]: ids[token] for token in DISTILLED}
