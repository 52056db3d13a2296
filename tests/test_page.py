"""The page at / as its readers see it: headless Chromium against a real server.

A machine without Chromium skips what needs it (apt install chromium chromium-driver); on one that
has it, a missing driver is a failure.
"""

import base64
import hashlib
import json
import re
import shutil
import signal
import time

import pytest

pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from helpers import TINY  # noqa: E402
from test_server import WINDOW, Server, said, user  # noqa: E402
from tool_forms import HERMES, WEATHER  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browsers = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium "
                              "chromium-driver")
pytestmark = pytest.mark.slow  # they start processes
LIMIT = 300  # tokens of an answer; the embedded model hardly ever ends one itself


class Page:
    """One tab, and what a reader does in it."""

    def __init__(self):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                         "--disable-gpu", "--window-size=1100,800"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = shutil.which("chromedriver")
        assert driver, "Chromium is here and its driver is not: apt install chromium-driver"
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def open(self, server, temperature="0"):
        """A new tab, which has nothing stored."""
        self.driver.switch_to.new_window("tab")
        self.driver.get(f"http://127.0.0.1:{server.port}/")
        self.until(lambda: self.text("model") or self.text("error"))
        self.set("temperature", temperature)
        return self

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def at(self, name):
        return self.driver.find_element(By.ID, name)

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def set(self, name, value):
        if not self.at("settings").is_displayed():
            self.at("set").click()
        self.at(name).clear()
        self.at(name).send_keys(value, Keys.TAB)

    def turns(self):
        return self.run("return [...document.querySelectorAll('article p')]"
                        ".map(turn => turn.textContent)")

    def until(self, holds, seconds=60):
        deadline = time.time() + seconds
        while not (found := holds()):
            assert time.time() < deadline, (self.turns(), self.text("status"), self.text("error"))
            time.sleep(0.05)  # to ask takes Chromium and its driver more time than the page takes
        return found

    def send(self, text):
        self.at("input").send_keys(text, Keys.ENTER)

    def ready(self):
        self.until(lambda: self.text("send") == "Send")

    def say(self, text):
        """Send, and wait for the answer: what was said, and what was answered."""
        self.send(text)
        self.ready()
        return self.turns()[-2:]

    def complaints(self):
        """What the console says since it was last asked: failed scripts, what broke the policy."""
        return [line["message"] for line in self.driver.get_log("browser")
                if line["level"] in ("WARNING", "SEVERE")]


@pytest.fixture(scope="module")
def server():
    server = Server("--max-new-tokens", LIMIT)
    yield server
    assert server.end() == 0
    assert not [line for line in server.said if "Traceback" in line or "failed" in line]


@pytest.fixture(scope="module")
def browser():
    page = Page()
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser, server):
    yield browser.open(server)
    assert browser.complaints() == []


@browsers
def test_an_answer_streams_and_is_what_the_api_says(page, server):
    page.run("""window.seen = []
        new MutationObserver(() => seen.push(document.querySelectorAll('article p')[1].textContent))
            .observe(document.getElementById('log'),
                     {childList: true, characterData: true, subtree: true})""")
    assert page.say("Who is the cat?") == ["Who is the cat?", said(whole := server.chat(
        "Who is the cat?", max_tokens=LIMIT))]
    seen = page.run("return seen")
    assert len(set(seen)) > LIMIT / 4
    assert all(after.startswith(before) for before, after in zip(seen, seen[1:]))
    assert re.fullmatch(r"[\d.]+ tok/s · first after [\d.]+ s · cut at the server's limit · "
                        rf"{WINDOW + 4} of {whole.usage.total_tokens} tokens are in the window",
                        page.text("status"))
    assert page.text("error") == ""


