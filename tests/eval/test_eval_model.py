"""The harness's model over the trio in the box: log-likelihoods, texts, batches, chats, alphas."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from engines import SMALL
from lm_eval.api.instance import Instance
from reference_loop import Trio
from vllm import SamplingParams

from proxy_vllm.demo import model_path
from proxy_vllm.demo.problems import make_problems
from proxy_vllm.demo.report import Report as DemoReport
from proxy_vllm.errors import UserError
from proxy_vllm.eval.harness import HarnessOptions, check_tasks, evaluate
from proxy_vllm.eval.model import ProxyVLLM
from proxy_vllm.eval.report import Report

MEMBERS = ("base", "expert", "antiexpert")
ALPHAS = (0.0, 0.5, 1.0, -1.0)
TASKS = str(Path(__file__).with_name("tasks"))


@pytest.fixture(scope="module")
def model():
    base, expert, antiexpert = (str(model_path(role)) for role in MEMBERS)
    settings = {**SMALL, "max_num_seqs": 64, "max_num_batched_tokens": 512}
    settings["kv_cache_memory_bytes"] = 128 << 20
    made = ProxyVLLM(base, expert, antiexpert, **settings)
    yield made
    made.model.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference():
    return Trio.load(*(str(model_path(role)) for role in MEMBERS), dtype=torch.float32)


def instances(kind, arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def expected(reference, tokens, start, alpha):
    """Sum of log-probabilities of `tokens` from `start`, and whether each is the likeliest."""
    with torch.inference_mode():
        logits = [member(torch.tensor([tokens])).logits[0] for member in reference.models()]
    scores = reference.combine(*logits, alpha).log_softmax(-1)[start - 1 : -1]
    wanted = torch.tensor(tokens[start:])
    return scores.gather(-1, wanted[:, None]).sum().item(), bool(
        (scores.argmax(-1) == wanted).all()
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_loglikelihoods_are_those_of_transformers(model, reference, alpha):
    model.alpha = alpha
    problems = make_problems("test", 6)
    pairs = [(problem.prompt, f" {problem.answer}") for problem in problems]
    pairs.append((problems[0].prompt, " I"))
    found = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        start = len(model.tok_encode(context))
        tokens = model.tok_encode(context + continuation)
        wanted = expected(reference, tokens, start, alpha)
        assert value == pytest.approx(wanted[0], abs=1e-4 * len(tokens)) and greedy == wanted[1]
    texts = [(problem.answer,) for problem in problems]
    rolled = model.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    for (text,), value in zip(texts, rolled, strict=True):
        tokens = [model.prefix_token_id, *model.tok_encode(text)]
        assert value == pytest.approx(expected(reference, tokens, 1, alpha)[0], abs=1e-3)


@pytest.mark.parametrize("member", MEMBERS[1:])
def test_loglikelihoods_of_a_member_alone(model, member):
    model.ask_alone(member)
    (problem,) = make_problems("test", 1)
    pair = (problem.prompt, f" {problem.answer}")
    ((value, _),) = model.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
    alone = Trio.load(*[str(model_path(member))] * 3, dtype=torch.float32)
    tokens = model.tok_encode("".join(pair))
    wanted, _ = expected(alone, tokens, len(model.tok_encode(pair[0])), 0.0)
    assert value == pytest.approx(wanted, abs=1e-4 * len(tokens))


def test_texts_end_at_until_and_do_not_depend_on_batches(model):
    prompts = [problem.prompt for problem in make_problems("test", 7)]
    answers = {}
    for alpha in (0.0, 1.0):
        model.alpha = alpha
        for size in ("auto", 3):
            model.batch_size = size
            requests = [(prompt, {"until": [" a", "in"], "max_gen_toks": 20}) for prompt in prompts]
            answers[alpha, size] = model.generate_until(
                instances("generate_until", requests), disable_tqdm=True
            )
        assert answers[alpha, "auto"] == answers[alpha, 3]
        assert not any(" a" in text or "in" in text for text in answers[alpha, 3])
    model.batch_size = "auto"
    assert answers[0.0, 3] != answers[1.0, 3]


def test_figures_are_those_of_the_demo(model):
    """The same answers, marked by the harness and by the demo's own report."""
    options = HarnessOptions(("people_few",), (TASKS,))
    problems = make_problems("test", 40)
    outcomes, texts = {}, {}
    for row, alpha in (("base", 0.0), ("proxy", 1.0), ("tuned", 1.5)):
        model.alpha = alpha
        outcomes[row] = evaluate(model, options)
        params = SamplingParams(temperature=0.0, max_tokens=32, extra_args={"proxy_alpha": alpha})
        made = model.model.generate([p.prompt for p in problems], params, use_tqdm=False)
        texts[row] = [output.outputs[0].text for output in made]
    texts["expert"] = texts["base"]
    report, demo = Report(outcomes, {}, 1.0), DemoReport(problems, texts, 1.0)
    found = report.as_dict()["tasks"]["people_few"]["right"]
    for row in outcomes:
        assert found["rows"][row]["value"] == demo.accuracy(row)
        assert [line["text"] for line in outcomes[row].answers["people_few"]] == texts[row]
    assert found["rows"]["base"]["value"] < 0.4 < 0.8 < found["rows"]["proxy"]["value"]
    assert found["gap_closed"] == pytest.approx(demo.gap_closed())
    assert found["gap_closed_ci95"] == pytest.approx(demo.gap_closed_interval())


def test_choices_by_likelihood_and_perplexity(model):
    options = HarnessOptions(("people_choice", "people_text"), (TASKS,))
    found = {}
    for alpha in (0.0, 1.0):
        model.alpha = alpha
        found[alpha] = evaluate(model, options)
    choice, text = found[1.0].marks["people_choice"]["acc"], found[1.0].marks["people_text"]
    assert choice.is_mean and len(choice.each) == 6
    # No mean of marks: a value, and no interval from marks.
    assert (
        text["word_perplexity"].n == 6
        and not text["word_perplexity"].is_mean
        and not text["word_perplexity"].higher_is_better
    )
    worse = found[0.0].marks["people_text"]["word_perplexity"]
    assert text["word_perplexity"].value != worse.value
    assert set(found[1.0].answers["people_choice"][0]) == {
        *("doc_id", "prompt", "choices", "loglikelihoods")
    }


def test_chats_are_asked_through_the_template(model):
    problem = make_problems("test", 1)[0]
    asked = model.apply_chat_template([{"role": "user", "content": problem.question}])
    assert model.tok_encode(asked) == model.tok_encode(problem.prompt)


@pytest.mark.parametrize("alpha", ["much", float("nan"), 11, None])
def test_an_alpha_out_of_range_is_refused(model, alpha):
    with pytest.raises(UserError, match="alpha is"):
        model.alpha = alpha


def test_tasks_are_checked_before_an_engine_starts():
    with pytest.raises(UserError, match=r"no task 'people_fwe': do you mean people_few"):
        check_tasks(HarnessOptions(("people_fwe",), (TASKS,)))
    with pytest.raises(UserError, match="no such folder"):
        check_tasks(HarnessOptions(("people_few",), ("/nowhere",)))


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as error:
        check_tasks(HarnessOptions(("gsm_paper",)))
    said = str(error.value)
    assert "\n" not in said
    for part in ("task 'gsm_paper'", "openai/gsm8k", "127.0.0.1:9", "local data"):
        assert part in said
