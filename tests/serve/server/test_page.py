"""The built-in page, in a headless Chromium (``pytest -m browser``), and what can be said of it without one."""

import contextlib
import dataclasses
import json
import re
import time

import api_server
import browser
import fake_tuning
import httpx
import pytest

from serve.jobs import JobSpec
from serve.server import page as page_module
from serve.server.auth import Keys
from serve.server.tuning import Tuning
from serve.store.uploads import Uploads

in_browser = pytest.mark.browser

HOSTILE_NAME = '"><img src=x onerror="window.owned=1"><script>window.owned=2</script>' + "x" * 100
HOSTILE_TEXT = "<img src=x onerror='window.owned=3'><script>window.owned=4</script>" + "y" * 400
HOSTILE_QUESTION = "<img src=x onerror='window.owned=5'>"
WAIT = 30_000
"""Milliseconds that something may take before the test gives up; nothing is timed."""


class Mouth:
    """Stands before an engine's steps and lets the model say what a test wants, if it wants something."""

    def __init__(self, engine):
        self.text = None
        self._step = engine.step
        engine.step = self.step

    def step(self):
        outputs = self._step()
        if self.text is None:
            return outputs
        return [dataclasses.replace(output, text=self.text) if output.token_ids else output for output in outputs]


@contextlib.contextmanager
def ready_server(model, root, keys, **options):
    names = {"ann": 0, "bob": 1}
    for name, seed in names.items():
        api_server.adapter_directory(root, name, model, seed)
    serving = api_server.make_serving(model, root, **options)
    serving.keys = keys
    serving.mouth = Mouth(serving.engine.engine)
    for name in names:
        serving.adapters.register(name, str(root / name))
    serving.adapters.register(HOSTILE_NAME, str(root / "bob"))
    with api_server.running(serving) as url:
        with httpx.Client(base_url=url, trust_env=False) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
        yield url, serving


@pytest.fixture(scope="module")
def chromium():
    try:
        with browser.chromium() as found:
            yield found
    except browser.NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def open_server(chromium, lively, tmp_path_factory):
    with ready_server(lively, tmp_path_factory.mktemp("open"), Keys({})) as (url, serving):
        yield url, serving


@pytest.fixture(scope="module")
def closed_server(chromium, lively, tmp_path_factory):
    keys = Keys(api_server.USERS, api_server.ADMIN)
    with ready_server(lively, tmp_path_factory.mktemp("closed"), keys) as (url, _):
        yield url


@pytest.fixture
def tab(chromium):
    """Return a fresh tab that notes what it is asked for and what it complains of."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    found = context.new_page()
    found.set_default_timeout(WAIT)
    found.requests, found.complaints = [], []
    found.on("request", lambda request: found.requests.append(request.url))
    found.on("console", lambda line: found.complaints.append(line.text) if line.type != "debug" else None)
    found.on("pageerror", lambda error: found.complaints.append(str(error)))
    yield found
    context.close()


def expect(locator):
    from playwright.sync_api import expect as playwright_expect

    playwright_expect.set_options(timeout=WAIT)
    return playwright_expect(locator)


def load(tab, url):
    tab.goto(url)
    expect(tab.locator("#state")).to_have_text("Ready")
    expect(tab.locator("#right option")).to_have_count(5)


def ask(tab, text, max_tokens=8):
    """Send a message; returns the two answers' texts when both are complete."""
    tab.get_by_label("At most").fill(str(max_tokens))
    tab.get_by_label("Message to both models").fill(text)
    tab.get_by_label("Message to both models").press("Enter")
    for side in ("left", "right"):
        expect(tab.locator(f"#{side}-talk .turn").last.locator(".note")).to_contain_text("token")
    return [tab.locator(f"#{side}-talk .answer").last.text_content() for side in ("left", "right")]


def api_answer(url, model, messages, max_tokens=8):
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def stats(url):
    return httpx.get(f"{url}/stats", trust_env=False).json()


@in_browser
def test_it_loads_without_complaints_and_asks_nobody_else(open_server, tab):
    url, _ = open_server
    load(tab, url)
    ask(tab, "Hi")
    assert tab.complaints == []
    assert {re.sub(r"^data:.*", "data:", request).replace(url, "") for request in tab.requests} <= {
        "/", "data:", "/stats", "/v1/models", "/v1/chat/completions",
    }  # fmt: skip


