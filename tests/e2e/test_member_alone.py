"""``proxy_member``: one member by itself beside steered answers, against Transformers."""

import pytest
import torch
from engines import greedy_params, prompt_ids, running
from reference_loop import Trio, greedy
from tiny_models import make_model
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from proxy_vllm.errors import UserError

STEPS = 10
PROMPTS = prompt_ids([3, 70, 33, 12, 20, 9], seed=17)
NAMED = 105
ASKED = ["expert", 1.0, "antiexpert", 0.0, "base", "expert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Other vocabularies, padding that no tokenizer names, and a token without a name before it."""
    root = tmp_path_factory.mktemp("alone")
    named = {"tokenizer_size": NAMED, "unnamed": {5}}
    small = {"hidden": 64, "heads": 2, "layers": 1}
    return {
        "model": make_model(root / "base", seed=1, vocab=157, hidden=128, heads=4, **named),
        "expert": make_model(root / "expert", seed=2, vocab=131, **small, **named),
        "antiexpert": make_model(
            root / "antiexpert", seed=3, vocab=203, tied=True, **small, **named
        ),
    }


@pytest.fixture(scope="module")
def models(folders) -> dict[str, torch.nn.Module]:
    names = {"base": folders["model"], **{r: folders[r] for r in ("expert", "antiexpert")}}
    return {
        role: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        for role, name in names.items()
    }


@torch.inference_mode()
def rows_of(models, role: str, ids: list[int]) -> torch.Tensor:  # [T, V]
    """A member's logits; a small member's are of tokens that a tokenizer names."""
    rows = models[role](torch.tensor([ids])).logits[0]
    if role != "base":
        rows[:, NAMED:] = -torch.inf
        rows[:, 5] = -torch.inf
    return rows


def answer_of(models, trio: Trio, prompt: list[int], asked, steps: int = STEPS) -> list[int]:
    if isinstance(asked, float):
        return greedy(trio, prompt, steps, asked)[0]
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(rows_of(models, asked, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def trio(folders) -> Trio:
    return Trio.load(folders["model"], folders["expert"], folders["antiexpert"], torch.float32)


def params_of(asked, **fields) -> SamplingParams:
    key = "proxy_alpha" if isinstance(asked, float) else "proxy_member"
    fields = {"temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True, **fields}
    return SamplingParams(extra_args={key: asked}, **fields)


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"speculative_tokens": 3},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "drafts", "two_ranks"],
)
def test_each_member_in_a_mixed_batch(engine, folders, models, trio, monkeypatch):
    if engine.get("tensor_parallel_size"):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    wanted = [answer_of(models, trio, p, a) for p, a in zip(PROMPTS, ASKED)]
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    with running(**folders, **engine) as llm:
        # Alone, with log-probabilities (a second time from the prefix cache), and some of the rows.
        for fields in ({}, {"logprobs": 3}, {"logprobs": 2, "presence_penalty": 0.0}):
            outputs = llm.generate(prompts, [params_of(a, **fields) for a in ASKED], use_tqdm=False)
            for output, prompt, asked, tokens in zip(outputs, PROMPTS, ASKED, wanted):
                assert list(output.outputs[0].token_ids) == tokens, asked
                if isinstance(asked, str) and fields:
                    rows = rows_of(models, asked, [*prompt, *tokens])[len(prompt) - 1 : -1]
                    check_logprobs(rows, output.outputs[0].logprobs)
        (one,) = llm.generate(prompts[0], params_of("expert"), use_tqdm=False)
        assert list(one.outputs[0].token_ids) == wanted[0]


def check_logprobs(rows: torch.Tensor, positions) -> None:
    for row, entries in zip(rows.log_softmax(-1), positions, strict=True):
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)


def test_with_what_requests_may_ask_for(folders, models):
    """Prompt log-probabilities, allowed tokens, grammars, filters and seeds are of that member."""
    prompt, allowed = PROMPTS[0], [7, 9, 20]
    choice = StructuredOutputsParams(choice=[f"w{token}" for token in allowed])
    with running(**folders) as llm:
        given = {"prompt_token_ids": prompt}
        asked = [
            params_of("antiexpert", prompt_logprobs=2, max_tokens=1),
            params_of("expert", allowed_token_ids=allowed, max_tokens=4),
            params_of("expert", structured_outputs=choice, ignore_eos=False),
            params_of("expert", temperature=1.0, top_k=1, seed=3),
            params_of("expert", temperature=2.0, top_k=3, seed=4, n=4),
            params_of("expert", temperature=2.0, min_p=0.3, seed=4, n=4),
        ]
        scored, few, chosen, top, three, likely = llm.generate([given] * 6, asked, use_tqdm=False)
    check_logprobs(rows_of(models, "antiexpert", prompt)[:-1], scored.prompt_logprobs[1:])
    ids = list(prompt)
    for token in few.outputs[0].token_ids:
        row = rows_of(models, "expert", ids)[-1]
        assert token == max(allowed, key=lambda t: float(row[t]))
        ids.append(token)
    assert chosen.outputs[0].text.strip() == f"w{few.outputs[0].token_ids[0]}"
    assert list(top.outputs[0].token_ids) == answer_of(models, None, prompt, "expert")
    drawn = set()
    for output, kept in ((three, "top_k"), (likely, "min_p")):
        for answer in output.outputs:
            ids = [*prompt, *answer.token_ids]
            for row, token in zip(
                rows_of(models, "expert", ids)[len(prompt) - 1 :], answer.token_ids
            ):
                p = (row / 2.0).softmax(-1)
                least = p.topk(3).values[-1] if kept == "top_k" else 0.3 * p.max()
                assert p[token] >= least * 0.9999
                drawn.add(int((p > p[token]).sum()))
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"proxy_member": "tuned"}, "proxy_member is 'tuned': there are base, expert, antiexpert"),
        ({"proxy_member": 1}, "proxy_member is 1: there are"),
        ({"proxy_member": "expert", "proxy_alpha": 1.0}, "proxy_alpha: proxy_member asks"),
        ({"proxy_member": "expert", "proxy_beta": 0.1}, "proxy_beta: proxy_member asks"),
        ({"proxy_member": "expert", "proxy_explain": True}, "proxy_explain: proxy_member asks"),
        ({"proxy_members": "expert"}, "the name is proxy_member"),
    ],
)
def test_what_is_refused(shared_llm, extra, message):
    params = greedy_params(2)
    params.extra_args = extra
    with pytest.raises(UserError, match=message):
        shared_llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)


@pytest.fixture(scope="module")
def shared_llm(folders):
    with running(**folders) as llm:
        yield llm
