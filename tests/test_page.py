"""The smoke page in a real browser: offline, accessible, readable on a phone, on paper and without JavaScript."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe

WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture
def open_page(smoke_page, browser):
    """Open the page with given context options; what it logs and asks for is kept on `.messages` and `.requested`."""
    contexts = []

    def open_it(**options):
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        contexts.append(context)
        page = context.new_page()
        page.messages, page.requested = [], []
        page.on("console", lambda message: page.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(smoke_page.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()


def prose(page) -> str:
    """The page's text without its code and program output."""
    return page.evaluate(
        "() => { const main = document.querySelector('main').cloneNode(true);"
        " main.querySelectorAll('pre, code').forEach(part => part.remove()); return main.textContent; }"
    )


def test_it_asks_for_nothing_and_logs_nothing(open_page, smoke_page):
    page = open_page()
    page.wait_for_load_state("networkidle")
    assert page.requested == [smoke_page.as_uri()]
    assert page.messages == []


def test_its_policy_forbids_network_access(open_page):
    blocked = open_page().evaluate(
        "() => new Promise(done => {"
        " document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));"
        " fetch('http://127.0.0.1:9/').catch(() => {}); })"
    )
    assert blocked == "connect-src"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(open_page, scheme, viewport):
    page = open_page(color_scheme=scheme, viewport=viewport)
    page.evaluate("document.querySelectorAll('main details').forEach(part => part.open = true)")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_ids_are_unique_and_every_anchor_resolves(open_page):
    page = open_page()
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(tag => tag.id)")
    assert len(ids) == len(set(ids))
    anchors = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(link => link.hash.slice(1))")
    assert anchors and set(anchors) <= set(ids)


def test_nothing_is_left_of_tex_and_no_cell_failed(open_page):
    text = prose(open_page())
    assert not re.search(r"\\[A-Za-z]+|\$\$", text)
    assert "Traceback (most recent call last)" not in text


def test_every_figure_is_numbered_described_and_drawn(open_page):
    page = open_page()
    figures = page.evaluate(
        "[...document.querySelectorAll('figure[id]')].map(figure => {"
        " const img = figure.querySelector('img') || { alt: 'a table', naturalWidth: 1 };"
        " return [figure.querySelector('figcaption').textContent, img.alt, img.naturalWidth]; })"
    )
    assert figures
    for caption, alt, width in figures:
        assert re.match(r"(Figure|Table)\u00a0\d+\. \S", caption) and alt.strip() and width > 0


def test_it_says_that_its_numbers_are_not_the_studys(open_page):
    assert open_page().get_by_text("This is the smoke profile").is_visible()


@pytest.mark.parametrize("width", [360, 768, 1120])
def test_only_boxes_scroll_sideways(open_page, width):
    page = open_page(viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('main details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_scrolls_sideways_can_be_reached_by_keyboard(open_page):
    page = open_page(viewport=PHONE)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    unreachable = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(tag => tag.checkVisibility() && tag.tabIndex < 0"
        " && ['auto', 'scroll'].includes(getComputedStyle(tag).overflowX) && tag.scrollWidth > tag.clientWidth).length"
    )
    assert unreachable == 0


def test_the_theme_switch_works_by_keyboard_and_is_remembered(open_page):
    page = open_page(color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("radio", name="Auto").focus()
    page.keyboard.press("ArrowLeft")  # wraps round to Dark
    assert page.get_by_role("radio", name="Dark").is_checked()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark and page.get_by_role("radio", name="Dark").is_checked()
    page.get_by_role("radio", name="Light").check(force=True)
    assert page.evaluate(paper) == light


def test_the_contents_follow_the_reader(open_page):
    page = open_page()
    links = page.locator("nav li a")
    for k in range(links.count()):
        target = links.nth(k).get_attribute("href")[1:]
        if target.startswith("nb-"):
            page.evaluate("id => document.getElementById(id).scrollIntoView()", target)
            page.wait_for_function("id => document.querySelector('nav a[aria-current]')?.hash === '#' + id", arg=target)


def test_the_skip_link_comes_first(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
    page.keyboard.press("Enter")
    page.wait_for_url("**#main")


def test_raw_results_can_be_saved(open_page, smoke_page):
    count = open_page().locator("#data a[download]").count()
    assert count > 0
    for k in range(count):
        page = open_page()  # anew each time: Chromium holds back a page's downloads after some in a row
        link = page.locator("#data a[download]").nth(k)
        with page.expect_download() as download:
            link.click()
        name = link.get_attribute("download")
        assert download.value.suggested_filename == name
        saved = download.value.path().read_bytes()
        assert saved == (smoke_page.parent / "results" / "smoke" / name).read_bytes()
        page.close()


def test_without_javascript_it_reads_the_same(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("nav li a").first.is_visible()
    assert page.locator("main h2").first.is_visible()
    page.get_by_role("radio", name="Dark").check(force=True)
    fold = page.locator("details.code").first
    fold.locator("summary").click()
    assert fold.locator("pre").is_visible()
    assert page.messages == []


def test_it_prints(open_page):
    page = open_page(color_scheme="dark", viewport={"width": 643, "height": 971})  # A4 within its margins of 2 cm
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.evaluate("[...document.querySelectorAll('nav, details.code')].every(tag => !tag.checkVisibility())")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure img, figure table, .equation math')].map(tag => {"
        " const box = tag.getBoundingClientRect(); return [tag.closest('[id]').id, box.left, box.right, box.height]; })"
    )
    assert boxes
    clipped = [name for name, left, right, height in boxes if left < -1 or right > 644 or height > 971]
    assert clipped == []
