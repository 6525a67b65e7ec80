"""The chat page, driven in a real Chromium."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_fixtures import Running, folder_of_adapters, running
from test_serving import until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine"),
]
PICTURES = os.environ.get("LIT_ADAPTER_PICTURES")
"""A folder to keep pictures of the page in, to be looked at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    paths = folder_of_adapters(tiny_base, tmp_path_factory.mktemp("served"))
    with running(base=tiny_base, adapters=paths, context=250) as found:
        yield found


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second for a token."""
    import time

    from lit_adapter.model.cpu_decode import CpuDecode

    plain = CpuDecode.step

    def slow(self: Any, *given: Any) -> Any:
        time.sleep(0.1)
        return plain(self, *given)

    monkeypatch.setattr(CpuDecode, "step", slow)


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: Running) -> Iterator[Open]:
    """Open the page; every error of a script, or against its policy, fails the test."""
    contexts, mistakes = [], []

    def open_page(**more: Any) -> Any:
        context = browser.new_context(viewport={"width": 1100, "height": 760}, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(250_000)
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on("console", lambda line: mistakes.append(line.text) if is_mistake(line) else None)
        page.goto(server.url)
        wait(page, "document.querySelector('#model').options.length > 1")
        settings(page, temperature="0", max_tokens="12")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not mistakes


def wait(page: Any, expression: str) -> None:
    """Until an expression is true in the page; its policy forbids the browser's own way of waiting."""
    for _ in range(2500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(expression)


def is_mistake(line: Any) -> bool:
    """Chromium also reports an answer of status 400, which the page shows."""
    return line.type == "error" and "status of 400" not in line.text


def settings(page: Any, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Settings").click()


def say(page: Any, text: str, *, wait: bool = True) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    if wait:
        page.get_by_role("button", name="Send", exact=True).wait_for()


def answers(page: Any) -> list[str]:
    found: list[str] = page.locator(".answer .text").all_text_contents()
    return found


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def test_a_conversation_is_answered_and_survives_a_reload(opened: Open, server: Running) -> None:
    page = opened()
    picture(page, "empty")
    page.get_by_label("Model").select_option("beta")
    say(page, "Say it back.")
    body = {"model": "beta", "messages": [{"role": "user", "content": "Say it back."}], "max_tokens": 12}
    _, wanted, _ = server.ask("v1/chat/completions", body | {"temperature": 0, "top_k": 0})
    assert answers(page) == [wanted["choices"][0]["message"]["content"]]
    say(page, "red river")
    assert len(answers(page)) == 2
    said = answers(page)
    page.reload()
    wait(page, "document.querySelector('#model').options.length > 1")
    assert answers(page) == said
    assert page.locator("#model").input_value() == "beta"
    assert page.locator("#max_tokens").input_value() == "12"
    page.get_by_role("button", name="New chat").click()
    assert answers(page) == []
    page.reload()
    assert answers(page) == []


def test_an_answer_comes_piece_by_piece_and_is_stopped(
    opened: Open, server: Running, slow_steps: None
) -> None:
    page = opened()
    settings(page, max_tokens="100")
    say(page, "Say it back.", wait=False)
    wait(page, "document.querySelector('.answer .text').textContent.length > 3")
    first = answers(page)[0]
    wait(page, f"document.querySelector('.answer .text').textContent.length > {len(first)}")
    picture(page, "streaming")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped", exact=True).wait_for()
    stopped = answers(page)[0]
    page.wait_for_timeout(400)
    assert answers(page)[0] == stopped
    until(lambda: server.counter("lit_adapter_slots_used") == 0)
    say(page, "and again", wait=False)
    wait(page, "document.querySelectorAll('.answer .text')[1].textContent.length > 1")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send", exact=True).wait_for()


def test_two_models_answer_side_by_side(opened: Open) -> None:
    page = opened()
    page.get_by_label("Model").select_option("alpha")
    page.get_by_label("Beside it").select_option("tiny")
    say(page, "Say it back.")
    both = answers(page)
    assert len(both) == 2
    assert both[0] != both[1]
    picture(page, "beside")
    left, right = (box.bounding_box() for box in page.locator(".answer").all())
    assert left["y"] == right["y"]
    assert page.locator(".by").all_text_contents() == ["alpha", "tiny"]


def test_a_message_is_edited_and_an_answer_asked_for_again(opened: Open) -> None:
    page = opened()
    say(page, "Say it back.")
    say(page, "red river")
    before = answers(page)
    page.get_by_role("button", name=re.compile("Ask .* again")).last.click()
    page.get_by_role("button", name="Send", exact=True).wait_for()
    assert answers(page) == before  # greedy
    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("Edit the message").fill("a stone")
    page.get_by_role("button", name="Send the edited message").click()
    wait(page, "document.querySelectorAll('.answer').length === 1")
    page.get_by_role("button", name="Send", exact=True).wait_for()
    assert page.locator(".user .text").all_text_contents() == ["a stone"]
    assert answers(page)[0] != before[0]


def test_texts_are_never_markup(opened: Open) -> None:
    page = opened()
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    say(page, evil)
    assert page.locator(".user .text").all_text_contents() == [evil]
    page.evaluate("turns[0].answers[0].text = `<b id=bold>x</b><img src=x onerror=alert(1)>`; keep(); draw()")
    page.reload()
    assert page.locator("#bold, #chat img, #chat script").count() == 0
    assert page.title() == "Chat - lit-adapter"


def test_errors_are_said_in_their_place(opened: Open, server: Running) -> None:
    page = opened()
    settings(page, max_tokens="200", system="word " * 10)
    say(page, "x")
    assert "exceed a context of 250" in answers(page)[0]
    picture(page, "error")


def test_nothing_comes_from_elsewhere_and_controls_have_names(opened: Open, server: Running) -> None:
    status, _, headers = server.ask("")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("", "page.css", "page.js"):
        assert not re.search(r"https?://|//[a-z]+\.", server.ask(path)[1])
    page = opened()
    page.get_by_role("button", name="Settings").click()
    say(page, "Say it back.")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")].filter(
            (e) => !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length)))
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_the_page_is_readable_in_both_schemes_and_on_a_phone(opened: Open, scheme: str, width: int) -> None:
    page = opened(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 740})
    say(page, "Say it back. " * 8)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture(page, f"{scheme}-{width}")
    page.get_by_role("button", name="Settings").click()
    picture(page, f"{scheme}-{width}-settings")
    ratio = page.evaluate(
        """() => {
            const luminance = (color) => {
                const parts = color.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
                    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
            };
            const colors = (e) => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor];
            return [...document.querySelectorAll("#send, .user, .answer, textarea")].map((e) => {
                const [a, b] = colors(e).map(luminance);
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
        }"""
    )
    assert min(ratio) >= 4.5
    for control in ("#prompt", "#send"):
        box = page.locator(control).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 740
