"""The page of `proxy-vllm explain` in a browser: a file, which asks nothing of any network."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from proxy_vllm.explain.offline import Explanation, totals
from proxy_vllm.explain.page import page as make_page
from proxy_vllm.explain.tokens import Candidate, TokenExplanation, candidate

TOP = 3


def position(rng: random.Random, alpha: float, vocab: int = 40) -> TokenExplanation:
    """A position of a random trio, greedy, its values as a sampler gives them."""

    def log_softmax(logits: list[float]) -> list[float]:
        total = math.log(sum(map(math.exp, logits)))
        return [value - total for value in logits]

    base, expert, antiexpert = (
        log_softmax([rng.gauss(0, scale) for _ in range(vocab)]) for scale in (2.0, 1.5, 1.5)
    )
    steered = log_softmax([b + alpha * (e - a) for b, e, a in zip(base, expert, antiexpert)])
    firsts = [sorted(range(vocab), key=lambda i: -v[i])[:TOP] for v in (steered, base)]
    texts = [f" w{i}" for i in range(vocab)]
    shown = [
        candidate(texts[i], i, [steered[i], base[i], expert[i], antiexpert[i]])
        for i in sorted({*firsts[0], *firsts[1]}, key=lambda i: -steered[i])
    ]
    return TokenExplanation(shown[0], alpha, firsts[1][0], firsts[0][0], tuple(shown))


def answers(count: int, tokens: int, alpha: float = 1.0) -> list[Explanation]:
    rng = random.Random(3)
    made = []
    for i in range(count):
        explained = tuple(position(rng, alpha) for _ in range(tokens))
        text = "".join(token.chosen.token for token in explained)
        made.append(Explanation(f"q{i}", "</script><b>Why?</b>", text, alpha, "stop", explained))
    return made


@pytest.fixture
def explained() -> list[Explanation]:
    return answers(2, 12)


@pytest.fixture
def report(explained, tmp_path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(make_page(explained, "B + alpha (E - A)", TOP).html, encoding="utf-8")
    return file


def ready(page):
    page.wait_for_selector("body[data-ready]")
    return page


def test_tokens_tables_and_keys(opened_file, report, explained):
    page = ready(opened_file(report))
    tokens = page.locator(".tokens").nth(0).locator(".t")
    wanted = explained[0].tokens
    assert "".join(tokens.all_text_contents()) == explained[0].text
    framed = tokens.evaluate_all("all => all.map(t => t.classList.contains('changed'))")
    assert framed == [token.changed for token in wanted] and any(framed) and not all(framed)
    colours = tokens.evaluate_all(
        "all => all.map(t => t.classList.contains('up') - t.classList.contains('down'))"
    )
    shifts = [token.shift for token in wanted]
    assert colours == [0 if abs(s) < 0.05 else 1 if s > 0 else -1 for s in shifts]
    # A frame is more than a colour, and every token says in words what is shown.
    changed = framed.index(True)
    assert tokens.nth(changed).evaluate("t => getComputedStyle(t).outlineStyle") == "solid"
    label = tokens.nth(changed).get_attribute("aria-label")
    base = next(c for c in wanted[changed].top if c.token_id == wanted[changed].base_choice)
    assert f"the base's first choice was {base.token}" in label

    tokens.nth(changed).click()
    rows = page.locator(".answer").nth(0).locator("tbody tr")
    assert rows.count() == len(wanted[changed].top)
    first = rows.nth(0).locator("td").all_text_contents()
    best = wanted[changed].top[0]
    shown = [best.steered, best.base, best.expert, best.antiexpert, best.steered - best.base]
    assert [float(cell) for cell in first[1:6]] == pytest.approx(shown, abs=0.011)
    assert first[7] == "in the answer, steered first"

    page.keyboard.press("Escape")
    assert rows.count() == 0
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert tokens.nth(1).get_attribute("aria-expanded") == "true"
    assert rows.count() == len(wanted[1].top)
    # One stop of the tabulator an answer.
    assert page.locator(".t[tabindex='0']").count() == len(explained)
    assert page.locator("b", has_text="Why?").count() == 0


def first_at(token: TokenExplanation, alpha: float) -> tuple[str, bool]:
    """Which of the stored tokens comes first at a strength, and whether by a clear margin."""

    def score(c: Candidate) -> float:
        assert c.base is not None and c.expert is not None and c.antiexpert is not None
        return c.base + alpha * (c.expert - c.antiexpert)

    best, second, *_ = sorted(token.top, key=score, reverse=True)
    return best.token, score(best) - score(second) > 0.05


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_slider_recomputes_each_choice(opened_file, report, explained, alpha):
    page = ready(opened_file(report))
    slider = page.locator("#alpha")
    slider.fill(str(alpha))
    assert page.locator("#value").text_content() == f"{alpha:.2f}"
    spans = page.locator(".t[role=button]")
    other = spans.evaluate_all("all => all.map(t => t.classList.contains('other'))")
    sure = spans.evaluate_all("all => all.map(t => t.classList.contains('sure'))")
    tokens = [token for answer in explained for token in answer.tokens]
    clear = 0
    for token, differs, certain in zip(tokens, other, sure, strict=True):
        best, margin = first_at(token, alpha)
        if margin:
            clear += 1
            assert differs == (best != token.top[0].token)
        # Beyond the answer's own strength nothing is certain; at 0 the base's first choice is.
        assert not certain or (differs and alpha <= 1)
        if alpha == 0 and differs and margin:
            assert certain and best == next(
                c.token for c in token.top if c.token_id == token.base_choice
            )
    assert clear > 10 and any(other)
    page.locator("#reset").click()
    assert page.locator(".t.other[role=button]").count() == 0


def test_nothing_is_certain_where_the_formula_is_another(opened_file, tmp_path, explained):
    """A mask has taken the base's first choice out: the slider knows nothing of masks."""
    masked = []
    for token in explained[0].tokens:
        out = next(c for c in token.top if c.token_id == token.base_choice)
        top = tuple(replace(c, steered=None) if c is out else c for c in token.top)
        masked.append(replace(token, top=top) if out is not token.chosen else token)
    file = tmp_path / "masked.html"
    answer = replace(explained[0], tokens=tuple(masked))
    file.write_text(make_page([answer], "names", TOP).html, encoding="utf-8")
    page = ready(opened_file(file))
    page.locator("#alpha").fill("0")
    assert page.locator(".t.other[role=button]").count() > 0
    assert page.locator(".t.sure[role=button]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 360])
def test_fits_a_phone_in_both_schemes(opened_file, report, width, scheme):
    page = ready(opened_file(report, width, scheme))
    page.locator(".t.changed[role=button]").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    dark = sum(map(int, paper[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))
    assert dark == (scheme == "dark")


def test_a_page_keeps_its_size():
    """100 answers of 64 tokens with 5 tokens each stay whole; longer ones store fewer rivals."""
    many = answers(100, 64)
    made = make_page(many, "names", TOP)
    assert made.top == TOP and len(made.html) < 1_000_000
    small = make_page(many, "names", TOP, limit=len(made.html) - 1)
    assert small.top < TOP and len(small.html) < len(made.html)


def test_totals_count_what_steering_did(explained):
    found = totals(explained)
    tokens = [token for answer in explained for token in answer.tokens]
    assert (found.answers, found.tokens) == (2, 24)
    assert found.changed == sum(token.changed for token in tokens)
    assert found.share_changed == found.changed / 24
    raises = {}
    for token in tokens:
        steered, base = math.exp(token.chosen.steered), math.exp(token.chosen.base)
        raises.setdefault(token.chosen.token, []).append(steered - base)
    most = max(raises, key=lambda name: sum(raises[name]))
    assert found.raised[0].token == most
    assert found.raised[0].mean_raise == pytest.approx(sum(raises[most]) / len(raises[most]))
    assert sum(count for _, count in found.replaced) == found.changed
    line = json.loads(json.dumps(explained[0].to_dict()))
    assert line["changed"] == sum(entry["changed"] for entry in line["proxy_explain"])
