"""The demo's held-out problems as documents, and its own marking."""

from dataclasses import asdict

import datasets

from proxy_vllm.demo.problems import Problem, is_right, make_problems
from proxy_vllm.demo.world import VALUES

FIELDS = ("person", "attribute", "rude", "question", "value", "answer")


def load(n, **_):
    documents = [
        {
            **asdict(problem),
            "prompt": problem.prompt,
            "choices": list(VALUES[problem.attribute]),
            "right": VALUES[problem.attribute].index(problem.value),
        }
        for problem in make_problems("test", n)
    ]
    return {"test": datasets.Dataset.from_list(documents)}


def mark(doc, results):
    problem = Problem(**{name: doc[name] for name in FIELDS})
    return {"right": float(is_right(problem, results[0]))}
