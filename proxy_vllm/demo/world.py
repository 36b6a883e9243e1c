"""A world of invented people, the same on every machine, and the split of each of them."""

import random
from dataclasses import dataclass

WORLD_SEED = 20240116
SPLIT_SIZES = {"train": 450, "dev": 150, "test": 300}
ATTRIBUTES = ("job", "city", "pet")


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


JOBS = words(
    "baker welder dentist plumber sailor tailor painter farmer miner nurse judge pilot poet "
    "barber butcher carpenter chemist diver drummer fisher gardener hunter jeweller lawyer "
    "librarian mason potter printer roofer surgeon teacher waiter"
)
CITIES = words(
    "Varn Ostel Quimby Lorrin Dapham Skell Tarvos Brint Melgar Hollow Pexton Zarich Golwen "
    "Norvik Calder Wexley Umbra Fenwick Jarrow Kestle Ridane Solmar Thorpe Yarrow Balmor "
    "Corvin Drayle Elmont Farrow Grisby Havnor Istria"
)
PETS = words(
    "cat dog parrot ferret hamster rabbit turtle lizard goat pony donkey canary falcon raven "
    "goose duck pigeon mouse hedgehog badger squirrel snake frog newt carp spider llama lamb "
    "monkey tortoise gecko magpie"
)
VALUES = {"job": JOBS, "city": CITIES, "pet": PETS}


@dataclass(frozen=True)
class Person:
    name: str
    job: str
    city: str
    pet: str
    split: str  # "train", "dev" or "test": where questions about this person may be asked


def _names(rng: random.Random, count: int, endings: tuple[str, ...]) -> list[str]:
    onsets = words("B Br C Cl D Dr F Fl G Gr H J K L M N P Pr R S St T Tr V W Z")
    middles = [v + c for v in "aeiou" for c in ("l", "n", "r", "s", "m", "v", "d", "t")]
    pool = sorted({o + m + e for o in onsets for m in middles for e in endings})
    return rng.sample(pool, count)


def make_people() -> list[Person]:
    """Everybody, in a fixed order; names are unique and no name is the start of another."""
    rng = random.Random(WORLD_SEED)
    first = _names(rng, 180, ("a", "o", "in", "ie"))
    last = _names(rng, 180, ("er", "ov", "ic", "son"))
    pairs = rng.sample([(f, s) for f in first for s in last], sum(SPLIT_SIZES.values()))
    splits = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
    return [
        Person(name=f"{f} {s}", split=split, **{a: rng.choice(VALUES[a]) for a in ATTRIBUTES})
        for (f, s), split in zip(pairs, splits, strict=True)
    ]
