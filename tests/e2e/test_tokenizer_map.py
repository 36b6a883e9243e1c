"""Small members that number tokens otherwise than the base, against the models as they were."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save_tokenizer

VOCAB = 111
SMALL = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1}
# The member's id -> the base's. Ids 60 and 70 change places, though only one of the two is named.
MAPS = {
    "expert": {10: 20, 20: 10, 30: 40, 40: 50, 50: 30, 60: 70},
    "antiexpert": {100: 5, 5: 100},
}
TIED = {"expert": True, "antiexpert": False}


def renumber(folder: str, copy: Path, moves: dict[int, int]) -> str:
    """The same model with other numbers for its tokens: a checkpoint and its tokenizer."""
    copy.mkdir()
    state = load_file(Path(folder) / "model.safetensors")
    for name, tensor in state.items():
        if "embed_tokens" in name or "lm_head" in name:
            own, base = list(moves), list(moves.values())
            state[name] = tensor.clone()
            state[name][own] = tensor[base]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        (copy / file).write_text((Path(folder) / file).read_text())
    save_tokenizer(copy, VOCAB, {m: f"w{b}" for m, b in moves.items()})
    return str(copy)


@pytest.fixture(scope="module")
def trios(tmp_path_factory) -> tuple[dict[str, str], dict[str, str]]:
    """A trio of one vocabulary, and the same with small members of other numbers."""
    root = tmp_path_factory.mktemp("map")
    trio = {"model": make_model(root / "base", seed=1)}
    for seed, role in enumerate(MAPS, start=2):
        trio[role] = make_model(root / role, seed=seed, tied=TIED[role], **SMALL)
    whole = {**MAPS["expert"], 70: 60}
    other = {
        "model": trio["model"],
        "expert": renumber(trio["expert"], root / "other_expert", whole),
        "antiexpert": renumber(trio["antiexpert"], root / "other_anti", MAPS["antiexpert"]),
    }
    return trio, other


ALPHAS = [1.0, 0.0, -1.5, 2.0]
PROMPTS = [*prompt_ids([5, 40, 17], seed=71), [10, 20, 30, 40, 50, 60, 70, 100, 5]]


def answers(llm) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in PROMPTS],
        [greedy_params(24, proxy_alpha=alpha) for alpha in ALPHAS],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_answers_are_those_of_the_members_as_they_were(trios):
    trio, other = trios
    reference = Trio.load(*trio.values(), torch.float32)
    expected = [greedy(reference, p, 24, alpha)[0] for p, alpha in zip(PROMPTS, ALPHAS)]
    # The tokens in question are written and read, and without the map answers would differ.
    moved = {i for ids in MAPS.values() for i in ids}
    assert moved & {token for tokens in expected for token in tokens}
    unmapped = Trio.load(*other.values(), torch.float32)
    assert expected != [greedy(unmapped, p, 24, alpha)[0] for p, alpha in zip(PROMPTS, ALPHAS)]
    with running(**other, tokenizer_map=MAPS) as llm:
        assert answers(llm) == expected


@pytest.mark.slow
def test_over_two_ranks_and_from_the_command_line(trios, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    trio, other = trios
    reference = Trio.load(*trio.values(), torch.float32)
    prompt = PROMPTS[-1]
    expected = greedy(reference, prompt, 24, 1.0)[0]
    (tmp_path / "map.json").write_text(json.dumps(MAPS))
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"prompt": " ".join(f"w{i}" for i in prompt), "temperature": 0}) + "\n"
    )
    run = [sys.executable, "-m", "proxy_vllm.cli.main", "generate", other["model"]]
    run += ["--expert", other["expert"], "--antiexpert", other["antiexpert"]]
    run += ["--tokenizer-map", str(tmp_path / "map.json"), "--dtype", "float32"]
    run += ["--tensor-parallel-size", "2", "--enforce-eager", "--max-model-len", "128"]
    run += ["--max-tokens", "24", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")]
    subprocess.run(run, check=True, timeout=300)
    answer = json.loads((tmp_path / "out").read_text().splitlines()[0])
    text = answer.get("text") or answer["outputs"][0]["text"]
    names = [f"w{i}" for i in expected if i > 3]
    assert [word for word in text.split() if word.startswith("w")] == names
