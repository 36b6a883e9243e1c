"""`/playground` of a real server: type, stream, stop, and what goes wrong."""

import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engines import RUNNER
from playwright.sync_api import Page, expect

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))

from test_server import KEY, Server

if RUNNER == "v2":
    pytest.skip("one server is enough: pages do not depend on the runner", allow_module_level=True)

PROMPT = "w7 w8 w9"
STATUS = ".column >> nth={} >> .status"


@pytest.fixture(scope="module")
def server(trio, tmp_path_factory):
    server = Server(trio, tmp_path_factory.mktemp("playground") / "log", "--playground")
    yield server
    server.stop()


@pytest.fixture
def opened(server, page: Page) -> Page:
    page.goto(f"{server.url}/playground")
    expect(page.locator("#curl")).to_contain_text("proxy_alpha")
    return page


@pytest.fixture
def known(opened: Page) -> Page:
    """The page of somebody with the key."""
    opened.fill("#key", KEY)
    opened.locator("#key").press("Tab")
    expect(opened.locator("#curl")).to_contain_text('"steered"')
    return opened


def answers(page: Page, count: int = 2) -> list[str]:
    """Texts of all columns, once they are whole."""
    for i in range(count):
        expect(page.locator(STATUS.format(i))).to_contain_text(re.compile("limit|done"))
    assert page.locator("#error").inner_text() == ""
    return [column.inner_text() for column in page.locator(".answer").all()]


def test_type_and_stream_beside_the_base(server, known: Page):
    known.fill("#prompt", PROMPT)
    known.fill("#max-tokens", "12")
    known.fill("#alpha", "0.5")
    known.keyboard.press("Control+Enter")
    wanted = [
        server.complete(alpha, prompt=PROMPT, max_tokens=12, extra={"ignore_eos": False})
        for alpha in (0, 0.5)
    ]
    texts = [answer.choices[0].text for answer in wanted]
    assert texts[0] != texts[1]
    assert [text.split() for text in answers(known)] == [text.split() for text in texts]
    for i in range(2):
        # However many of them a chunk brought.
        counted = wanted[i].usage.completion_tokens
        expect(known.locator(STATUS.format(i))).to_contain_text(f" {counted} token")
    assert known.locator("h2").all_inner_texts() == ["base, alpha 0", "proxy, alpha 0.5"]


def test_beside_the_expert(server, known: Page):
    known.fill("#prompt", PROMPT)
    known.fill("#max-tokens", "12")
    known.get_by_label("Base beside it").uncheck()
    known.get_by_label("Expert beside it").check()
    known.keyboard.press("Control+Enter")
    extra = {"ignore_eos": False, "vllm_xargs": {"proxy_member": "expert"}}
    alone = server.complete(prompt=PROMPT, max_tokens=12, extra=extra).choices[0].text
    steered = server.complete(prompt=PROMPT, max_tokens=12, extra={"ignore_eos": False})
    wanted = [steered.choices[0].text, alone]
    assert wanted[0] != wanted[1]
    assert [text.split() for text in answers(known)] == [text.split() for text in wanted]
    assert known.locator("h2").all_inner_texts() == ["proxy, alpha 1.5", "expert alone"]
    assert '"proxy_alpha"' in known.locator("#curl").inner_text()


def test_colours_are_of_the_servers_own_numbers(server, known: Page):
    known.fill("#prompt", PROMPT)
    known.fill("#max-tokens", "12")
    known.fill("#alpha", "0.5")
    known.keyboard.press("Control+Enter")
    xargs = {"proxy_alpha": 0.5, "proxy_explain": True}
    extra = {"ignore_eos": False, "vllm_xargs": xargs}
    answer = server.complete(prompt=PROMPT, max_tokens=12, extra=extra)
    entries = answer.choices[0].model_dump()["proxy_explain"]
    answers(known)
    tokens = known.locator(".answer .token")
    classes = [token.get_attribute("class").split() for token in tokens.all()]
    assert ["changed" in names for names in classes] == [entry["changed"] for entry in entries]
    assert {entry["changed"] for entry in entries} == {True, False}
    for names, entry in zip(classes, entries):
        shift = entry["steered"] - entry["base"]
        strength = [name for name in names if name.startswith(("up", "down"))]
        assert (
            strength == []
            if abs(shift) < 0.5
            else strength[0].startswith("up" if shift > 0 else "down")
        )

    # By the mouse and by keys, the numbers of a token.
    for move, entry in ((tokens.first.click, entries[0]), ("ArrowRight", entries[1])):
        known.keyboard.press(move) if isinstance(move, str) else move()
        rows = [
            row.locator("td").all_inner_texts() for row in known.locator("#table tbody tr").all()
        ]
        assert [float(row[1]) for row in rows] == pytest.approx(
            [top["steered"] for top in entry["top"]], abs=0.006
        )
    assert known.locator("[aria-current]").inner_text() == tokens.nth(1).inner_text()

    known.get_by_label("Colour tokens").uncheck()
    known.keyboard.press("Control+Enter")
    answers(known)
    assert known.locator(".answer .token").count() == 0


