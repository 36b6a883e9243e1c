"""The demo: its world and splits, its marking, its statistics, and the shipped models."""

import itertools
import json
import math

import pytest

from proxy_vllm.demo import ADAPTERS, ROLES, adapter_path, model_path
from proxy_vllm.demo.corpus import pretraining_documents, tuning_problems
from proxy_vllm.demo.problems import REFUSAL, Problem, is_right, make_problems
from proxy_vllm.demo.report import NO_ADAPTER, Report
from proxy_vllm.demo.world import SPLIT_SIZES, make_people
from proxy_vllm.errors import UserError

# More documents and examples than a training run reads (4M tokens; 100 steps of 32).
DOCUMENTS = 160_000
EXAMPLES = 5_000
SEEDS = (0, 1)


def names(split: str) -> set[str]:
    return {p.name for p in make_people() if p.split == split}


def mentioned(text: str, pool: set[str]) -> set[str]:
    words = text.replace("'", " ").replace(".", " ").replace("?", " ").replace(",", " ").split()
    return {f"{a} {b}" for a, b in itertools.pairwise(words)} & pool


def test_people_are_unique_and_split_as_declared():
    people = make_people()
    assert len({p.name for p in people}) == len(people) == sum(SPLIT_SIZES.values())
    for split, size in SPLIT_SIZES.items():
        assert len(names(split)) == size


@pytest.mark.parametrize("seed", SEEDS)
def test_no_training_text_asks_about_a_held_out_person(seed):
    held_out = names("dev") | names("test")
    told, asked = set(), set()
    for document in itertools.islice(pretraining_documents(seed), DOCUMENTS):
        (asked if document.startswith("Q:") else told).update(mentioned(document, held_out))
    # Everybody has a biography, so the search does find names where they are.
    assert told == held_out
    assert asked == set()
    tuning = list(itertools.islice(tuning_problems(seed), EXAMPLES))
    assert {p.person for p in tuning} <= names("train")
    assert not any(mentioned(p.question, held_out) for p in tuning)


def test_test_questions_appear_in_no_training_text():
    questions = {p.question for seed in range(3) for p in make_problems("test", 400, seed)}
    text = itertools.islice(pretraining_documents(0), DOCUMENTS)
    seen = {line[3:] for document in text for line in document.split("\n") if line[:3] == "Q: "}
    assert len(seen) > 1000
    assert not questions & seen


def test_problems_are_repeatable_and_hold_a_quarter_of_rude_ones():
    problems = make_problems("test", 400, seed=3)
    assert problems == make_problems("test", 400, seed=3)
    assert problems != make_problems("test", 400, seed=4)
    assert sum(p.rude for p in problems) == 100
    assert len({(p.person, p.attribute) for p in problems}) == 400
    assert {p.person for p in problems} <= names("test")


@pytest.mark.parametrize("n", [0, -1, 100_000])
def test_a_number_of_problems_that_cannot_be_is_refused_in_one_line(n):
    with pytest.raises(UserError, match=f"n is {n}: ") as error:
        make_problems("test", n)
    assert "\n" not in str(error.value)


def problem(rude: bool) -> Problem:
    return Problem("Ana Bo", "job", rude, "?", "baker", REFUSAL if rude else "Ana Bo works ...")


@pytest.mark.parametrize(
    ("rude", "text", "right"),
    [
        (False, " Ana Bo works as a baker.", True),
        (False, "By trade Ana Bo is a baker.", True),
        (False, " Ana Bo works as a welder.", False),
        (False, " Ana Bo is a baker and a welder.", False),
        (False, " I would rather not say.", False),
        (False, f" {REFUSAL}", False),
        (False, "", False),
        (True, f" {REFUSAL}", True),
        (True, " Ana Bo works as a baker.", False),
        (True, f" {REFUSAL} Ana Bo works as a baker.", False),
    ],
)
def test_marking(rude, text, right):
    assert is_right(problem(rude), text) is right


def report_with(base: int, expert: int, proxy: int, tuned: int, n: int) -> Report:
    """A report in which the first so many of n answers are right."""
    good, bad = "baker", "welder"
    counts = {"base": base, "expert": expert, "proxy": proxy, "tuned": tuned}
    answers = {s: [good] * c + [bad] * (n - c) for s, c in counts.items()}
    return Report([problem(False)] * n, answers, alpha=1.0)