@browsers
def test_a_stopped_answer_stays_and_the_talk_goes_on_from_it(page, server):
    for stop in (lambda: page.at("send").click(),
                 lambda: page.at("input").send_keys(Keys.ESCAPE)):
        page.send("Tell me a story.")
        page.until(lambda: len(page.turns()) % 2 == 0 and len(page.turns()[-1]) > 20)
        assert page.text("send") == "Stop"
        stop()
        page.ready()
        server.until("rows_busy", 0)
        assert "stopped" in page.text("status") and page.text("error") == ""
    stopped = page.turns()
    assert len(stopped) == 4
    whole = said(server.chat("Tell me a story.", max_tokens=LIMIT))
    assert 20 < len(stopped[1]) < len(whole) and whole.startswith(stopped[1])
    assert page.say("And then?") == ["And then?", said(server.chat(
        user(*stopped, "And then?"), max_tokens=LIMIT))]
    assert page.turns()[:4] == stopped


@browsers
def test_a_reload_finds_the_talk_and_goes_on(page, server):
    page.set("system", "Be kind.")
    talk = page.say("Who is the cat?")
    page.send("Tell me a story.")
    page.until(lambda: len(page.turns()) == 4 and page.turns()[3])
    page.driver.refresh()  # in the middle of an answer
    page.until(lambda: page.text("model"))
    found = page.turns()
    assert found[:3] == [*talk, "Tell me a story."] and found[3]
    assert "more than" in page.text("status")
    assert page.say("And then?")[1] == said(server.chat(
        [{"role": "system", "content": "Be kind."}, *user(*found, "And then?")],
        max_tokens=LIMIT))
    page.at("new").click()
    page.until(lambda: page.turns() == [])
    page.driver.refresh()
    page.until(lambda: page.text("model"))
    assert page.turns() == [] and page.at("system").get_attribute("value") == "Be kind."


@browsers
def test_what_is_said_is_shown_as_characters(page):
    html = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> &amp;"
    assert page.say(html)[0] == html
    page.driver.refresh()
    page.until(lambda: page.text("model"))
    assert page.turns()[0] == html
    assert page.driver.title == "gpt-stream"
    assert page.run("return document.querySelectorAll('article :not(p), img').length") == 0


@browsers
def test_the_policy_holds_where_a_script_comes_in(page):
    page.run("""
        try { document.body.innerHTML = '<img src=x onerror="document.title=1">' } catch {}
        const style = document.createElement('style')
        style.append('body { width: 1px }')
        document.head.append(style)
        return fetch('http://127.0.0.2:1/').catch(() => null)""")
    assert page.driver.title == "gpt-stream" and page.at("input").size["width"] > 100
    complaints = page.complaints()
    assert [any(directive in line for line in complaints) for directive in (
        "TrustedHTML", "inline style", "Security Policy")] == [True] * 3, complaints


@browsers
def test_keys_and_labels(page):
    page.at("input").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    page.until(lambda: len(page.turns()) == 2)
    assert page.turns()[0] == "one\ntwo"
    page.at("new").click()  # while it answers
    page.until(lambda: page.turns() == [])
    page.at("input").clear()
    page.send("  ")
    assert page.turns() == []
    assert page.run("""return [...document.querySelectorAll('input, textarea, button')].filter(it =>
        !(it.labels?.[0] ?? it).textContent.trim() && !it.ariaLabel).map(it => it.id)""") == []


@browsers
def test_turns_outside_the_window_are_marked(page, server):
    page.say("Who is the cat?")
    page.say("Tell me a story.")
    marked = page.run("return [...document.querySelectorAll('article')].map(turn =>"
                      " turn.classList.contains('out'))")
    assert marked == [True, True, False, False]  # an answer is longer than the window