@in_browser
def test_the_figures_are_the_servers_and_move(open_server, tab):
    url, _ = open_server
    load(tab, url)
    for text in ("One", "Two"):
        before = stats(url)["generated_tokens"]
        ask(tab, text)
        now = stats(url)
        assert now["generated_tokens"] > before
        expect(tab.locator("#tokens")).to_have_text(f"{now['generated_tokens']:,}")
        expect(tab.locator("#finished")).to_have_text(f"{now['finished']:,}")
    tiers = now["adapters"]
    expect(tab.locator("#device")).to_have_text(str(tiers["device_adapters"]))
    expect(tab.locator("#host")).to_have_text(str(tiers["host_adapters"]))
    expect(tab.locator("#disk")).to_have_text("3")
    part = tiers["device_pages_used"] / tiers["device_pages"]
    assert part > 0
    expect(tab.get_by_role("meter", name="rank pages in use")).to_have_attribute("aria-valuenow", f"{part:.4f}")
    expect(tab.locator("#rate-peak")).not_to_have_text("0")
    expect(tab.locator("#rate-chart .line")).to_have_attribute("d", re.compile(r"M.+L.+"))


@in_browser
def test_two_adapters_answer_side_by_side_as_the_api_does(open_server, tab):
    url, _ = open_server
    load(tab, url)
    assert tab.locator("#left").input_value() == "tiny"
    tab.get_by_role("combobox", name="Left model").select_option("ann")
    tab.get_by_role("combobox", name="Right model").select_option("bob")
    chats = {"ann": [], "bob": []}
    for text in ("Hello?", "And?"):
        found = ask(tab, text)
        for answer, (name, chat) in zip(found, chats.items(), strict=True):
            chat.append({"role": "user", "content": text})
            assert answer == api_answer(url, name, chat), name
            chat.append({"role": "assistant", "content": answer})
        assert found[0] != found[1]


@in_browser
def test_answers_are_streamed_and_can_be_stopped(open_server, tab):
    url, serving = open_server
    load(tab, url)
    gate = api_server.Gate(serving.engine.engine)
    try:
        gate.shut()
        tab.get_by_label("At most").fill("60")
        tab.get_by_label("Message to both models").fill("Go")
        tab.get_by_label("Message to both models").press("Enter")
        answers = [tab.locator(f"#{side}-talk .answer") for side in ("left", "right")]
        for _ in range(200):
            gate.let()
            tab.wait_for_timeout(20)
            if all(answer.text_content() for answer in answers):
                break
        assert all(answer.text_content() for answer in answers)
        assert tab.locator(".turn.busy").count() == 2
        tab.get_by_role("button", name="Stop").click()
        for side in ("left", "right"):
            expect(tab.locator(f"#{side}-talk .note")).to_have_text("stopped")
        expect(tab.get_by_role("button", name="Send")).to_be_visible()
    finally:
        gate.open()


@in_browser
def test_a_key_is_asked_for_and_kept_in_the_tab_only(closed_server, tab):
    tab.goto(closed_server)
    expect(tab.locator("#key-why")).to_have_text("This server needs an API key.")
    expect(tab.get_by_label("API key", exact=True).and_(tab.locator("input"))).to_be_focused()
    tab.keyboard.type("some-wrong-key")
    tab.keyboard.press("Enter")
    expect(tab.locator("#key-why")).to_have_text("The server does not know this API key.")
    tab.locator("#key").fill(api_server.BOB)
    tab.locator("#key").press("Enter")
    expect(tab.locator("#state")).to_have_text("Ready")
    expect(tab.locator("#figures")).to_be_hidden()
    expect(tab.locator("#key-form")).to_be_hidden()
    expect(tab.locator("#right option")).to_have_count(5)
    assert all(ask(tab, "Hi"))
    kept = tab.evaluate("[JSON.stringify(localStorage), document.cookie, location.href, document.body.outerHTML]")
    assert not any(api_server.BOB in place for place in kept)
    tab.reload()
    expect(tab.locator("#state")).to_have_text("Ready")
    tab.get_by_role("button", name="API key").click()
    tab.get_by_role("button", name="Forget").click()
    expect(tab.locator("#key-why")).to_have_text("This server needs an API key.")
    assert tab.evaluate("sessionStorage.length") == 0


@in_browser
def test_names_and_answers_are_text_and_never_html(open_server, tab):
    url, serving = open_server
    load(tab, url)
    tab.get_by_role("combobox", name="Left model").select_option(HOSTILE_NAME)
    serving.mouth.text = HOSTILE_TEXT
    try:
        left, _ = ask(tab, HOSTILE_QUESTION, 2)
    finally:
        serving.mouth.text = None
    assert left.startswith(HOSTILE_TEXT)
    assert tab.locator("#left-talk .said").text_content() == HOSTILE_QUESTION
    assert tab.locator("#left option:checked").text_content() == HOSTILE_NAME
    assert tab.locator("main img, main script").count() == 0
    assert tab.evaluate("window.owned") is None
    assert tab.complaints == []


