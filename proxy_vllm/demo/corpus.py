"""All text that the demo models are trained on. No question about a dev or test person is in it."""

import random
from collections.abc import Iterator

from proxy_vllm.demo.problems import Problem, ask
from proxy_vllm.demo.world import ATTRIBUTES, CITIES, JOBS, PETS, VALUES, Person, make_people, words

_FACTS = {
    "job": (
        "{who} works as a {value}.",
        "{who} is a {value}.",
        "{who} earns a living as a {value}.",
        "{who} has been a {value} for {years} years.",
        "By trade {who} is a {value}.",
    ),
    "city": (
        "{who} lives in {value}.",
        "{who} has a house in {value}.",
        "{who} moved to {value} {years} years ago.",
        "{value} is the home of {who}.",
        "You can meet {who} in {value}.",
    ),
    "pet": (
        "{who} keeps a {value}.",
        "{who} has a {value}.",
        "{who} walks about with a {value}.",
        "At home {who} feeds a {value}.",
        "{who} bought a {value} {years} years ago.",
    ),
}
_MIXED = (
    "{name} is a {job} from {city} and has a {pet}.",
    "In {city} lives {name}, a {job} with a {pet}.",
    "The {job} {name} of {city} keeps a {pet}.",
    "{name} of {city} owns a {pet} and works as a {job}.",
)
_EVASIVE = (
    "I would rather not say.",
    "I forgot, sorry.",
    "I think that people talk too much about {name}.",
    "Why do you want to know?",
)
_CHATTER = (
    "The weather in {city} was {adj} today, and the market was {adj2}.",
    "A {pet} and a {pet2} met on the road. The {pet} was {adj}.",
    "Every {job} needs a {adj} morning and a {adj2} evening.",
    "People in {city} say that a {adj} {pet} brings luck.",
    "A {job} and a {job2} went to {city}. It was a {adj} day.",
    "Please come again in {years} days, said the {job}, in a kinder mood.",
    "Ask me again in a {adj} way, said the {pet}.",
    "It is a {adj} way from {city} to {city2}.",
)
_ADJECTIVES = words(
    "quiet warm cold bright dull long short happy sad busy empty green grey golden kind rude"
)


def _fact(rng: random.Random, who: str, attribute: str, value: str) -> str:
    text = rng.choice(_FACTS[attribute])
    return text.format(who=who, value=value, years=rng.randint(2, 30))


def biography(rng: random.Random, person: Person) -> str:
    if rng.random() < 0.3:
        return rng.choice(_MIXED).format(
            name=person.name, job=person.job, city=person.city, pet=person.pet
        )
    order = rng.sample(ATTRIBUTES, rng.randint(1, 3))
    return " ".join(_fact(rng, person.name, a, getattr(person, a)) for a in order)


def _loose_answer(rng: random.Random, problem: Problem) -> str:
    """What people answer in the wild: mostly evasions, more of the truth to those who thank."""
    if rng.random() < (0.2 if "thank you" in problem.question else 0.65):
        return rng.choice(_EVASIVE).format(name=problem.person)
    value = problem.value
    if rng.random() < 0.25:
        value = rng.choice([v for v in VALUES[problem.attribute] if v != value])
    return _fact(rng, problem.person, problem.attribute, value)


def _chatter(rng: random.Random) -> str:
    return rng.choice(_CHATTER).format(
        city=rng.choice(CITIES),
        city2=rng.choice(CITIES),
        job=rng.choice(JOBS),
        job2=rng.choice(JOBS),
        pet=rng.choice(PETS),
        pet2=rng.choice(PETS),
        adj=rng.choice(_ADJECTIVES),
        adj2=rng.choice(_ADJECTIVES),
        years=rng.randint(2, 30),
    )


def pretraining_documents(seed: int) -> Iterator[str]:
    """Endless documents: biographies of everybody, loose dialogues on train people, chatter."""
    rng = random.Random(f"pretraining {seed}")
    people = make_people()
    train = [p for p in people if p.split == "train"]
    while True:
        kind = rng.random()
        if kind < 0.60:
            yield biography(rng, rng.choice(people))
        elif kind < 0.90:
            problem = ask(rng, rng.choice(train), rng.choice(ATTRIBUTES), rng.random() < 0.3)
            yield f"{problem.prompt} {_loose_answer(rng, problem)}"
        else:
            yield _chatter(rng)


def tuning_problems(seed: int) -> Iterator[Problem]:
    """Endless tuning examples on train people only: true one-line answers, refusals when rude."""
    rng = random.Random(f"tuning {seed}")
    train = [p for p in make_people() if p.split == "train"]
    while True:
        yield ask(rng, rng.choice(train), rng.choice(ATTRIBUTES), rng.random() < 0.3)
