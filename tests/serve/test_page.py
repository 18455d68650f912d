"""The page in a real browser: drop a picture, ask, see the answer stream in."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any

import pytest

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.serve.run import KEY_VARIABLE

from . import browser
from .parrot import Parrot, png, reply, served, until

if browser.chromium() is None and not os.environ.get("CI"):
    pytest.skip("no Chromium on this machine (apt-get install chromium)", allow_module_level=True)


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    assert browser.chromium() is not None, "CI has to have Chromium: apt-get install chromium"
    with browser.page() as opened:
        yield opened
        assert not opened.errors


@pytest.fixture
def parrot(tokenizer: Tokenizer) -> Parrot:
    return Parrot(tokenizer)


def ask(tab: Any, question: str) -> None:
    tab.get_by_role("textbox", name="Question").fill(question)
    tab.keyboard.press("Enter")


def answered(tab: Any, number: int) -> str:
    turn = tab.locator(".turn.assistant").nth(number)
    tab.locator(".turn.assistant:not(.busy)").nth(number).wait_for()
    return str(turn.locator("p").first.inner_text())


def test_drop_ask_and_see_the_answer_stream(tab: Any, parrot: Parrot) -> None:
    parrot.delay = 0.03
    with served(parrot) as server:
        tab.goto(server.url)
        tab.get_by_role("heading", name="parrot").wait_for()
        assert tab.get_by_role("button", name="Ask").is_disabled()
        browser.drop(tab, png(60, 40), "a.png")
        tab.get_by_role("img", name="Picture 1").wait_for()
        browser.drop(tab, png(40, 60, (0, 90, 200)), "b.png")
        tab.get_by_role("img", name="Picture 2").wait_for()
        tab.get_by_role("textbox", name="Question").fill("What do you see?")
        tab.get_by_role("button", name="Ask").click()

        words = tab.locator(".turn.assistant p")
        seen = set()
        until(lambda: bool(seen.add(words.inner_text())) or not tab.locator(".turn.busy").count())
        assert len(seen - {""}) > 3  # it grew before our eyes
        assert answered(tab, 0) == reply(2).strip()
        figures = tab.locator(".turn.assistant .figures").inner_text()
        assert "first token after" in figures and "tokens/s" in figures
        assert tab.locator(".turn.user img").count() == 2 and tab.locator("#chosen img").count() == 0

        for number in (1, 2, 3):  # the conversation goes on, its pictures with it, and the newest is in sight
            ask(tab, "And now?")
            assert answered(tab, number) == reply(2).strip()
        foot, form = (tab.locator(name).last.bounding_box() for name in (".figures", "#ask"))
        assert 0 < foot["y"] and foot["y"] + foot["height"] <= form["y"]
        tab.get_by_role("button", name="New conversation").click()
        ask(tab, "Alone?")
        assert answered(tab, 0) == reply(0).strip()


def test_choose_paste_and_remove(tab: Any, parrot: Parrot) -> None:
    with served(parrot) as server:
        tab.goto(server.url)
        tab.locator("#files").set_input_files(
            [{"name": f"{n}.png", "mimeType": "image/png", "buffer": png()} for n in "ab"]
        )
        tab.get_by_role("button", name="Remove picture 2").click()
        tab.evaluate(
            """(data) => {
              const transfer = new DataTransfer();
              const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
              transfer.items.add(new File([bytes], "p.png", {type: "image/png"}));
              document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
            }""",
            base64.b64encode(png()).decode(),
        )
        tab.get_by_role("img", name="Picture 2").wait_for()
        ask(tab, "?")
        assert answered(tab, 0) == reply(2).strip()


def test_stop(tab: Any, parrot: Parrot) -> None:
    parrot.delay = 0.2
    with served(parrot) as server:
        tab.goto(server.url)
        tab.get_by_role("heading", name="parrot").wait_for()
        ask(tab, "x")
        tab.locator(".turn.assistant p", has_text="I").wait_for()
        tab.get_by_role("button", name="Stop").click()
        tab.locator(".figures", has_text="stopped").wait_for()
        until(lambda: server.loop.running == 0 and not server.loop._open)
        assert len(answered(tab, 0)) < len(reply(0)) - 5


def test_errors_are_shown_plainly(tab: Any, parrot: Parrot) -> None:
    with served(parrot) as server:
        tab.goto(server.url)
        tab.get_by_role("heading", name="parrot").wait_for()
        browser.drop(tab, png()[:60], "broken.png")
        tab.locator("#chosen li").wait_for()
        ask(tab, "What is it?")
        alert = tab.get_by_role("alert")
        alert.wait_for()
        assert alert.inner_text().startswith("Failed to load image: ")
        assert (
            tab.get_by_role("textbox", name="Question").input_value() == "What is it?"
        )  # to be mended, not typed again
        tab.get_by_role("button", name="Remove picture 1").click()
        ask(tab, "Then without")
        assert answered(tab, 1) == reply(0).strip()
    tab.errors.clear()  # the console notes every 400


def test_the_key_is_asked_for(tab: Any, parrot: Parrot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-page")
    with served(parrot) as server:
        tab.goto(server.url)
        field = tab.get_by_label("This server asks for its API key.")
        field.fill("wrong")
        tab.get_by_role("button", name="Use it").click()
        tab.get_by_text("That key is not the server's.").wait_for()
        field.fill("sk-page")
        tab.keyboard.press("Enter")
        tab.get_by_role("heading", name="parrot").wait_for()
        ask(tab, "x")
        assert answered(tab, 0) == reply(0).strip()
        assert not field.is_visible()
    tab.errors.clear()  # the console notes every 401


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_screens_keyboard_and_both_schemes(tab: Any, parrot: Parrot, scheme: str) -> None:
    with served(parrot) as server:
        tab.emulate_media(color_scheme=scheme)
        tab.set_viewport_size({"width": 360, "height": 640})
        tab.goto(server.url)
        tab.get_by_role("heading", name="parrot").wait_for()
        browser.drop(tab, png(600, 100), "wide.png")
        tab.get_by_role("img", name="Picture 1").wait_for()
        ask(tab, "averyveryverylongwordthatmustbreak" * 4)
        answered(tab, 0)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 22)"
        assert dark == (scheme == "dark")
        reached = []
        for _ in range(12):  # everything that can be used is reached by the Tab key and has a name
            tab.keyboard.press("Tab")
            reached.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert {"fresh", "question", "choose", "SUMMARY"} <= set(reached)
        unnamed = """[...document.querySelectorAll('input, textarea, button')]
            .filter((e) => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).length"""
        assert tab.evaluate(unnamed) == 0
        tab.set_viewport_size({"width": 900, "height": 760})


def test_nothing_is_fetched_from_elsewhere_and_injected_script_does_not_run(tab: Any, parrot: Parrot) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    with served(parrot) as server:
        tab.goto(server.url)
        tab.get_by_role("heading", name="parrot").wait_for()
        ask(tab, "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>")
        answered(tab, 0)
        assert "<img src=x" in tab.locator(".turn.user p").inner_text()
        assert tab.title() == "parrot"
        tab.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
        )
        assert tab.title() == "parrot"
        assert asked and all(url.startswith((server.url, "data:", "blob:")) for url in asked)
        assert any("Content Security Policy" in text for text in tab.errors)
    tab.errors.clear()
