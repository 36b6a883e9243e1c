"""Members that differ from each other: vocabulary, dtype, quantization."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import RUNNER, greedy_params, prompt_ids, running
from reference_loop import Trio, greedy, prompt_logits
from safetensors.torch import load_file, save_file
from tiny_models import make_model

STEPS = 16
ALPHAS = [1.0, 0.0, -1.5]
PROMPTS = prompt_ids([5, 40, 70], seed=51)
SMALL = {"hidden": 32, "heads": 1, "layers": 1}


def ask(llm, prompts=PROMPTS, alphas=ALPHAS, **fields):
    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        [greedy_params(STEPS, proxy_alpha=a, **fields) for a in alphas],
        use_tqdm=False,
    )


# Columns of the three, and one past the last token that the base's tokenizer names.
VOCABULARIES = {
    "small members with more columns": (111, 128, 140, 99),
    "members that lack tokens": (300, 111, 99, 300),
    "one with more, one with fewer, padding, holes": (128, 140, 111, 120),
}
HOLES = range(30, 90)


@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_vocabularies_of_different_sizes(tmp_path, sizes):
    """The base's size rules, its padding is never drawn, and its own tokens keep their place.

    The base's tokens past the small vocabularies are generated too, and read by the small members
    as their token 0. The row with alpha 0 is the base as it is, padding included.
    """
    base, expert, antiexpert, named = sizes
    # Weak, since random small members move their own tokens far.
    alphas = [0.3, 0.0, -0.4]
    holes = HOLES if named == 120 else ()
    small = {**SMALL, "tokenizer_size": 99, "unnamed": holes}
    trio = {
        "model": make_model(
            tmp_path / "base", seed=1, vocab=base, tokenizer_size=named, unnamed=holes
        ),
        "expert": make_model(tmp_path / "expert", seed=2, vocab=expert, **small),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, vocab=antiexpert, **small),
    }
    prompts = prompt_ids([5, 40, 70], vocab=base, seed=52)
    reference = Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)
    seen, levels = set(), (0.0, 25.0)
    with running(**trio) as llm:
        assert llm.llm_engine.model_config.get_vocab_size() == base
        for level in levels:
            # A constant in all of a member's logits means nothing, and must change nothing.
            llm.apply_model(partial(raise_antiexpert, level=level))
            for output, prompt, alpha in zip(
                ask(llm, prompts, alphas, logprobs=0), prompts, alphas
            ):
                tokens, steps = greedy(reference, prompt, STEPS, alpha)
                assert list(output.outputs[0].token_ids) == tokens
                for token, logits, got in zip(tokens, steps, output.outputs[0].logprobs):
                    want = float(logits.log_softmax(-1)[token])
                    assert got[token].logprob == pytest.approx(want, abs=2e-4)
                if alpha:
                    seen.update(tokens)
            # Without log-probabilities Model Runner V2 draws from the three logits at once.
            plain = [list(output.outputs[0].token_ids) for output in ask(llm, prompts, alphas)]
            assert plain == [greedy(reference, p, STEPS, a)[0] for p, a in zip(prompts, alphas)]
    assert max(seen) < named and not seen.intersection(holes)
    if named > min(expert, antiexpert):
        assert max(seen) >= min(expert, antiexpert), "proves nothing"


def raise_antiexpert(model, level: float) -> None:
    """Add a constant to the antiexpert's logits."""
    antiexpert = model.antiexpert
    plain = type(antiexpert).compute_logits
    antiexpert.compute_logits = lambda hidden: plain(antiexpert, hidden) + level


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    return {
        "model": make_model(tmp_path / "base", seed=1),
        "expert": make_model(tmp_path / "expert", seed=2, **SMALL),
        "antiexpert": make_model(tmp_path / "antiexpert", seed=3, **SMALL),
    }


def load(folders: dict[str, str]) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


def worst_difference(outputs, reference: Trio) -> float:
    """Largest gap of any returned log-probability to the loop's after the same tokens.

    Rounding may turn a greedy choice, so the loop reads vLLM's tokens instead of its own.
    """
    worst = 0.0
    for output, prompt, alpha in zip(outputs, PROMPTS, ALPHAS, strict=True):
        ids = prompt + list(output.outputs[0].token_ids)
        rows = prompt_logits(reference, ids, alpha)[len(prompt) - 1 : -1].log_softmax(-1)
        for row, entries in zip(rows, output.outputs[0].logprobs, strict=True):
            gaps = [abs(entry.logprob - float(row[token])) for token, entry in entries.items()]
            worst = max(worst, *gaps)
    return worst


def member_dtypes(llm) -> dict[str, torch.dtype]:
    (dtypes,) = llm.apply_model(
        lambda model: {
            role: next(getattr(model, role).parameters()).dtype
            for role in ("base", "expert", "antiexpert")
        }
    )
    return dtypes