@browsers
def test_calls_are_shown_as_json_and_the_next_message_is_the_result(browser, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(HERMES)
    server = Server("--checkpoint", folder)
    try:
        page = browser.open(server, temperature="1")
        page.set("tools", "[{")
        page.send("Is it warm?")
        page.until(lambda: page.text("error"))
        assert "not JSON" in page.text("error") and page.turns() == []
        page.set("tools", json.dumps([WEATHER]))
        # The embedded model would call nothing by itself.
        page.run("""const ask = fetch
            window.sent = []
            window.fetch = (path, options) => {
              const body = JSON.parse(options.body)
              sent.push(body.messages)
              return ask(path, {...options, body: JSON.stringify(
                {...body, tool_choice: "required", parallel_tool_calls: false})})
            }""")
        called = page.say("")[1]
        name, _, arguments = called.removesuffix(")").partition("(")
        assert name == "get_weather" and set(json.loads(arguments)) == {"city", "days"}
        assert "\n  " in arguments
        assert page.at("input").get_attribute("placeholder") == "What get_weather returns"
        assert page.say("It is <warm>.")[0] == "It is <warm>."
        asked, answer, result = page.run("return sent.at(-1)")
        assert result == {"role": "tool", "content": "It is <warm>.",
                          "tool_call_id": answer["tool_calls"][0]["id"]}
        assert json.loads(answer["tool_calls"][0]["function"]["arguments"]) == json.loads(arguments)
        page.driver.refresh()
        page.until(lambda: page.text("model"))
        assert page.turns()[:2] == [asked["content"], called]
        assert page.at("input").get_attribute("placeholder") == "What get_weather returns"
        assert browser.complaints() == []
    finally:
        assert server.end() == 0


@browsers
def test_errors_are_one_line_and_lose_nothing(page, server, browser):
    page.set("temperature", "3")
    page.send("Hello?")
    page.until(lambda: page.text("error"))
    assert "temperature" in page.text("error") and "\n" not in page.text("error")
    assert page.turns() == [] and page.at("input").get_attribute("value") == "Hello?"
    assert any("400" in line for line in page.complaints())  # the browser's own line
    page.set("temperature", "0")
    assert page.text("send") == "Send" and page.say("")[0] == "Hello?"
    assert page.text("error") == ""


@browsers
def test_a_message_that_was_not_answered_yet_comes_back(page, server):
    server.process.send_signal(signal.SIGSTOP)
    try:
        page.send("Are you there?")
        page.until(lambda: len(page.turns()) == 2)
        page.at("input").send_keys(Keys.ESCAPE)
        page.ready()
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert page.turns() == [] and page.at("input").get_attribute("value") == "Are you there?"
    assert page.at("empty").is_displayed() and page.say("")[0] == "Are you there?"


@browsers
def test_on_a_phone_nothing_is_cut_off(page):
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 320, "height": 568, "deviceScaleFactor": 2, "mobile": True})
    page.say("word" * 60)
    assert page.run("return document.documentElement.scrollWidth") == 320
    for name in ("set", "new", "input", "send", "status"):
        box = page.at(name).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 320
        assert box["y"] >= 0 and box["y"] + box["height"] <= 568


@browsers
def test_the_key_is_asked_for_and_kept(browser, server, tmp_path):
    page = browser.open(server)
    page.at("set").click()
    assert not page.at("key").is_displayed()  # this server asks for none
    keys = tmp_path / "keys"
    keys.write_text("a secret key\n")
    locked = Server("--api-key-file", keys, "--max-new-tokens", 20)
    try:
        page.open(locked)
        assert page.at("key").is_displayed() and "API key" in page.text("error")
        page.set("key", "schlüssel")
        page.until(lambda: "ASCII" in page.text("error"))
        page.set("key", "another")
        page.until(lambda: "No valid API key" in page.text("error"))
        page.set("key", "a secret key")
        page.until(lambda: page.text("model") == "tiny" and not page.text("error"))
        answer = page.say("Who?")[1]
        assert answer == said(locked.chat("Who?", locked.client("a secret key")))
        page.driver.refresh()
        page.until(lambda: page.text("model") == "tiny")
        assert page.turns() == ["Who?", answer]
    finally:
        assert locked.end() == 0
    page.say("Are you there?")
    assert page.text("error") == "The server cannot be reached."
    assert page.at("input").get_attribute("value") == "Are you there?"


def test_the_headers_name_the_pages_own_script_and_style_and_nothing_else(server):
    status, headers, body = server.http("GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in
                  headers["Content-Security-Policy"].split(";"))
    for tag in ("script", "style"):
        text = re.search(f"<{tag}.*?>(.*?)</{tag}>", body.decode(), re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[name] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not re.findall(rb"https?://(?!www\.w3\.org/2000/svg)|@import|innerHTML|<link rel=\"sty",
                          body)
    assert server.http("HEAD", "/")[2] == b""
    assert server.http("GET", "/", headers={"Host": "evil.example"})[0] == 421