@in_browser
def test_the_policy_stops_html_and_script_that_get_in_all_the_same(open_server, tab):
    load(tab, open_server[0])
    for attempt in ("document.body.innerHTML = '<p>'", "document.body.setAttribute('onclick', 'window.owned = 1')"):
        assert tab.evaluate(f"() => {{ try {{ {attempt}; }} catch (error) {{ return error.name; }} }}") == "TypeError"
    assert tab.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)") == "TypeError"
    assert tab.evaluate("window.owned") is None
    assert any("Content Security Policy" in line and "127.0.0.1:9" in line for line in tab.complaints)


@in_browser
@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_is_wider_than_the_window(open_server, tab, width):
    url, serving = open_server
    tab.set_viewport_size({"width": width, "height": 844})
    load(tab, url)
    tab.get_by_role("combobox", name="Left model").select_option(HOSTILE_NAME)
    serving.mouth.text = HOSTILE_TEXT
    try:
        ask(tab, HOSTILE_QUESTION, 2)
    finally:
        serving.mouth.text = None
    tab.get_by_role("button", name="API key").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    scrolling = "[...document.querySelectorAll('.talk')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert tab.evaluate(scrolling) == 0
    wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
    assert tab.evaluate(f"{wide}.map((e) => e.id || e.className || e.tagName)") == []


@in_browser
def test_everything_can_be_reached_by_keyboard_and_has_a_name(open_server, tab):
    load(tab, open_server[0])
    tab.locator("body").click(position={"x": 1, "y": 1})
    reached = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id"))
    controls = [
        "key-open",
        "left",
        "left-talk",
        "right",
        "right-talk",
        "text",
        "send",
        "max-tokens",
        "temperature",
        "clear",
    ]
    assert [name for name in reached if name in controls][: len(controls)] == controls
    nameless = """() => [
        ...document.querySelectorAll("button, input, select, textarea, [role=meter], svg, section")
    ].filter(
        (e) => !(e.labels && e.labels.length) && !e.ariaLabel && !(e.tagName === "BUTTON" && e.textContent.trim())
    ).map((e) => e.id || e.tagName)"""
    assert tab.evaluate(nameless) == []


@in_browser
def test_a_server_that_goes_away_is_seen_and_comes_back(open_server, tab):
    load(tab, open_server[0])
    tab.context.set_offline(True)
    expect(tab.locator("#state")).to_have_text("Unreachable")
    expect(tab.get_by_role("alert")).to_contain_text("The server does not answer.")
    tab.get_by_label("Message to both models").fill("Anyone?")
    tab.get_by_label("Message to both models").press("Enter")
    expect(tab.locator("#left-talk .problem")).to_contain_text("The server does not answer.")
    tab.context.set_offline(False)
    expect(tab.locator("#state")).to_have_text("Ready")
    expect(tab.locator("#alert")).to_be_hidden()
    tab.get_by_label("At most").fill("8")
    tab.locator("#left-talk").get_by_role("button", name="Try again").click()
    expect(tab.locator("#left-talk .note")).to_contain_text("token")
    assert tab.locator("#left-talk .problem").count() == 0


@in_browser
@pytest.mark.parametrize(
    ("status", "headers", "code", "told"),
    [
        (429, {"Retry-After": "3"}, "overloaded", "The server is busy; it asks to wait 3 seconds."),
        (400, {}, "context_length_exceeded", "<b>told</b>"),
        (401, {}, "invalid_api_key", "The server wants an API key."),
        (502, {}, None, "The server answered with status 502."),
    ],
)
def test_refusals_are_told_on_their_side(open_server, tab, status, headers, code, told):
    load(tab, open_server[0])
    error = {"message": "<b>told</b>", "type": "some_error", "param": None, "code": code}
    body = json.dumps({"error": error}) if code else "<html>gateway</html>"
    tab.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, body=body))
    tab.get_by_label("Message to both models").fill("Hi")
    tab.get_by_label("Message to both models").press("Enter")
    for side in ("left", "right"):
        expect(tab.locator(f"#{side}-talk .problem span")).to_have_text(told)
    expect(tab.get_by_role("button", name="Send")).to_be_visible()
    if status == 401:
        expect(tab.locator("#key-form")).to_be_visible()


@in_browser
@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([{"choices": [{"delta": {"content": "par"}}]}], "The connection broke before the answer was complete."),
        ([{"error": {"message": "it failed", "code": "generation_failed"}}, "[DONE]"], "it failed"),
        ([{"choices": [{"delta": {}, "finish_reason": "abort"}]}, "[DONE]"], "The server gave this answer up."),
        (["{"], "The server's answer cannot be read."),
    ],
)
def test_broken_streams_are_told(open_server, tab, events, told):
    load(tab, open_server[0])
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f"data: {line}\n\n" for line in lines)
    tab.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    tab.get_by_label("Message to both models").fill("Hi")
    tab.get_by_label("Message to both models").press("Enter")
    expect(tab.locator("#left-talk .problem span")).to_have_text(told)


