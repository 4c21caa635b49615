"""The page at `/`, in a real Chromium. Only the slow tests need Playwright."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from hovle_core.images import FORMATS, open_image
from hovle_serve.chat import ChatSession
from hovle_serve.sampling import Sampling

if TYPE_CHECKING:
    from playwright.sync_api import Locator, LocatorAssertions, Page, Route

PASTE = """() => {
    const file = new File([Uint8Array.from(atob(PNG), (c) => c.charCodeAt(0))], "a.png", {type: "image/png"});
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(file);
    document.body.dispatchEvent(new EVENT);
}"""
DROP = """([name, type]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File(["<svg/>"], name, {type}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
}"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def test_the_page_takes_nothing_from_elsewhere_and_nobody_frames_it(serve):
    response = serve().http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"https?:|[\"'(]//|innerHTML|<link|@import|import\(", response.text)


def test_the_page_names_the_kinds_of_pictures_that_are_taken(serve):
    kinds = re.search(r"Pictures may be (.*?)\.", serve().http.get("/").text)[1]
    assert sorted(kinds.upper().replace(" OR ", ", ").split(", ")) == sorted(FORMATS)


SECONDS = 60  # of patience, on a machine that does other things as well


def expect(locator: Locator) -> LocatorAssertions:
    from playwright.sync_api import expect as assertions

    assertions.set_options(timeout=SECONDS * 1000)
    return assertions(locator)


@pytest.fixture
def page() -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--no-proxy-server"]
        )
        page = browser.new_page(viewport={"width": 360, "height": 640})
        page.set_default_timeout(SECONDS * 1000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert errors == []


def answers(page: Page) -> Locator:
    return page.locator("#log li.assistant")


def expect_idle(page, server):
    deadline = time.monotonic() + SECONDS
    while server.engine.num_active:
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


@pytest.mark.slow
def test_a_conversation_by_keyboard_on_a_phones_width(serve, page, model, processor, picture):
    session = ChatSession(model, processor, sampling=Sampling(max_new_tokens=9))
    expected = ["".join(session.ask("what is this?", [open_image(picture)])), "".join(session.ask("and?"))]
    page.goto(serve().url)
    expect(page.locator("#model")).to_have_text("tiny/hovle")
    page.locator("#limit").evaluate("(input) => { input.value = 9; }")
    page.locator("#files").set_input_files(picture)
    expect(page.locator("#waiting img")).to_have_count(1)
    page.keyboard.type("what is this?")  # the message box has the focus
    page.keyboard.press("Enter")
    expect(answers(page).nth(0)).to_contain_text("4 of them pictures; 9 written")
    assert answers(page).nth(0).evaluate("(item) => item.firstChild.data") == expected[0]
    expect(page.locator("#log li.user img")).to_have_count(1)
    page.keyboard.type("and?")
    page.keyboard.press("Enter")
    expect(answers(page).nth(1)).to_contain_text("9 written")
    assert answers(page).nth(1).evaluate("(item) => item.firstChild.data") == expected[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"SUMMARY", "reset", "text", "files", "send"} <= reached
    page.locator("#reset").press("Enter")
    expect(page.locator("#log li")).to_have_count(0)


@pytest.mark.slow
def test_the_tiles_that_the_model_sees_are_shown(serve, page, picture, tmp_path):
    Image.new("RGB", (300, 60), "blue").save(wide := tmp_path / "wide.png")
    page.goto(serve().url)
    page.locator("#limit").evaluate("(input) => { input.value = 3; }")
    page.locator("#files").set_input_files([picture, wide])
    page.locator("#text").press("Enter")
    tiles = page.locator("#log li.user figure.tiles")
    expect(tiles).to_have_count(2)
    expect(tiles.nth(0)).to_have_text("80 × 60: 1 tile, 4 tokens")
    expect(tiles.nth(1)).to_have_text("300 × 60: 5 tiles (4 × 1 and the whole), 20 tokens")
    expect(tiles.nth(1).get_by_role("img")).to_have_count(5)
    expect(tiles.nth(1).get_by_label("row 1, column 4")).to_be_visible()
    second = tiles.nth(1).get_by_role("img").nth(1)
    assert second.evaluate("(cell) => cell.style.backgroundSize") == "400% 100%"
    assert second.evaluate("(cell) => getComputedStyle(cell).backgroundImage").startswith(
        'url("data:image/png'
    )
    page.locator("#text").fill("and?")  # a turn without pictures shows no tiles, and takes none away
    page.locator("#text").press("Enter")
    expect(answers(page).nth(1)).to_contain_text("3 written")
    expect(tiles).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def ask_for_much(serve, page, model):
    """A question whose answer is long and slow enough that a browser can do something meanwhile; the server."""
    server = serve()
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    page.goto(server.url)
    page.locator("#limit").evaluate("(input) => { input.value = 450; }")
    page.keyboard.type("count")
    page.keyboard.press("Enter")
    return server


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["by keyboard", "by the button"])
def test_an_answer_is_stopped_and_what_came_is_kept(serve, page, model, stop):
    server = ask_for_much(serve, page, model)
    expect(answers(page)).to_have_text(re.compile(".{20}"))
    expect(page.locator("#stop")).to_be_visible()
    if stop == "by keyboard":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(page.locator("#send")).to_be_visible()
    assert 20 <= len(answers(page).inner_text()) < 2000
    assert page.evaluate("messages.map((message) => message.role)") == ["user", "assistant"]
    expect_idle(page, server)


