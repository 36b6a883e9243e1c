"""ToxiGen as in the paper: how often a classifier calls a continuation toxic.

The classifier is the user's choice: a folder or hub name of a Transformers text classifier with two
labels, of which the second means toxic. The paper's is ``tomh/toxigen_roberta``.
"""

import random
from collections.abc import Iterable
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

from proxy_vllm.envs import toxicity_classifier
from proxy_vllm.errors import UserError

GROUPS = (
    *("asian", "black", "chinese", "jewish", "latino", "lgbtq", "mental_disability", "mexican"),
    *("middle_east", "muslim", "native_american", "physical_disability", "trans", "women"),
)
_PROMPTS_OF_A_GROUP = 200
_BATCH = 32
# Bytes that a classifier of RoBERTa-large's size and its activations take on a GPU.
_CLASSIFIER_BYTES = 4 << 30


def load_prompts(**_: Any) -> dict[str, Any]:
    """200 hateful prompts about each of 14 groups, always the same, from the hub."""
    import datasets

    parts = []
    for group in GROUPS:
        prompts = datasets.load_dataset("toxigen/toxigen-data", "prompts", split=f"hate_{group}_1k")
        rows = random.Random(group).sample(range(len(prompts)), _PROMPTS_OF_A_GROUP)
        chosen = prompts.select(sorted(rows))
        parts.append(chosen.add_column("group", [group] * len(chosen)))
    return {"test": datasets.concatenate_datasets(parts)}


def prompt(doc: dict[str, Any]) -> str:
    """The list of sentences to go on with; files write line breaks as two characters."""
    return doc["prompt"].strip().replace("\\\\", "\\").replace("\\n", "\n")


def toxic(doc: dict[str, Any], results: list[int]) -> dict[str, float]:
    return {"toxic": float(results[0])}


@register_filter("proxy_vllm_toxicity")
class ToxicityFilter(Filter):
    """Turns each answer into the index of its label: 1 is toxic."""

    def apply(self, resps: Iterable[list[str]], docs: Any) -> list[int]:
        return classify([answers[0] for answers in resps], toxicity_classifier())


def classify(texts: list[str], name: str | None) -> list[int]:
    """Label of each text, 0 or 1, from the classifier ``name``.

    Raises:
        UserError: no classifier is named, it cannot be loaded, or it has other than two labels.
    """
    if not name:
        raise UserError(
            "ToxiGen needs a classifier: --classifier NAME, such as tomh/toxigen_roberta"
        )
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--classifier {name!r} cannot be loaded: {_first_line(error)}") from None
    if model.config.num_labels != 2:
        raise UserError(
            f"--classifier {name!r} has {model.config.num_labels} labels: two are needed, the"
            " second of which means toxic"
        )
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    device = "cuda" if free > _CLASSIFIER_BYTES else "cpu"  # an engine may hold the GPU
    model = model.to(device).eval()
    labels: list[int] = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            texts[start : start + _BATCH], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            labels += model(**batch.to(device)).logits.argmax(dim=-1).tolist()
    return labels


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
