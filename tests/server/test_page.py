"""The web page in a real browser: sending messages, rendering answers, and the safety of hostile answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chromium import PROGRAM
from samples import ANSWERS, IMAGES
from server.browser import Browser
from server.conftest import Running, wrong


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("there is no Chromium to look at the page with")
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(browser: Browser, running: Running) -> Browser:
    """The page after opening, without stored conversations."""
    browser.open(f"{running.url}/health")
    # a page that is left before the deletion has ended can leave the database locked
    browser.value("new Promise((done) => { indexedDB.deleteDatabase('vlpack').onsuccess = () => done(true); })")
    browser.value("localStorage.clear(); sessionStorage.clear()")
    browser.console.clear()
    browser.requests.clear()
    browser.open(f"{running.url}/")
    browser.until("document.getElementById('model').value === 'digits'")
    return browser


def ask(page: Browser, text: str, *files: Path) -> None:
    if files:
        page.choose("#files", *files)
        page.until(f"document.querySelectorAll('#media li').length === {len(files)}")
    page.value("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter", 13, "\r")
    page.until("document.getElementById('status').textContent === 'Answered.'")


def last(page: Browser) -> str:
    return str(page.value("[...document.querySelectorAll('article.assistant')].at(-1).innerText"))


def shown(page: Browser, text: str, **turn: Any) -> None:
    """Opens a conversation in which ``text`` is the answer to a message with an image."""
    picture = {"kind": "image", "name": "a.png", "url": "data:image/png;base64," + _png()}
    turns = [{"role": "user", "text": "?", "media": [picture]}, {"role": "assistant", "text": text, **turn}]
    made = json.dumps({"id": "made", "title": "Made", "turns": turns})
    page.value(f"import('/page/store.js').then((store) => store.keep({made}))")
    page.call("Page.reload")
    page.until("document.querySelectorAll('#list li').length > 0")
    page.value("document.querySelector('#list button').click()")
    page.until("document.querySelectorAll('article').length === 2")


def _png() -> str:
    import base64

    file = io.BytesIO()
    Image.new("RGB", (400, 200), "white").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_question_about_an_image(page: Browser, running: Running) -> None:
    ask(page, "Read the digits.", IMAGES / "00.png")
    said = last(page)
    assert said.split()[1:3] == ANSWERS["00.png"]["read"].split()
    assert "tokens · first token after" in said
    page.value(
        "[...document.querySelectorAll('article.assistant button')].find((b) => b.innerText === 'Regenerate').click()"
    )
    page.until("document.getElementById('status').textContent === 'Answered.'")
    assert page.value("document.querySelectorAll('article').length") == 2
    page.call("Page.reload")  # the conversation is kept
    page.until("document.querySelectorAll('#list li').length === 1")
    page.value("document.querySelector('#list button').click()")
    page.until("document.querySelectorAll('article').length === 2")
    assert page.value("document.querySelector('article.user img').naturalWidth") > 0
    page.value("document.querySelector('article.user .tools button').click()")  # edit
    assert page.value("document.getElementById('question').value") == "Read the digits."
    assert page.value("document.querySelectorAll('#media li').length") == 1
    assert page.console == []
    assert all(url.startswith((running.url, "data:", "blob:")) for url in page.requests)


@pytest.mark.parametrize(
    "event", ["new DragEvent('drop', {dataTransfer: data,", "new ClipboardEvent('paste', {clipboardData: data,"]
)
def test_files_are_dropped_and_pasted(event: str, page: Browser) -> None:
    page.value(
        f"""{{
        const bytes = Uint8Array.from(atob('{_png()}'), (character) => character.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], 'a.png', {{type: 'image/png'}}));
        data.items.add(new File(['words'], 'a.txt', {{type: 'text/plain'}}));
        document.getElementById('question').dispatchEvent({event} bubbles: true, cancelable: true}}));
        }}"""
    )
    page.until("document.querySelectorAll('#media li').length === 1")
    assert page.value("document.querySelector('#media img').naturalWidth") == 400
    assert "a.txt was not added" in page.value("document.getElementById('status').textContent")


def test_an_answer_is_shown_while_the_storage_does_not_answer(page: Browser) -> None:
    page.value("indexedDB.open = () => ({})")
    ask(page, "Read the digits.", IMAGES / "00.png")
    assert last(page).split()[1:3] == ANSWERS["00.png"]["read"].split()


def test_stop(page: Browser, running: Running) -> None:
    page.value("document.getElementById('model').value = 'tools'")
    page.value("document.getElementById('question').focus()")
    page.type("Hello")
    page.press("Enter", 13, "\r")
    page.until("document.getElementById('status').textContent === 'Answering …'")
    page.press("Escape", 27)
    page.until("document.getElementById('status').textContent === 'Stopped.'")
    assert page.value("document.getElementById('stop').hidden")
    assert len(last(page)) > 20
    running.idle("tools")


def test_an_error_is_told(page: Browser) -> None:
    page.value("document.querySelector('[name=temperature]').value = 1000")
    page.value("document.getElementById('question').value = 'Hello'")
    page.value("document.getElementById('send').click()")
    page.until("document.querySelectorAll('.error').length === 1")
    assert "'temperature' is 1000.0; it must be a number from 0 to 100." in last(page)


def test_markdown(page: Browser) -> None:
    shown(
        page, "# Title\n\nA **b** `c` *d* [e](https://example.org)\n\n- one\n  - two\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    inside = "document.querySelector('.text')"
    assert page.value(f"{inside}.querySelector('h3').innerText") == "Title"
    assert page.value(f"[...{inside}.querySelectorAll('strong, code, em, a')].map((e) => e.innerText)") == list("bcde")
    assert page.value(f"{inside}.querySelectorAll('ul ul li').length") == 1
    assert page.value(f"{inside}.querySelectorAll('td').length") == 2
    assert page.value(f"{inside}.querySelector('a').rel") == "noopener noreferrer"


HARM = "document.title='harmed'"  # without white space, at which a link would end


@pytest.mark.parametrize(
    "text",
    [
        f'<img src=x onerror="{HARM}"><script>{HARM}</script>',
        f"[click](javascript:{HARM}) ![x](https://theirs.example/x.png)",
        f"`<svg onload={HARM}>`\n\n```html\n<script>{HARM}</script>\n```",
        f"| <b onclick={HARM}> | b |\n|---|---|\n| <iframe src=javascript:{HARM}> | 2 |",
        f'[{{"bbox_2d": [1, 2, 3, 4], "label": "<img src=x onerror={HARM}>"}}]',
    ],
    ids=["html", "links", "code", "table", "labels"],
)
def test_answers_do_no_harm(text: str, page: Browser, running: Running) -> None:
    page.requests.clear()
    shown(page, text, reasoning=text)
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found = "script, iframe, svg, b, [onerror], [onclick], [onload], article img:not([src^=data])"
    assert page.value(f"document.querySelectorAll('main :is({found})').length") == 0
    assert page.value("[...document.querySelectorAll('main a')].filter((a) => !/^https?:/.test(a.href)).length") == 0
    assert page.value("document.title") == "vlpack"
    assert all(url.startswith((running.url, "data:")) for url in page.requests)
    assert page.console == []


def test_boxes_and_points_are_drawn_where_they_are(page: Browser) -> None:
    marks = [
        {"bbox_2d": [100, 200, 500, 900], "label": "cat"},
        {"point_2d": [750, 500], "label": "nose"},
        {"bbox_2d": [0, 0, 1000, 1000], "label": "all"},
        {"bbox_2d": [1, 2, 3], "label": "no box"},
    ]
    shown(page, "```json\n" + json.dumps(marks) + "\n```")
    found = page.value(
        "(() => { const p = document.querySelector('.drawn img').getBoundingClientRect();"
        "return [...document.querySelectorAll('.drawn .box, .drawn .point')].map((e) => {"
        "const r = e.getBoundingClientRect();"
        "return [e.innerText, (r.left - p.left) / p.width, (r.top - p.top) / p.height,"
        "(r.right - p.left) / p.width, (r.bottom - p.top) / p.height]; }); })()"
    )
    assert [name for name, *_ in found] == ["cat", "nose", "all"]
    assert found[0][1:] == pytest.approx([0.1, 0.2, 0.5, 0.9], abs=0.01)
    assert [(found[1][1] + found[1][3]) / 2, (found[1][2] + found[1][4]) / 2] == pytest.approx([0.75, 0.5], abs=0.01)
    assert found[2][1:] == pytest.approx([0, 0, 1, 1], abs=0.01)
    assert page.value("document.querySelector('.tree').innerText").count("bbox_2d") == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_widths_and_colours(width: int, scheme: str, page: Browser) -> None:
    shown(
        page, "A long " + "word" * 100 + "\n\n```\n" + "code " * 100 + "\n```\n\n|" + " a |" * 40 + "\n|" + "---|" * 40
    )
    page.size(width, 700, scheme)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.getElementById('log').scrollWidth - document.getElementById('log').clientWidth") == 0
    assert (
        page.value("Math.max(...[...document.querySelectorAll('article')].map((e) => e.getBoundingClientRect().right))")
        <= width
    )
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 27)")
    names = "button:not([hidden]), input, select, textarea"
    unnamed = (
        f"[...document.querySelectorAll('{names}')].filter((e) => !e.innerText && !e.ariaLabel && !e.labels?.length)"
    )
    assert page.value(f"{unnamed}.map((e) => e.outerHTML)") == []


def test_a_pdf_becomes_pictures(running: Running, page: Browser, tmp_path: Path) -> None:
    pages = [Image.new("RGB", (200, 300), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    page.choose("#files", tmp_path / "a.pdf")
    page.until("document.querySelectorAll('#media li').length === 2")
    assert page.value("document.querySelector('#media li').innerText").startswith("a.pdf, page 1")
    data = (tmp_path / "a.pdf").read_bytes()
    assert len(running.ask("/pdf", data, Content_Type="application/pdf").json["pages"]) == 2
    wrong(running.ask("/pdf", b"%PDF-1.4 nothing", Content_Type="application/pdf"), 400, "damaged, protected")
    wrong(running.ask("/pdf", data), 415, "application/pdf")


def test_files_of_the_page(running: Running) -> None:
    reply = running.ask("/")
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert running.ask("/page/app.js").headers["Content-Type"].startswith("text/javascript")
    for name in ("nothing.js", "..%2fapp.py", "%2e%2e/app.py", "../app.py"):
        assert running.ask(f"/page/{name}").status == 404
    text = b"".join(running.ask(f"/page/{name}").data for name in ("app.js", "marks.js", "markdown.js", "store.js"))
    assert b"innerHTML" not in text
    assert b"https://" not in text.replace(b"https?:", b"")
