"""Train the demo's four models (base, antiexpert, expert, tuned) from generated text on a CPU.

    python scripts/train_demo_models.py --out proxy_vllm/demo/models

Settings were chosen on the dev split (the default); the test split is for the final report:

    python scripts/train_demo_models.py --measure proxy_vllm/demo/models --split test

The two LoRA adapters of the antiexpert are trained from models that are there, in a minute:

    python scripts/train_demo_models.py --adapters proxy_vllm/demo/models
"""

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path

import torch
import transformers
from demo_training.adapters import AdapterRecipe, save_adapter, train_adapter
from demo_training.evaluate import accuracy, answers
from demo_training.training import (
    Recipe,
    load,
    new_model,
    pretrain,
    pretraining_blocks,
    round_to_stored,
    save,
    train_tokenizer,
    tune,
)

from proxy_vllm.demo import ADAPTERS, ROLES
from proxy_vllm.demo.problems import make_problems, wanted


def train(recipe: Recipe, seed: int, say) -> dict:
    """The four models, float32 on the CPU, and the tokenizer they share, by role."""
    tokenizer = train_tokenizer(seed)
    blocks = pretraining_blocks(tokenizer, recipe, seed)
    say(f"{blocks.numel()} tokens of text")
    made = {"tokenizer": tokenizer}
    for role, tuned_role, shape, lr, tune_lr in (
        ("antiexpert", "expert", recipe.small_shape, recipe.small_lr, recipe.small_tune_lr),
        ("base", "tuned", recipe.base_shape, recipe.base_lr, recipe.base_tune_lr),
    ):
        model = new_model(tokenizer, shape, seed)
        say(f"{role}: {model.num_parameters()} parameters")
        pretrain(model, blocks, recipe, lr, lambda text, role=role: say(f"{role}: {text}"))
        # Tuning starts from the weights that ship, so that expert - antiexpert is tuning alone.
        made[role] = round_to_stored(model)
        made[tuned_role] = copy.deepcopy(model)
        tune(
            made[tuned_role],
            tokenizer,
            recipe,
            tune_lr,
            seed,
            lambda text, role=tuned_role: say(f"{role}: {text}"),
        )
        round_to_stored(made[tuned_role])
    return made


def measure(made: dict, split: str, n: int) -> dict[str, dict[str, float]]:
    """Greedy accuracies of the rounded weights as float32 models, proxy at alpha 1."""
    problems = make_problems(split, n)
    tokenizer = made["tokenizer"]
    roles = {role: [(1.0, made[role])] for role in ROLES}
    roles["proxy"] = [(1.0, made["base"]), (1.0, made["expert"]), (-1.0, made["antiexpert"])]
    return {
        role: accuracy(problems, answers(weighted, tokenizer, problems))
        for role, weighted in roles.items()
    }


def train_adapters(folder: Path, seed: int, split: str, n: int, say) -> dict:
    """Write the adapters beside the models of `folder`; what each does to the base's answers.

    `right` is the share of facts (or refusals) that are right, `own_words` that of answers exactly
    as the behaviour words them.
    """
    made, recipe = load(folder), AdapterRecipe()
    problems, found = make_problems(split, n), {}
    for name in ADAPTERS:
        tensors, merged = train_adapter(
            name, made["antiexpert"], made["tokenizer"], recipe, seed, say
        )
        save_adapter(tensors, recipe, folder / "adapters" / name)
        weighted = [(1.0, made["base"]), (1.0, merged), (-1.0, made["antiexpert"])]
        texts = [text.strip() for text in answers(weighted, made["tokenizer"], problems)]
        own = [text == wanted(name, p) for text, p in zip(texts, problems, strict=True)]
        found[name] = {**accuracy(problems, texts), "own_words": round(sum(own) / len(own), 4)}
        say(f"{name}: {found[name]}")
    return {**found, "recipe": vars(recipe)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the four model folders")
    parser.add_argument("--measure", type=Path, help="measure these models, train nothing")
    parser.add_argument("--adapters", type=Path, help="train adapters of these models, no more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--n", type=int, default=400, help="problems to measure on")
    parser.add_argument("--report", type=Path, help="JSON file that collects the accuracies")
    args = parser.parse_args()

    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.0f}s] {text}", flush=True)

    if args.adapters:
        train_adapters(args.adapters, args.seed, args.split, args.n, say)
        return
    recipe = Recipe()
    if args.measure:
        made = load(args.measure)
    else:
        made = train(recipe, args.seed, say)
    result = measure(made, args.split, args.n)
    for role, shares in result.items():
        say(f"{role:10s} {shares}")
    if args.out:
        for role in ROLES:
            save(made[role], made["tokenizer"], args.out / role)
    if args.report:
        rows = json.loads(args.report.read_text()) if args.report.exists() else []
        rows.append(
            {
                "command": " ".join(["python", *sys.argv]),
                "seed": args.seed,
                "split": args.split,
                "n": args.n,
                "accuracy": result,
                "recipe": vars(recipe),
                "seconds": round(time.monotonic() - start),
                "cpu_seconds": round(time.process_time()),  # of all threads
                "threads": torch.get_num_threads(),
                "cpus": os.cpu_count(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
        args.report.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
