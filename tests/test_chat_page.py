"""The chat page that the server sends: what its file holds, and what it does in a browser."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import SIZES, Tab

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "nanovllm" / "serve" / "chat.html").read_text(encoding="utf-8")
KEY = "a key for this test"
LONG = {"temperature": 2, "seed": 1, "max_tokens": 3000}  # at this temperature it rarely ends


class Elements(HTMLParser):
    """The elements of the page, each with its attributes, its text and what it stands in."""

    EMPTY = {"meta", "link", "input", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        element = {"tag": tag, "text": "", "in": [e["tag"] for e in self.open], **dict(attrs)}
        self.found.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict[str, Any]]:
        return [element for element in self.found if element["tag"] in tags]


ELEMENTS = Elements()


# What the file holds.


def test_page_is_one_small_file():
    assert len(PAGE.encode()) < 25_000
    assert ELEMENTS.open == []
    loaded = [e.get(name) for e in ELEMENTS.found for name in ("src", "href", "srcset", "data")]
    assert [place for place in loaded if place is not None] == ["data:,"]  # no icon: none is asked


def test_page_names_no_other_host():
    ways = r"""\b(?:https?|wss?|ftp):|["'(]//\w|url\(|@import|WebSocket|EventSource|sendBeacon"""
    assert re.findall(ways, PAGE) == []
    asked = re.findall(r"""\b(?:fetch|call)\((.[^,)]*)""", PAGE)
    assert {place for place in asked if place[0] in "\"'`"} == {
        '"v1/models"',
        '"v1/chat/completions"',
    }


def test_page_never_takes_text_for_markup_or_code():
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|parseHTML|document\.write|srcdoc|DOMParser"
        r"|createContextualFragment|\beval\b|new Function|javascript:|setTimeout|setInterval"
    )
    assert re.findall(ways, PAGE) == []
    by_attribute = [name for e in ELEMENTS.found for name in e if name.startswith("on")]
    assert by_attribute == [] and not any("style" in e for e in ELEMENTS.found)


def test_policy_allows_this_page_and_nothing_else():
    (told,) = [e["content"] for e in ELEMENTS.all("meta") if "http-equiv" in e]
    policy = {words[0]: words[1:] for words in map(str.split, told.split(";"))}
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"] and policy["img-src"] == ["data:"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    for tag in ("style", "script"):
        (text,) = [e["text"] for e in ELEMENTS.all(tag)]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == [f"'sha256-{digest}'"], f"{tag} has changed: name its hash"


def test_every_control_has_a_label():
    labelled = {e["for"]: e["text"].strip() for e in ELEMENTS.all("label")}
    controls = ELEMENTS.all("input", "textarea", "select", "button")
    assert len(controls) > 15
    for control in controls:
        own = control["text"].strip() if control["tag"] == "button" else ""
        assert control.get("aria-label") or labelled.get(control.get("id")) or own, control


def test_every_reference_within_the_page_leads_somewhere():
    ids = [e["id"] for e in ELEMENTS.found if "id" in e]
    assert len(set(ids)) == len(ids)
    names = "for", "aria-controls", "aria-describedby", "aria-labelledby"
    referred = {e[name] for e in ELEMENTS.found for name in names if name in e}
    (script,) = [e["text"] for e in ELEMENTS.all("script")]
    referred |= set(re.findall(r'byId\("(\w+)"\)', script))
    assert referred <= set(ids)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(theme):
    colours = {
        name: pair[theme == "dark"]
        for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", PAGE)
    }
    pairs = [(t, b) for t in ("text", "muted", "accent") for b in ("page", "raised")]
    pairs += [("text", "bubble"), ("on-accent", "accent"), ("error", "on-error")]
    for pair in pairs:
        low, high = sorted(luminance(colours[name]) for name in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair


# What it does in a browser.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str, key: str = KEY) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server of its own process, which wants a key."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"serving needs {package}, which is not installed")
    address, log = f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("server") / "log"
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NANOVLLM_API_KEY": KEY}
    command = [sys.executable, "-m", "nanovllm", "serve", "--port", address.rpartition(":")[2]]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **settings}, cwd=ROOT
        )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                get(f"{address}/health")
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