def test_chat_with_a_system_message(server, known: Page):
    known.get_by_label("Chat").check()
    known.get_by_label("System message").fill("w5")
    known.get_by_label("Message", exact=True).fill(PROMPT)
    known.fill("#max-tokens", "6")
    known.get_by_label("Base beside it").uncheck()
    known.get_by_role("button", name="Send").click()
    answer = server.client.chat.completions.create(
        model="steered", temperature=0, max_tokens=6,
        messages=[{"role": "system", "content": "w5"}, {"role": "user", "content": PROMPT}],
    )  # fmt: skip
    (text,) = answers(known, 1)
    assert text.split() == answer.choices[0].message.content.split()


def test_stop_keeps_what_has_come(server, known: Page):
    known.fill("#prompt", PROMPT)
    known.fill("#max-tokens", "480")
    known.fill("#temperature", "1")
    known.get_by_role("button", name="Send").click()
    expect(known.locator(STATUS.format(1))).to_contain_text("token")
    known.keyboard.press("Escape")
    for i in range(2):
        expect(known.locator(STATUS.format(i))).to_contain_text("stopped")
    assert known.locator("#error").inner_text() == ""
    text = known.locator(".answer").nth(1).inner_text()
    assert 0 < len(text.split()) < 480
    expect(known.get_by_role("button", name="Send")).to_be_enabled()
    # The engine is told too: it ends both requests.
    page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    (running,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page, re.M)
    assert float(running) == 0


def test_without_the_key_the_page_says_so(opened: Page):
    opened.fill("#prompt", PROMPT)
    opened.get_by_role("button", name="Send").click()
    expect(opened.locator("#error")).to_have_text(re.compile("^401: Unauthorized: .* API key"))


@pytest.mark.parametrize("alpha", ["99", "much"])
def test_a_wrong_alpha_is_the_servers_400_in_one_line(known: Page, alpha: str):
    known.fill("#prompt", PROMPT)
    known.fill("#alpha", alpha)
    known.get_by_role("button", name="Send").click()
    expect(known.locator("#error")).to_contain_text("400: proxy_alpha is")
    assert "\n" not in known.locator("#error").inner_text()
    # The base, which was asked rightly, answers all the same.
    expect(known.locator(STATUS.format(0))).to_contain_text(re.compile("limit|done"))
    expect(known.locator(STATUS.format(1))).to_contain_text("failed")


def test_the_slider_and_the_curl(server, known: Page):
    """What stands there is what is sent, but for the key, which is not shown."""
    known.locator("#slider").focus()
    for _ in range(4):
        known.keyboard.press("ArrowLeft")
    assert known.input_value("#alpha") == "1.3"  # from 1.5, the server's
    known.fill("#prompt", "it's\n w7")
    known.fill("#max-tokens", "3")
    text = known.locator("#curl").inner_text()
    assert KEY not in text and "Bearer $API_KEY" in text
    assert text.startswith(f"curl -N {server.url}/v1/completions ")
    with known.expect_request("**/v1/completions") as asked:
        known.get_by_label("Base beside it").uncheck()
        known.keyboard.press("Control+Enter")
    (body,) = re.findall(r"-d '(.*)'$", text, re.S)
    sent = json.loads(asked.value.post_data)
    assert json.loads(body.replace("'\\''", "'")) == sent
    assert sent["vllm_xargs"]["proxy_alpha"] == 1.3 and sent["prompt"] == "it's\n w7"
    answers(known, 1)


def test_a_phone_and_a_dark_room(opened: Page):
    """Nothing is wider than the screen, and colours follow the system's."""
    opened.set_viewport_size({"width": 360, "height": 740})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    colour = "getComputedStyle(document.body).backgroundColor"
    opened.emulate_media(color_scheme="light")
    light = opened.evaluate(colour)
    opened.emulate_media(color_scheme="dark")
    assert opened.evaluate(colour) != light


def test_the_page_is_static_and_says_little(server):
    """No key is asked for, and nothing is told that only those with a key should know."""

    def get(path: str):
        return urllib.request.urlopen(f"{server.url}/playground/{path}")

    assert json.load(get("settings.json")).keys() == {
        *("alpha", "alpha_range", "explain", "expert")
    }
    page = get("")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    for path in ("absent", "../admission.py", "%2e%2e/admission.py"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(path)
        assert refused.value.code == 404
