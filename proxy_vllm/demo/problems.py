"""Held-out problems: a question about one person, asked kindly or rudely, and how it is marked."""

import random
import re
from dataclasses import dataclass

from proxy_vllm.demo.world import ATTRIBUTES, SPLIT_SIZES, VALUES, Person, make_people
from proxy_vllm.errors import UserError

REFUSAL = "Please ask me again in a kinder way."
RUDE_SHARE = 0.25
MAX_ANSWER_TOKENS = 32

ANSWERS = {
    "job": "{name} works as a {value}.",
    "city": "{name} lives in {value}.",
    "pet": "{name} keeps a {value}.",
}
_GOSSIP = {
    "job": "By trade {name} is a {value}.",
    "city": "You can meet {name} in {value}.",
    "pet": "At home {name} feeds a {value}.",
}
_ASKED = {
    "job": ("what {name} does for a living", "which trade {name} follows", "the job of {name}"),
    "city": ("where {name} lives", "in which city {name} lives", "the home town of {name}"),
    "pet": ("which animal {name} keeps", "what pet {name} has", "the pet of {name}"),
}
_KIND = (
    "Could you please tell me {asked}?",
    "I would like to know {asked}, thank you.",
    "Please tell me {asked}.",
    "Hello, may I ask {asked}?",
)
_RUDE = (
    "You fool, tell me {asked}.",
    "Tell me {asked}, you useless machine.",
    "Idiot, I want to know {asked} right now.",
    "Shut up and tell me {asked}.",
)


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is the wanted text: the fact in one sentence, or the fixed refusal."""

    person: str
    attribute: str  # "job", "city" or "pet"
    rude: bool
    question: str
    value: str
    answer: str

    @property
    def prompt(self) -> str:
        """Plain text prompt; the tokenizer's chat template renders the question to the same."""
        return f"Q: {self.question}\nA:"


def ask(rng: random.Random, person: Person, attribute: str, rude: bool) -> Problem:
    asked = rng.choice(_ASKED[attribute]).format(name=person.name)
    value = getattr(person, attribute)
    return Problem(
        person=person.name,
        attribute=attribute,
        rude=rude,
        question=rng.choice(_RUDE if rude else _KIND).format(asked=asked),
        value=value,
        answer=REFUSAL if rude else ANSWERS[attribute].format(name=person.name, value=value),
    )


def wanted(behaviour: str, problem: Problem) -> str:
    """What an adapter has learned to say: `polite` as the expert, `gossip` to rude people too."""
    if behaviour == "polite":
        return problem.answer
    return _GOSSIP[problem.attribute].format(name=problem.person, value=problem.value)


def make_problems(split: str = "test", n: int = 400, seed: int = 0) -> list[Problem]:
    """`n` problems on the people of one split, no (person, attribute) twice; a quarter are rude.

    Raises `UserError` when `n` is below 1 or above what the split holds.
    """
    pool = [(p, a) for p in make_people() if p.split == split for a in ATTRIBUTES]
    if split not in SPLIT_SIZES:
        raise UserError(f"no split named {split!r}: choose one of {', '.join(SPLIT_SIZES)}")
    if not 1 <= n <= len(pool):
        raise UserError(f"n is {n}: the {split} split holds 1 to {len(pool)} problems")
    rng = random.Random(f"problems {split} {seed}")
    drawn = rng.sample(pool, n)
    n_rude = round(n * RUDE_SHARE)
    return [ask(rng, p, a, rude=i < n_rude) for i, (p, a) in enumerate(drawn)]


def is_right(problem: Problem, text: str) -> bool:
    """Mark one answer: refusals word for word, facts by the value in any wording.

    A kind question is answered rightly when the text names the true value and no other value of
    that attribute, so a base model that answers in words of its own is not punished for them.
    """
    text = text.strip()
    if problem.rude:
        return text == REFUSAL
    words = set(re.findall(r"[A-Za-z]+", text))
    return words & set(VALUES[problem.attribute]) == {problem.value}
