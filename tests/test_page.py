"""report/page.py: toy notebooks rendered, then (slow) the smoke page in Chromium, offline, on a phone and on paper."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote_to_bytes

import findings
import manifest
import nbformat
import page as report
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import FIGURE, ROOT, code, write_notebook

SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
CFF = """{title: A & B, authors: [{given-names: Ada, family-names: Lovelace}, {name: The <team>}],
version: 0.1.0, date-released: 2026-11-24, license: MIT}"""


@pytest.fixture
def render(built, tmp_path):
    """Render an executed notebook of the given cells; the page's HTML."""
    made = manifest.read(built / "report/results/toy")

    def render(*cells, data=(), said="", profile="toy") -> str:
        executed = {"01_one": write_notebook(tmp_path / "01_one.ipynb", "# One", *cells)}
        return report.render(executed, made | {"profile": profile}, list(data), said)

    return render


@pytest.fixture(scope="module")
def soup(built):
    return BeautifulSoup((built / "report/sgsc-toy.html").read_text(encoding="utf-8"), "html.parser")


def test_figures_tables_and_equations_are_numbered_in_page_order_and_linked(soup):
    texts = [a.get_text().replace("\u00a0", " ") for a in soup.select("#\\30 1_first-1 p a")]
    assert texts == ["Figure 1", "Table 1", "Equation 1.1", "Figure 2", "the second"]
    captions = [caption.get_text().replace("\u00a0", " ") for caption in soup.find_all("figcaption")]
    assert captions == ["Figure 1. One.", "Table 1. Two.", "Figure 2. One."]
    assert soup.find(id="eq-1.1").get_text().endswith("(1.1)")
    ids = {tag["id"] for tag in soup.find_all(id=True)}
    assert {"01_first-same-name", "02_second-same-name", "nb-01_first", "nb-02_second"} <= ids


def test_the_reader_sees_what_was_meant_for_the_page_and_nothing_else(soup, built):
    outputs = [output.get_text() for output in soup.select("pre.output")]
    assert outputs == ["on stdout & <kept>\n", "<IPython.core.display.HTML object>"]  # the foreign HTML as plain text
    text = soup.main.get_text()
    assert soup.select("p strong math") and "\\frac" not in text and "$$" not in text and "costs $5" in text
    assert soup.select(".banner") and not soup.select("#findings, #explorer") and len(soup.select("script")) == 1
    assert "note = </code><script>" in soup.find(id="made").get_text()
    links = {a["download"]: a["href"].partition(",")[2] for a in soup.select("a[download]")}
    assert list(links) == ["claims.csv", "interpreter.json", "raw.csv", "manifest.json"]  # and no stale.csv
    assert unquote_to_bytes(links["raw.csv"]) == (built / "report/results/toy/raw.csv").read_bytes()
    drawn = "Show the code of Figure\u00a01 and Table\u00a01: draw"
    folds = ["Show the parameters", drawn, "Show the parameters", "Show the code of Figure\u00a02"]
    assert [summary.get_text() for summary in soup.select("details.code summary")] == folds
    shown = soup.find(id="01_first-2").pre.get_text()
    assert 'note: str = ""' in shown and 'note = "</code><script>"' in shown  # the default, and the value in this run


@pytest.mark.parametrize(("cell", "name"), [
    (code("", {"text/html": FIGURE.replace("A dot.", " ")}), "alternative text"),
    (code("", {"text/html": "<img>", "image/svg+xml": "<svg/>"}), "sgsc_study.figure"),
    (code("", {"text/html": FIGURE}, {"text/html": FIGURE}), "fig-a"),
    ("![a plot](plot.png)", "plot.png"),
    (code("", {"text/markdown": r"is $\nope{1}$"}), r"\nope{1}"),
    ("See [Figure](#fig-missing).", "fig-missing"),
    (nbformat.v4.new_raw_cell("never shown"), "raw cell"),
])  # fmt: skip
def test_what_cannot_go_on_the_page_is_refused_by_name(render, cell, name):
    with pytest.raises(report.BuildError, match=f"^01_one, cell 2: .*{re.escape(name)}"):
        render(cell)


