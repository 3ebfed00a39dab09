"""The page of `serve` in a real Chromium, without a screen: what a person does with it.

Chromium is the system's (`apt-get install chromium`), or else playwright's own (`playwright install chromium`). Without
either the tests fail and say so.
"""

import shutil

import pytest
from playwright import sync_api
from playwright.sync_api import expect

from tests.serving_process import encoded, serving, stop, tiny_run

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"width": 360, "height": 740}
expect.set_options(timeout=60_000)  # ms: the machine may be busy

# Every state that the page was in since the last search: what the thought said, and whether hits were shown beside it.
WATCH = """
window.states = [];
new MutationObserver(() => {
  const found = document.getElementById("found");
  states.push([document.getElementById("thought").textContent, !found.hidden && !found.classList.contains("stale")]);
}).observe(document.querySelector("main"), { childList: true, subtree: true, attributes: true, characterData: true });
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its thoughts are long enough to be seen growing."""
    run = tiny_run(tmp_path_factory.mktemp("page"), data__max_thought_tokens=40)
    encoded(run)
    return run


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as e:
            pytest.fail(f"no Chromium: apt-get install chromium, or playwright install chromium ({e.message})")
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that fails its test by an error in its script, or when it asks anybody but the server."""
    page = browser.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("http://127.0.0.1", "data:")) else None)
    yield page
    page.close()
    assert wrong == []


def search(page, query):
    """Types a query, as a person would, and waits for its hits."""
    page.keyboard.press("Escape")  # to the field, its text selected
    page.keyboard.type(query)
    page.evaluate(WATCH)
    page.keyboard.press("Enter")
    expect(page.locator("#cost")).to_contain_text("ms to search")


def test_a_thought_is_seen_growing_then_the_hits_then_without(page, run):
    with serving(run, run.parent / "vectors") as (address, process):
        page.goto(address)
        expect(page.locator("#name")).to_have_text("run")
        search(page, "list files")
        expect(page.locator("#hits li")).to_have_count(10)
        before = [thought for thought, shown in page.evaluate("states") if thought and not shown]
        pieces = list(dict.fromkeys(before))
        assert len(pieces) > 3 and all(new.startswith(old) for old, new in zip(pieces, pieces[1:], strict=False))
        expect(page.locator("#thought")).to_have_text(page.evaluate("states.at(-1)[0]"))
        expect(page.locator("#cost")).to_contain_text("ms each")

        # The keyboard walks through the hits.
        page.keyboard.press("ArrowDown")
        expect(page.locator("#hits li").first).to_be_focused()

        # Without reasoning: asked again at once, no thought is shown.
        page.keyboard.press("Alt+r")
        expect(page.locator("#reasoning")).not_to_be_checked()
        expect(page.locator("#thinking")).to_be_hidden()
        expect(page.locator("#cost")).to_contain_text("ms to search")
        expect(page.locator("#cost")).not_to_contain_text("ms each")
        expect(page.locator("#hits li")).to_have_count(10)

        # On a phone nothing is cut off at the side.
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

        assert stop(process) == ""
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
        expect(page.locator("#found")).to_have_class("stale")


def test_a_key_is_asked_for(page, run, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with serving(run, run.parent / "vectors", f"--api-key-file={tmp_path / 'key'}") as (address, _):
        page.goto(address)
        expect(page.get_by_role("alert")).to_contain_text("The API key is missing or wrong")
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_be_hidden()
        search(page, "list files")
        expect(page.locator("#hits li")).to_have_count(10)