@in_browser
def test_a_server_without_adapters_says_so(open_server, tab):
    base = {"data": [{"id": "tiny", "parent": None}]}
    tab.route("**/v1/models", lambda route: route.fulfill(json=base))
    tab.goto(open_server[0])
    expect(tab.locator("#right-talk .empty")).to_contain_text("There are no adapters yet")
    expect(tab.locator("#right")).to_have_value("tiny")


def test_the_page_is_one_small_answer_that_only_its_own_style_and_script_fit():
    content, headers = page_module.make_page()
    text = content.decode()
    assert len(content) < 40_000
    assert text.count("<script>") == text.count("<style>") == 1
    assert not re.search(r"""(src|href)=["'](?!data:)|\son\w+=|style=|javascript:""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage|cookie", text)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert policy["script-src"].startswith("'sha256-")
    tuned, same = page_module.make_page(fine_tuning=True)
    assert tuned.replace(b" data-fine-tuning", b"") == content
    assert same == headers


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("index.html", "page.js", "other.js"), ("page.js", '"use strict"', '"</script>"'), ("page.css", "}", "</style>}")],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, name, old, new):
    for path in page_module.STATIC.iterdir():
        (tmp_path / path.name).write_text(
            path.read_text().replace(old, new, 1) if path.name == name else path.read_text()
        )
    with pytest.raises(ValueError, match="must hold"):
        page_module.make_page(tmp_path)


@pytest.fixture(scope="module")
def tuning_server(chromium, lively, tmp_path_factory):
    """Return a server with fine-tuning whose jobs a test moves on."""
    root = tmp_path_factory.mktemp("tuning")
    jobs = fake_tuning.FakeFineTuning()
    tuning = Tuning(jobs=jobs, uploads=Uploads(root / "files"))
    with ready_server(lively, root, Keys({}), tuning=tuning) as (url, _):
        yield url, jobs


def begin_job(jobs, tmp_path, suffix, steps):
    (tmp_path / "rows").write_text("{}")
    spec = JobSpec(training_file="file-1", training_path=tmp_path / "rows", suffix=suffix)
    job = jobs.create(spec, owner=None).id
    jobs.begin(job, steps=steps)
    return job


@in_browser
def test_jobs_are_shown_with_their_progress_and_losses(tuning_server, tab, tmp_path):
    url, jobs = tuning_server
    jobs.clear()
    load(tab, url)
    expect(tab.locator("#jobs")).to_be_hidden()
    job = begin_job(jobs, tmp_path, "lamps", 4)
    row = tab.locator(".job")
    expect(row.locator(".name")).to_have_text("lamps")
    expect(row.locator(".pill")).to_have_text("running")
    for step, loss in enumerate((4.0, 2.0), 1):
        jobs.learn(job, loss)
        expect(row.locator(".note")).to_have_text(f"update {step} of 4, loss {loss:.2f}")
    expect(row.locator(".bar")).to_have_attribute("aria-valuenow", "0.5000")
    expect(row.locator(".chart")).to_have_attribute("aria-label", "training loss from 4.00 to 2.00")
    expect(row.locator(".chart path")).to_have_attribute("d", "M30.00 2.00L60.00 20.50")
    expect(row.get_by_role("link")).to_be_hidden()
    other = begin_job(jobs, tmp_path, "second", 4)
    jobs._set(other, status="failed", error={"message": HOSTILE_TEXT}, finished_at=1)
    expect(row.nth(0).locator(".note")).to_have_text(HOSTILE_TEXT)
    expect(row.nth(1).locator(".name")).to_have_text("lamps")
    assert tab.evaluate("window.owned") is None
    assert tab.complaints == []


@in_browser
def test_a_finished_job_leads_to_a_chat_with_its_adapter(tuning_server, tab, tmp_path):
    url, jobs = tuning_server
    jobs.clear()
    job = begin_job(jobs, tmp_path, None, 1)
    load(tab, url)
    jobs.finish(job, "bob")
    expect(tab.locator(".job .name")).to_have_text("bob")
    tab.get_by_role("link", name="Chat with it").click()
    expect(tab.locator("#right")).to_have_value("bob")
    assert tab.evaluate("document.activeElement.id") == "text"
    _, answer = ask(tab, "Hi")
    assert answer == api_answer(url, "bob", [{"role": "user", "content": "Hi"}])


@in_browser
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_jobs_are_not_wider_than_the_window(tuning_server, tab, tmp_path, width):
    url, jobs = tuning_server
    jobs.clear()
    for suffix in ("a" * 64, "b"):
        job = begin_job(jobs, tmp_path, suffix, 1)
        jobs.learn(job, 1.0)
        jobs.finish(job, "c" * 120)
    tab.set_viewport_size({"width": width, "height": 844})
    load(tab, url)
    expect(tab.locator(".job")).to_have_count(2)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