def test_a_page_too_big_is_refused_by_the_name_of_its_biggest_result(render, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SIZE_LIMIT", 100_000)
    (tmp_path / "big.csv").write_text("0" * 100_000)
    with pytest.raises(report.BuildError, match=r"100,000.*big\.csv"):
        render(data=[tmp_path / "big.csv"])


def test_a_cell_for_the_notebook_alone_is_not_on_the_page(render):
    links = nbformat.v4.new_markdown_cell("[elsewhere](../x.html)", metadata={"tags": ["notebook-only"]})
    page = render(links, "and this")
    assert "elsewhere" not in page and "and this" in page


def test_no_line_starts_with_the_comma_after_a_formula(render):
    cell = BeautifulSoup(render("Let $a$, $b$**c**, $d$).\n\n- $e$"), "html.parser").find(id="01_one-2")
    assert [span.get_text() for span in cell.select(".joined")] == ["a,", "d)."]
    assert cell.p.get_text() == "Let a, bc, d)." and cell.li.get_text() == "e"


@pytest.mark.parametrize(("source", "selector", "text"), [
    ("The rate $ \\eta $ is low.", "p math", "η"),
    ("A $x $ and $ y$ too", "p math:last-of-type", "y"),
    ("$$ a = b $$", ".equation math", "a=b"),
    ("\\begin{align}\na &= b \\\\ c &= d\n\\end{align}", ".equation math mtable", "a=bc=d"),
    ("Intro.\n\n---\nNote: left out\n---\n\nEnd.", "h3", "Note: left out"),
    ("---\ntitle: mine\n---\n\nmore", "h3", "title: mine"),
    ("\\begin{equation}\na\n\\end{equation}", ".equation math", "a"),
    ("`a $ x $ b`", "code", "a $ x $ b"),
    ("| a |\n|---|\n| $|x|$ |", "td math", "|x|"),
    ("A note[^1].\n\n[^1]: its text", "p:last-of-type", "[^1]: its text"),
    ("% of labels that are wrong: 40\n\nmore", "p", "% of labels that are wrong: 40"),
    ("Text.\n## Heading", "h3", "Heading"),
    ("Table:\n| a | b |\n|---|---|\n| 1 | 2 |", "table td", "1"),
    ("| a |\n|---|\n| $c^2$ |", "table td math", "c2"),
    ("- a\n  - b\n    - c", "li li li", "c"),
    ("1. a\n2. b", "ol li", "a"),
    ("a\nterm\n: not a definition", "p", "a term : not a definition"),
    ("~~gone~~ and **bold** and `$5`", "p", "gone and bold and $5"),
    ("costs $5 and more", "p", "costs $5 and more"),
    ("<b>raw</b> text", "p b", "raw"),
    ("> said", "blockquote", "said"),
    ("[](#nb-01) and a_b_c", "p", "a_b_c"),
    ("line  \nbreak", "p br", ""),
    ("![a dot](x)", "img", ""),
])  # fmt: skip
def test_the_page_shows_what_jupyterlab_shows_of_a_markdown_cell(source, selector, text):
    soup = BeautifulSoup(report.markdown({}, source), "html.parser")
    (found, *_) = soup.select(selector)
    assert text in " ".join(found.get_text().split())


def test_explorer_and_citation_take_no_markup_from_what_they_show(render, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CITATION", tmp_path / "CITATION.cff")
    report.CITATION.write_text(CFF)
    values = {f"{name}_{what}": 0.5 for name in ("train_loss", "test_accuracy") for what in ("mean", "std")}
    cells = itertools.product(["before", "</script><script>alert(1)</script>"], [0.0, 0.5], [0.01])
    curves = pd.DataFrame(cells, columns=["placement", "gamma", "lr"]).assign(epoch=1, n=4, **values)
    curves.loc[1, "train_loss_mean"] = float("nan")  # a run that diverged
    curves.to_csv(tmp_path / "bank_curves.csv", index=False)
    figure = code("", {"text/html": FIGURE.replace("fig-a", "fig-factorial")})
    soup = BeautifulSoup(render(figure, data=[tmp_path / "bank_curves.csv"]), "html.parser")
    cells = json.loads(soup.find(id="explorer-data").string)["cells"]
    assert len(soup.find_all("script")) == 3 and any("</script>" in name for name in cells)
    assert any(None in curve for cell in cells.values() for curve in cell)
    cite = soup.find(id="cite")
    assert "Ada Lovelace, The <team>. A & B, version 0.1.0, 2026-11-24. Licence: MIT." in cite.p.get_text()
    assert "author  = {Ada Lovelace and The <team>}," in cite.pre.get_text()


@pytest.fixture
def open_page(browser, smoke):
    """Open the smoke page, or another; what it logs and asks for is kept on `.messages` and `.requested`."""
    pages = []

    def open_it(path=smoke[0] / "report/sgsc-smoke.html", **options):
        page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce", **options})
        pages.append(page)
        page.messages, page.requested = [], []
        page.on("console", lambda message: page.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_it
    for page in pages:
        page.close()


def test_it_asks_for_nothing_logs_nothing_forbids_network_access_and_draws_every_figure(open_page):
    page = open_page()
    page.wait_for_load_state("networkidle")
    assert page.requested == [page.url] and page.messages == []
    blocked = page.evaluate(
        "() => new Promise(done => { fetch('http://127.0.0.1:9/').catch(() => {});"
        " document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective)); })"
    )
    images = page.evaluate("[...document.images].map(img => [img.alt.trim().length, img.naturalWidth])")
    assert blocked == "connect-src" and len(images) > 5 and min(map(min, images)) > 0
    page.evaluate("document.querySelectorAll('main :is(pre, code)').forEach(part => part.remove())")
    assert not re.search(r"\\[A-Za-z]+|\$\$|Traceback \(most recent", page.locator("main").text_content())


def test_the_html_checker_reports_no_error(smoke):
    jar = Path(os.environ.get("VNU_JAR", ROOT / ".cache/node_modules/vnu-jar/build/dist/vnu.jar"))
    if not (jar.exists() and shutil.which("java")):
        away = pytest.fail if os.environ.get("CI") else pytest.skip
        away("The Nu HTML checker needs Java and: npm install --no-save --prefix .cache vnu-jar (or VNU_JAR=its path)")
    command = ["java", "-jar", jar, "--errors-only", "--stdout", smoke[0] / "report/sgsc-smoke.html"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 360), ("light", 768)])
def test_axe_finds_nothing_and_only_boxes_scroll_sideways(open_page, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('main details').forEach(part => part.open = true)")
    page.evaluate(SETTLED)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    results = Axe().run(page, options={"resultTypes": ["violations"]})  # the rest is long, and nobody reads it
    assert results.violations_count == 0, results.generate_report()


def drawn(page) -> list[str]:
    page.evaluate(SETTLED)
    return page.evaluate("[...document.querySelectorAll('#explorer canvas')].map(canvas => canvas.toDataURL())")


def test_the_theme_switch_works_by_keyboard_is_remembered_and_the_explorer_follows(open_page):
    page, paper = open_page(color_scheme="light"), "getComputedStyle(document.body).backgroundColor"
    light, plots = page.evaluate(paper), drawn(page)
    page.get_by_role("radio", name="Auto").focus()
    page.keyboard.press("ArrowLeft")  # wraps round to Dark
    dark = page.evaluate(paper)
    assert page.get_by_role("radio", name="Dark").is_checked() and dark != light and not {*plots} & {*drawn(page)}
    page.reload()
    assert page.evaluate(paper) == dark and page.get_by_role("radio", name="Dark").is_checked()


def test_the_skip_link_comes_first_and_the_contents_follow_the_reader(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
    page.keyboard.press("Enter")
    page.wait_for_url("**#main")
    for target in page.evaluate("[...document.querySelectorAll('section.notebook')].map(section => section.id)"):
        page.evaluate("id => document.getElementById(id).scrollIntoView()", target)
        page.wait_for_function("id => document.querySelector('nav a[aria-current]')?.hash === '#' + id", arg=target)


def test_every_result_and_every_table_can_be_saved(open_page, smoke):
    page = open_page()
    held = page.evaluate("[...document.querySelectorAll('#data a[download]')].map(link => [link.download, link.href])")
    assert {"claims.csv", "manifest.json"} <= {name for name, _ in held}
    for name, href in held:
        assert unquote_to_bytes(href.partition(",")[2]) == (smoke[0] / "report/results/smoke" / name).read_bytes()
    with page.expect_download() as download:
        page.locator(".tools a[download]").first.click()
    rows = "[...document.querySelector('.cell table').rows].map(row => [...row.cells].map(cell => cell.textContent))"
    assert list(csv.reader(download.value.path().read_text(encoding="utf-8").splitlines())) == page.evaluate(rows)


def test_the_first_screen_has_an_answer(open_page, render, tmp_path):
    links = re.compile(r"\[(Figure|Table)\]\(#[^)]*\)")  # to what the page of one figure does not have
    said = {k: links.sub(r"\1", part) for k, part in findings.findings(ROOT / "report/results/full").items()}
    figure = code("", {"text/html": FIGURE.replace("fig-a", "fig-findings")})
    (tmp_path / "full.html").write_text(render(figure, said=said, profile="full"), encoding="utf-8")
    page = open_page(tmp_path / "full.html")
    box = page.locator("#fig-findings").bounding_box()
    assert box["y"] <= 650 and page.locator("#findings img").is_visible()


def test_the_explorer_is_worked_by_keyboard_and_says_what_the_results_say(open_page, smoke):
    page = open_page(viewport={"width": 360, "height": 740})
    page.get_by_role("button", name="One learning rate").press("Enter")
    status, before = page.locator("#explorer [role=status]"), drawn(page)
    curves = pd.read_csv(smoke[0] / "report/results/smoke/bank_curves.csv")
    end = curves.query("epoch == epoch.max() and lr == 0.0047 and placement == 'before'")
    for _, cell in end.iterrows():
        told = rf"loss {cell['train_loss_mean']:.1f}\d*, test accuracy {100 * cell['test_accuracy_mean']:.1f} %"
        assert re.search(told, status.text_content())
    page.locator("#explorer").get_by_label("before Adam", exact=True).focus()
    page.keyboard.press("ArrowDown")
    assert "SGSC (after Adam, γ = 0.5, learning rate 0.033)" in status.text_content() and page.messages == []
    assert len(before) == 2 and not {*before} & {*drawn(page)}
    page.get_by_role("button", name="One learning rate").press("Enter")
    assert "γ alone" in page.locator("#explorer [role=note]").text_content() and drawn(page) == before


def test_without_javascript_it_reads_the_same(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#fig-factorial img").is_visible() and not page.locator("#explorer form").is_visible()
    assert page.locator("#explorer noscript p").is_visible() and page.locator("nav li a").first.is_visible()
    page.locator("details.code > summary").first.click()
    assert page.locator("details.code pre").first.is_visible() and page.messages == []


def test_it_prints(open_page):
    page = open_page(color_scheme="dark", viewport={"width": 643, "height": 971})  # A4 within its margins of 2 cm
    page.emulate_media(media="print")
    assert not page.evaluate("[...document.querySelectorAll('nav, #explorer')].some(tag => tag.checkVisibility())")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    parts = "[...document.querySelectorAll('figure img, figure table, .equation math')]"
    assert max(page.evaluate(f"{parts}.map(tag => tag.getBoundingClientRect().right)")) <= 644