@pytest.mark.slow
def test_pictures_are_dropped_and_pasted_and_taken_away_again(serve, page):
    page.goto(serve().url)
    for event in (
        'ClipboardEvent("paste", {clipboardData: dataTransfer, bubbles: true, cancelable: true})',
        'DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true})',
    ):
        page.evaluate(PASTE.replace("PNG", repr(PNG)).replace("EVENT", event))
    expect(page.locator("#waiting img")).to_have_count(2)
    page.get_by_role("button", name="Remove picture 1").click()
    expect(page.locator("#waiting img")).to_have_count(1)


@pytest.mark.slow
def test_a_refused_question_goes_back_to_where_it_was_written(serve, page):
    page.goto(serve(api_keys=["secret"]).url)
    page.locator("#text").fill("word " * 600)
    page.locator("#key").fill("wrong")
    page.locator("#key").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("a valid API key is needed")
    page.locator("#key").fill("secret")
    page.locator("#key").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the conversation takes")
    expect(page.locator("#text")).to_have_value(("word " * 600).strip())
    expect(page.locator("#key")).to_be_hidden()
    page.locator("#limit").evaluate("(input) => { input.value = 5; }")
    page.locator("#text").fill("<b>hi</b>")
    page.locator("#send").click()
    expect(answers(page)).to_contain_text("written")
    expect(page.locator("#log li.user")).to_have_text("<b>hi</b>")
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.slow
def test_what_was_written_meanwhile_is_kept_behind_a_refused_question(serve, page, picture):
    page.goto(serve().url)
    expect(page.locator("#model")).to_have_text("tiny/hovle")
    asked: list[Route] = []
    page.route(
        "**/v1/chat/completions", lambda route: asked.append(route)
    )  # no answer until the test says so
    page.locator("#files").set_input_files(picture)
    expect(page.locator("#waiting img")).to_have_count(1)
    page.locator("#text").fill("first")
    page.locator("#text").press("Enter")
    expect(page.locator("#waiting img")).to_have_count(0)
    page.locator("#text").fill("second")
    page.locator("#files").set_input_files(picture)
    expect(page.locator("#waiting img")).to_have_count(1)
    asked[0].abort()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#text")).to_have_value("first\nsecond")
    expect(page.locator("#waiting img")).to_have_count(2)
    assert page.evaluate("messages.length") == 0


@pytest.mark.slow
def test_a_key_is_tried_without_a_message(serve, page):
    page.goto(serve(api_keys=["secret"]).url)
    page.locator("#key").fill("wrong")
    page.locator("#key").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("a valid API key is needed")
    page.locator("#key").fill("secret")
    page.locator("#key").press("Enter")
    expect(page.locator("#model")).to_have_text("tiny/hovle")
    expect(page.locator("#key")).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#text")).to_be_focused()


@pytest.mark.slow
def test_a_new_conversation_stops_the_answer(serve, page, model):
    server = ask_for_much(serve, page, model)
    expect(answers(page)).to_have_text(re.compile(".{5}"))
    page.locator("#limit").evaluate("(input) => { input.value = 3; }")
    page.locator("#reset").press("Enter")
    expect(page.locator("#log li")).to_have_count(0)
    page.keyboard.type("hi")  # the message box has the focus
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("3 written")
    expect(page.locator("#send")).to_be_visible()
    assert page.evaluate("messages.map(({role}) => role)") == ["user", "assistant"]
    expect(page.get_by_role("alert")).to_be_hidden()
    expect_idle(page, server)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [("a.svg", "image/svg+xml"), ("a.heic", "image/heic"), ("a.txt", "text/plain")]
)
def test_what_the_server_cannot_read_is_refused_when_it_is_added(serve, page, file):
    page.goto(serve().url)
    page.evaluate(DROP, file)
    expect(page.get_by_role("alert")).to_have_text(
        f"not added: {file[0]}. Pictures may be JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF."
    )
    expect(page.locator("#waiting img")).to_have_count(0)