def in_bfloat16(role: str) -> dict:
    """Arguments for one member in bfloat16: a small one's dtype is the base's unless it says so."""
    if role == "expert":
        return {"expert_args": {"dtype": "bfloat16"}}
    small = {"dtype": "float32"}
    return {"dtype": "bfloat16", "expert_args": small, "antiexpert_args": small}


@pytest.mark.parametrize("role", ["model", "expert"])
def test_one_member_in_bfloat16(role, folders):
    reference = load(folders)
    name = "base" if role == "model" else role
    getattr(reference, name).to(torch.bfloat16)
    args = in_bfloat16(role)
    with running(**folders, **args) as llm:
        dtypes = member_dtypes(llm)
        outputs = ask(llm, logprobs=20)
    assert dtypes.pop(name) is torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    # vLLM and Transformers round at different places: 8 bits over logits of size 5, times alpha.
    assert 1e-4 < worst_difference(outputs, reference) < 0.3
    if role == "expert":  # alpha 0 is the base, which is in float32
        assert list(outputs[1].outputs[0].token_ids) == greedy(reference, PROMPTS[1], STEPS, 0)[0]


def test_all_members_in_bfloat16(folders):
    """A row's alpha passes beside 16-bit hidden states unharmed: alpha 0 is the base, exactly."""
    from vllm import LLM

    with running(**folders, dtype="bfloat16") as llm:
        dtypes = member_dtypes(llm)
        outputs = ask(llm, logprobs=20)
        at_zero = ask(llm, alphas=[0.0] * 3, logprobs=20)
    with running(LLM, model=folders["model"], dtype="bfloat16") as llm:
        base = ask(llm, alphas=[None] * 3, logprobs=20)
    for ours, theirs in zip(at_zero, base, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].logprobs == theirs.outputs[0].logprobs
    reference = load(folders)
    for model in reference.models():
        model.to(torch.bfloat16)
    assert set(dtypes.values()) == {torch.bfloat16}
    assert worst_difference(outputs, reference) < 0.5


@pytest.mark.skipif(
    RUNNER == "v2" or not torch.cpu._is_amx_tile_supported(), reason="V1, on a CPU with AMX"
)
def test_small_members_in_bfloat16_in_a_process_of_their_own():
    """Attention is the first to use AMX there: no matrix product of these models does."""
    code = """
from proxy_vllm import ProxyLLM
from proxy_vllm.demo import model_path
from vllm import SamplingParams

base, expert, antiexpert = (str(model_path(role)) for role in ("base", "expert", "antiexpert"))
llm = ProxyLLM(
    base, expert=expert, antiexpert=antiexpert, dtype="bfloat16", max_model_len=128,
    enforce_eager=True, kv_cache_memory_bytes=64 << 20,
)
(output,) = llm.generate(["w"], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
assert len(output.outputs[0].token_ids) == 4
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


KIND = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**KIND, "strategy": "channel", "dynamic": False},
            "input_activations": {**KIND, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize(folder: str, model: torch.nn.Module) -> None:
    """Make a checkpoint int8 (compressed-tensors W8A8), and ``model`` compute what it means.

    Weights are rounded to -63 .. 63 with a scale for each output channel: over the whole range of
    int8, CPUs without VNNI instructions saturate in vLLM's kernel. Inputs are rounded to
    -127 .. 127 with a scale for each token.
    """

    def round_input(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        scale = args[0].abs().amax(-1, keepdim=True) / 127
        return ((args[0] / scale).round() * scale,)

    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weight = tensors[f"{name}.weight"]
            scale = weight.abs().amax(dim=1, keepdim=True) / 63
            rounded = (weight / scale).round()
            tensors[f"{name}.weight"] = rounded.to(torch.int8)
            tensors[f"{name}.weight_scale"] = scale
            module.weight.data = rounded * scale
            module.register_forward_pre_hook(round_input)
    save_file(tensors, path, metadata={"format": "pt"})
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": W8A8}))


@pytest.mark.parametrize("role", ["model", "expert"])
def test_one_member_quantized(role, folders):
    plain = load(folders)
    reference = copy.deepcopy(plain)
    quantize(folders[role], reference.base if role == "model" else reference.expert)
    # With AMX, vLLM's int8 product takes 16-bit inputs alone, which round as in the tests above.
    amx = torch.cpu._is_amx_tile_supported()
    with running(**folders, **(in_bfloat16(role) if amx else {})) as llm:
        outputs = ask(llm, logprobs=20)
    difference = worst_difference(outputs, reference)
    assert difference < (0.5 if amx else 1e-3)
    assert worst_difference(outputs, plain) > max(0.05, difference), "it is not quantized"


@pytest.mark.parametrize("role", ["model", "antiexpert"])
def test_weights_that_do_not_fit_name_their_member(role, folders):
    from proxy_vllm.errors import UserError

    config = Path(folders[role]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 512}))
    named = f"^{role.replace('model', 'base')} .*: its weights do not load: "
    with pytest.raises(UserError, match=named), running(**folders):
        pass