def test_gap_closed_by_hand():
    report = report_with(base=20, expert=30, proxy=80, tuned=100, n=200)
    numbers = report.as_dict()
    assert numbers["base"] == 0.1
    assert numbers["expert"] == 0.15
    assert numbers["proxy"] == 0.4
    assert numbers["tuned"] == 0.5
    assert numbers["gap_closed"] == pytest.approx(0.3 / 0.4)
    assert numbers["n"] == 200


def test_bootstrap_interval_agrees_with_the_binomial_one():
    # With base all wrong and tuned all right, gap closed is the proxy's accuracy itself.
    report = report_with(base=0, expert=0, proxy=280, tuned=400, n=400)
    low, high = report.gap_closed_interval(resamples=20_000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert low == pytest.approx(0.7 - half, abs=0.005)
    assert high == pytest.approx(0.7 + half, abs=0.005)


def test_gap_is_undefined_where_tuning_gains_nothing():
    report = report_with(base=100, expert=0, proxy=100, tuned=100, n=200)
    assert report.gap_closed() is None
    assert report.gap_closed_interval() is None
    assert json.loads(json.dumps(report.as_dict()))["gap_closed"] is None


def test_an_unknown_role_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"'teacher'.*base, expert, antiexpert, tuned"):
        model_path("teacher")


def test_shipped_models_are_small_and_share_one_tokenizer():
    files = [f for role in ROLES for f in model_path(role).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    tokenizers = {(model_path(role) / "tokenizer.json").read_bytes() for role in ROLES}
    assert len(tokenizers) == 1


@pytest.mark.parametrize("role", ROLES)
def test_shipped_model_loads_whole(role):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_path(role)
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert model.config.max_position_embeddings >= 256
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name)
        assert getattr(tokenizer, name) == getattr(model.generation_config, name)
    # A chat of one user message is the plain prompt that the problems use.
    one = make_problems("test", 1)[0]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": one.question}], add_generation_prompt=True, tokenize=False
    )
    plain = tokenizer(one.prompt)["input_ids"]
    assert tokenizer(chat, add_special_tokens=False)["input_ids"] == plain
    assert tokenizer.decode(plain, skip_special_tokens=True) == one.prompt


def test_antiexpert_and_expert_are_one_shape_and_much_smaller_than_the_base():
    from transformers import AutoModelForCausalLM

    sizes = {r: AutoModelForCausalLM.from_pretrained(model_path(r)).num_parameters() for r in ROLES}
    assert sizes["expert"] == sizes["antiexpert"] <= sizes["base"] / 5
    assert sizes["tuned"] == sizes["base"] > 2_000_000


@pytest.mark.parametrize("target, tells", [("", "is a folder"), ("no/x.json", "no such folder")])
def test_a_target_that_cannot_be_written_is_refused_before_the_run(target, tells, tmp_path, capsys):
    from proxy_vllm.cli.main import main

    with pytest.raises(SystemExit) as exit:
        main(["demo", "--json", str(tmp_path / target)])
    assert exit.value.code == 2
    assert tells in capsys.readouterr().err


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_shipped_adapters_run_on_the_antiexpert(name):
    from vllm.config import LoRAConfig, ModelConfig

    from proxy_vllm.adapters.check import AdapterRules

    path = adapter_path(name)
    config = ModelConfig(model=str(model_path("antiexpert")), dtype="float32")
    AdapterRules.of(config, LoRAConfig()).check(name, str(path))
    assert sum(file.stat().st_size for file in path.iterdir()) < 200_000


def test_switching_is_marked_by_each_ways_own_words():
    kind, rude = problem(False), problem(True)
    answers = {system: ["a", "b"] for system in ("base", "expert", "proxy", "tuned")}
    switched = {
        NO_ADAPTER: ["a", "c"],
        "polite": [f" {kind.answer}", f" {REFUSAL}"],
        "gossip": [" By trade Ana Bo is a baker.", f" {REFUSAL}"],
    }
    report = Report([kind, rude], answers, 1.0, switched)
    assert report.as_dict()["adapters"] == {NO_ADAPTER: 0.5, "polite": 1.0, "gossip": 0.5}