class Page(Tab):
    """The chat page in a tab of its own, as a reader sees and uses it."""

    def text(self, selector: str) -> str | None:
        """The text of the last element that is shown."""
        return self.see(f"[...document.querySelectorAll('{selector}')].at(-1)?.innerText")

    def is_shown(self, selector: str) -> bool:
        return self.see(f"document.querySelector('{selector}').checkVisibility()")

    def press(self, name: str, modifiers: int = 0) -> None:
        """Press a key; `modifiers` of 8 is Shift."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "Delete": 46}
        key = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
        text = {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, **key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **key)

    def click(self, selector: str) -> None:
        """Click in the middle of the last of these elements, which must be there to be seen."""
        found = f"[...document.querySelectorAll('{selector}')].at(-1)"
        place = self.see(
            f"(() => {{ const box = {found}.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        on = self.see(f"{found}.contains(document.elementFromPoint({place[0]}, {place[1]}))")
        assert on, f"something covers {selector} at {place}"
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def fill(self, name: str, text: str) -> None:
        """Write into a field of the settings."""
        is_hidden = not self.is_shown("#settings")
        if is_hidden:
            self.click("#open")
        self.see(f"document.getElementById('{name}').focus()")
        self.see(f"document.getElementById('{name}').select()")
        self.type(text) if text else self.press("Delete")
        if is_hidden:
            self.click("#done")

    def wait_for_model(self) -> None:
        """Until the page knows the model's name; who says something before asks without one."""
        self.wait("document.getElementById('model').textContent === 'nanovllm-tiny'")

    def say(self, text: str) -> None:
        """Type a message and press Enter."""
        self.see("document.getElementById('entry').focus()")
        self.type(text)
        self.press("Enter")

    def wait_for_end(self) -> None:
        self.wait("document.getElementById('stop').hidden")

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked of the model."""
        requests = [event["request"] for event in self.events("Network.requestWillBeSent")]
        return [json.loads(r["postData"]) for r in requests if r["method"] == "POST"]

    def faults(self) -> list[str]:
        assert f"{self.address}/v1/models" in self.requests()
        return super().faults()

    def overflow(self) -> int:
        """By how many pixels anything is wider than the screen."""
        return self.see(
            "Math.max(...[...document.querySelectorAll('html, body, body *:not(.unseen)')]"
            ".map((e) => Math.max(e.getBoundingClientRect().right - innerWidth,"
            " e.matches('html, #log, #settings') ? e.scrollWidth - e.clientWidth : 0)))"
        )

    def keep(self, name: str) -> None:
        """Save what is seen, where a folder for it is named."""
        if folder := os.environ.get("CHAT_PAGE_PICTURES"):
            picture = self.call("Page.captureScreenshot", format="png")["data"]
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(picture))


WITH_KEY = f"sessionStorage.setItem('nanovllm-key', {KEY!r});"
# Instead of the server's answer: `send` brings text into a stream, `end` ends it.
BY_HAND = """
const ask = window.fetch, encoder = new TextEncoder();
window.fetch = (place, options) => {
  if (!place.endsWith("completions")) return ask(place, options);
  window.asked = JSON.parse(options.body);
  const stream = new ReadableStream({ start(into) {
    window.sendBytes = (bytes) => into.enqueue(bytes);
    window.send = (text) => into.enqueue(encoder.encode(text));
    window.tell = (delta) => send(`data: ${JSON.stringify({ choices: [{ delta }] })}\\n\\n`);
    window.end = () => into.close();
    options.signal.onabort = () => into.error(options.signal.reason);
  } });
  return Promise.resolve(new Response(stream));
};
"""


@pytest.fixture
def open_page(browser, server) -> Iterator[Any]:
    opened = []

    def open_one(size: str = "wide", theme: str = "light", before: str = WITH_KEY) -> Page:
        opened.append(Page(browser, f"{server}/", size, theme, before))
        return opened[-1]

    yield open_one
    for page in opened:
        page.close()


STATS = (
    r"\d+ tokens · [\d.]+ tokens/s · first token after \d+\.\d\d\ss"
    r" · prompt of \d+ tokens, \d+ cached"
)
ANSWER = ".turn:last-child .answer > .said"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_conversation_can_be_had(open_page, size, theme):
    page = open_page(size, theme)
    page.wait_for_model()
    page.keep(f"{size}-{theme}-0-welcome")
    for name, value in LONG.items():
        page.fill(name, str(value))
    page.say("Tell me a story.")
    page.wait(f"document.querySelector('{ANSWER}')?.innerText.length > 20")
    seen = page.text(ANSWER)
    page.wait(f"document.querySelector('{ANSWER}').innerText.length > {len(seen) + 100}")
    assert page.text(ANSWER).startswith(seen)
    assert not page.is_shown("#send")
    page.keep(f"{size}-{theme}-1-answering")
    page.click("#stop")
    page.wait_for_end()
    stopped = page.text(ANSWER)
    assert "stopped" in page.text(".stats") and page.is_shown("#send")
    page.see("new Promise((done) => setTimeout(done, 300))")
    assert page.text(ANSWER) == stopped

    page.fill("temperature", "0")
    page.say("Tell me a story about a fox.")
    page.wait_for_end()
    assert len(page.text(ANSWER)) > 100
    assert re.fullmatch(STATS, page.text(".stats")), page.text(".stats")
    first, second = page.bodies()
    assert {name: first[name] for name in LONG} == LONG
    assert first["stream"] and first["stream_options"] == {"include_usage": True}
    assert [message["content"] for message in second["messages"]] == [
        "Tell me a story.",
        stopped,
        "Tell me a story about a fox.",
    ]
    page.keep(f"{size}-{theme}-2-answered")

    page.fill("temperature", "9")
    page.say("And one about a bear?")
    page.wait_for_end()
    assert page.text("[role=alert]") == "temperature: Input should be less than or equal to 2"
    page.keep(f"{size}-{theme}-3-refused")
    assert page.overflow() <= 0
    if size == "phone":
        page.click("#open")
        page.keep(f"{size}-{theme}-4-settings")
        assert page.overflow() <= 0
    assert page.see("getComputedStyle(document.body).colorScheme") == "light dark"
    behind = page.see("getComputedStyle(document.body).backgroundColor")
    assert behind == {"light": "rgb(250, 249, 246)", "dark": "rgb(24, 24, 22)"}[theme]
    assert page.faults() == []


def test_stop_ends_the_work_on_the_server_too(open_page, server):
    page = open_page()
    for name, value in LONG.items():
        page.fill(name, str(value))
    page.say("Tell me a story.")
    page.wait(f"document.querySelector('{ANSWER}')?.innerText.length > 20")
    assert "nanovllm_requests_running 1" in get(f"{server}/metrics")
    page.press("Escape")
    page.wait_for_end()
    end = time.monotonic() + 10
    while "nanovllm_requests_running 0" not in get(f"{server}/metrics"):
        assert time.monotonic() < end


def test_empty_settings_are_not_sent_and_all_others_are(open_page):
    page = open_page()
    page.wait_for_model()
    page.fill("max_tokens", "3")
    page.say("Hello")
    page.wait_for_end()
    assert "3 tokens" in page.text(".stats") and "no more tokens" in page.text(".stats")
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7}
    for name, value in settings.items():
        page.fill(name, str(value))
    page.fill("max_tokens", "")
    page.fill("system", "Be brief.")
    page.click("#new")
    page.say("Hello")
    page.wait_for_end()
    common = {"model": "nanovllm-tiny", "stream": True, "stream_options": {"include_usage": True}}
    hello = {"role": "user", "content": "Hello"}
    few, many = page.bodies()
    assert few == {**common, "messages": [hello], "max_tokens": 3}
    system = {"role": "system", "content": "Be brief."}
    assert many == {**common, "messages": [system, hello], **settings}
    assert page.see("document.querySelectorAll('.turn').length") == 1


def test_key_is_asked_for_and_kept_for_this_tab_alone(open_page):
    page = open_page(before="")
    page.wait("document.activeElement.id === 'key'")
    assert page.text("#model") == "the API key is missing or wrong"
    page.type(KEY)
    page.press("Tab")
    page.wait_for_model()
    page.fill("max_tokens", "3")
    page.say("Hello")
    page.wait_for_end()
    assert page.text(ANSWER)
    kept = page.see("[{...sessionStorage}, {...localStorage}, document.cookie, location.href]")
    assert kept == [{"nanovllm-key": KEY}, {}, "", f"{page.address}/"]


def test_last_message_can_be_changed_or_sent_again(open_page):
    page = open_page()
    page.fill("max_tokens", "4")
    for text in ("One", "Two"):
        page.say(text)
        page.wait_for_end()
    page.click(".actions button:first-child")
    assert page.is_shown("#editing")
    page.type(" and a half")
    page.press("Enter")
    page.wait_for_end()
    page.click(".actions button:last-child")
    page.wait_for_end()
    asked = [[m["content"] for m in b["messages"] if m["role"] == "user"] for b in page.bodies()]
    assert asked == [["One"], ["One", "Two"], *[["One", "Two and a half"]] * 2]
    assert page.see("document.querySelectorAll('.turn').length") == 2
    assert not page.is_shown("#editing")


def test_a_line_is_broken_by_shift_and_enter(open_page):
    page = open_page()
    page.fill("max_tokens", "1")
    page.see("document.getElementById('entry').focus()")
    low = page.see("document.getElementById('entry').offsetHeight")
    page.type("one")
    page.press("Enter", 8)
    page.type("two")
    assert page.see("document.getElementById('entry').value") == "one\ntwo"
    assert page.see("document.getElementById('entry').offsetHeight") > low + 10
    composed = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, cancelable: true})"
    assert page.see(f"document.getElementById('entry').dispatchEvent({composed})")
    page.press("Enter")
    page.wait_for_end()
    (body,) = page.bodies()
    assert body["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert page.see("document.getElementById('entry').offsetHeight") == low


CUTS = """
const bytes = encoder.encode(%s);
for (let at = 0; at < bytes.length; at += %d) sendBytes(bytes.slice(at, at + %d));
end();
"""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_answer_is_the_same_wherever_the_stream_is_cut(open_page, line_end, size):
    page = open_page(before=WITH_KEY + BY_HAND)
    page.say("Hello")
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "Hm… "}]
    deltas += [{"reasoning_content": "ä"}, {"content": "Žluťoučký"}, {"content": "\n\n𝄞 data: x"}]
    events = [json.dumps({"choices": [{"delta": d}]}, ensure_ascii=False) for d in deltas]
    lines = [": a comment", "event: message"]
    for event in events:
        lines += [f"data: {event}", ""]
    usage = [
        'data: {"choices": [],',
        'data: "usage": {"prompt_tokens": 9, "completion_tokens": 4}}',
    ]
    stream = line_end.join([*lines, *usage, "", "data:[DONE]", "", ""])
    page.see(CUTS % (json.dumps(stream), size, size))
    page.wait_for_end()
    assert page.text(ANSWER) == "Žluťoučký\n\n𝄞 data: x"
    assert page.see("document.querySelector('details .said').textContent") == "Hm… ä"
    assert page.text(".stats").startswith("4 tokens · ") and "prompt of 9" in page.text(".stats")
    assert page.text("[role=alert]") is None
    assert page.faults() == []


def test_thoughts_are_folded_until_they_are_wanted(open_page):
    page = open_page(before=WITH_KEY + BY_HAND)
    page.say("Hello")
    page.see("tell({ reasoning_content: 'Let me see.' })")
    page.wait("document.querySelector('details')?.innerText === 'Thinking'")
    page.see("tell({ content: 'Yes.' })")
    page.wait("document.querySelector('details').innerText === 'Thoughts'")
    assert not page.is_shown("details .said")
    page.click("summary")
    assert page.is_shown("details .said") and "Let me see." in page.text("details")
    page.see("send('data: [DONE]\\n\\n')")
    page.wait_for_end()
    page.say("Why?")
    said = [message["content"] for message in page.wait("window.asked")["messages"]]
    assert said == ["Hello", "Yes.", "Why?"]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ('data: {"error": {"message": "the engine has ended"}}\n\n', "the engine has ended"),
        ("", "The connection ended before the answer did."),
    ],
)
def test_an_answer_that_breaks_off_says_why_and_stays(open_page, last, told):
    page = open_page(before=WITH_KEY + BY_HAND)
    page.say("Hello")
    page.see(f"tell({{ content: 'Once upon' }}), send({json.dumps(last)}), end()")
    page.wait_for_end()
    assert page.text(ANSWER) == "Once upon" and page.text("[role=alert]") == told


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (
            "Promise.resolve(new Response('<b>Bad</b>', {status: 502, statusText: 'Bad Gateway'}))",
            "502 Bad Gateway: <b>Bad</b>",
        ),
        ("Promise.reject(new TypeError('no route'))", "The server can't be reached: no route"),
    ],
)
def test_whatever_a_server_replies_is_told(open_page, reply, told):
    page = open_page(before=f"window.fetch = () => {reply};")
    page.wait("document.getElementById('model').textContent")
    page.say("Hello")
    page.wait_for_end()
    assert page.text("[role=alert]") == page.text("#model") == told
    assert "left out" in page.text(".stats")


@pytest.mark.parametrize(("name", "value"), [("temperature", "1e"), ("seed", str(2**53 + 1))])
def test_what_is_no_number_to_a_browser_is_not_sent(open_page, name, value):
    page = open_page()
    page.fill(name, value)
    page.say("Hello")
    page.wait_for_end()
    assert page.text("[role=alert]") == f"{name} is not a number that can be sent"
    assert page.bodies() == []


def test_question_without_an_answer_is_left_out_of_what_follows(open_page):
    page = open_page()
    page.fill("temperature", "9")
    page.say("First")
    page.wait_for_end()
    page.fill("temperature", "")
    page.fill("max_tokens", "1")
    page.say("Second")
    page.wait_for_end()
    assert [len(body["messages"]) for body in page.bodies()] == [1, 1]
    assert page.bodies()[1]["messages"][0]["content"] == "Second"


def test_those_who_hear_the_page_are_told_when_an_answer_comes_and_has_come(open_page):
    page = open_page(before=WITH_KEY + BY_HAND)
    heard = "[document.getElementById('log').ariaBusy, document.getElementById('status').innerText]"
    assert page.see(heard) == ["false", ""]
    page.say("Hello")
    page.see("tell({ content: 'Yes.' })")
    assert page.see(heard) == ["true", "The model is answering."]
    page.see("send('data: [DONE]\\n\\n')")
    page.wait_for_end()
    assert page.see(heard) == ["false", "The answer has ended."]


def test_markup_in_what_is_said_is_text(open_page):
    page = open_page(before=WITH_KEY + BY_HAND)
    evil = "<img src=x onerror=\"document.title='lost'\"><script>document.title='lost'</script>&lt;"
    page.say(evil)
    page.see(f"tell({{ reasoning_content: {json.dumps(evil)} }})")
    page.see(f"tell({{ content: {json.dumps(evil)} }})")
    page.see(
        f"send('data: ' + JSON.stringify({{error: {{message: {json.dumps(evil)}}}}}) + '\\n\\n')"
    )
    page.wait_for_end()
    places = ".question .said", "details .said", ".answer > .said", "[role=alert]"
    for place in places:
        assert page.see(f"document.querySelector('{place}').textContent") == evil
    assert page.see("document.querySelectorAll('main img, main script').length") == 0
    assert page.see("document.title") == "nanovllm chat"
    assert page.faults() == []


def test_end_is_followed_only_from_the_end(open_page):
    page = open_page("phone", before=WITH_KEY + BY_HAND)
    page.say("Hello")
    more = "tell({ content: 'line\\n'.repeat(60) })"
    log = "document.getElementById('log')"
    left = f"({log}.scrollHeight - {log}.scrollTop - {log}.clientHeight)"
    page.see(more)
    page.wait(f"{log}.scrollTop > 300 && {left} < 2")
    page.see(f"{log}.scrollTop = 100")
    page.see(more)
    page.wait(f"{left} > 1600")
    assert page.see(f"{log}.scrollTop") == 100
    page.click("#latest")
    page.see(more)
    page.wait(f"{log}.scrollTop > 3000 && {left} < 2")
    assert not page.is_shown("#latest")


def test_end_stays_in_sight_where_the_room_gets_smaller_and_a_place_stays_a_place(open_page):
    page = open_page("phone", before=WITH_KEY + BY_HAND)
    width, height = SIZES["phone"]
    log = "document.getElementById('log')"
    left = f"({log}.scrollHeight - {log}.scrollTop - {log}.clientHeight)"
    page.say("Hello")
    page.see("tell({ content: 'line\\n'.repeat(60) })")
    page.wait(f"{log}.scrollTop > 300 && {left} < 2")
    for smaller in (200, 400, 0):  # a phone's keyboard, then a taller one, then none
        page.resize(width, height - smaller, mobile=True)
        page.wait(f"innerHeight === {height - smaller} && {left} < 2")
    page.see(f"{log}.scrollTop = 100")
    page.wait("document.getElementById('latest').checkVisibility()")
    page.resize(width, height - 200, mobile=True)
    page.wait(f"innerHeight === {height - 200}")
    assert (
        page.see(f"new Promise(done => requestAnimationFrame(() => done({log}.scrollTop)))") == 100
    )


def test_new_chat_forgets_an_answer_that_is_coming(open_page):
    page = open_page(before=WITH_KEY + BY_HAND)
    page.say("Hello")
    page.see("tell({ content: 'old' })")
    page.wait(f"document.querySelector('{ANSWER}')?.innerText === 'old'")
    page.click("#new")
    page.wait_for_end()
    assert page.is_shown("#welcome") and page.see("document.querySelector('.turn')") is None
    page.say("Hello again")
    page.see("tell({ content: 'new' })")
    page.wait(f"document.querySelector('{ANSWER}')?.innerText === 'new'")
    page.click("#stop")
    page.wait_for_end()
    assert page.text(ANSWER) == "new" and page.text(".stats").endswith("stopped")
    assert page.faults() == []


def test_theme_is_chosen_by_the_system_and_then_by_hand(open_page):
    page = open_page(theme="dark")
    behind = "getComputedStyle(document.body).backgroundColor"
    assert page.see(behind) == "rgb(24, 24, 22)"
    page.click("#theme")
    assert page.see(behind) == "rgb(250, 249, 246)"
    page.see("window.isOld = true")
    page.call("Page.reload")
    page.wait("!window.isOld && document.documentElement?.dataset.theme === 'light'")
    assert page.see(behind) == "rgb(250, 249, 246)"


@pytest.mark.parametrize("size", SIZES)
def test_every_control_is_reached_by_the_keyboard(open_page, size):
    page = open_page(size)
    if size == "phone":  # the settings hide the chat from the keyboard, too
        page.click("#open")
    shown = "[...document.querySelectorAll('input, textarea, button, #log')].filter((e) => "
    shown += "e.checkVisibility() && !e.closest('[inert]')).map((e) => e.id || e.innerText)"
    wanted, reached = set(page.see(shown)), set()
    for _ in range(len(wanted) + 3):
        page.press("Tab")
        focused = "(document.activeElement.id || document.activeElement.innerText)"
        reached.add(page.see(focused))
    assert wanted <= reached and {"new", "theme", "open", "temperature", "key"} <= wanted
    assert ("entry" in reached) == (size == "wide")
    if size == "phone":
        page.press("Escape")
        assert not page.is_shown("#settings")
        assert page.see("document.activeElement.id") == "open"
