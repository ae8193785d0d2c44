"""report/page.py: toy notebooks rendered, then (slow) the smoke page in Chromium, offline, on a phone and on paper."""

import csv
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

WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
CFF = """authors: [{given-names: Ada, family-names: Lovelace}, {name: The <team>}]
title: A & B
version: 0.1.0
date-released: 2026-11-24
url: https://example.org/sgsc
"""


@pytest.fixture
def render(built, tmp_path, monkeypatch):
    """Render an executed notebook of the given cells, with a CITATION.cff if given; the page's HTML."""
    made = manifest.read(built / "report/results/toy")
    monkeypatch.setattr(report, "CITATION", tmp_path / "CITATION.cff")

    def render(*cells, data=(), said="", citation=None, profile="toy") -> str:
        if citation:
            report.CITATION.write_text(citation)
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
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in soup.select('a[href^="#"]')} <= set(ids)
    assert {"01_first-same-name", "02_second-same-name", "nb-01_first", "nb-02_second"} <= set(ids)


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


def test_code_is_folded_under_what_it_makes(soup):
    drawn = "Show the code of Figure\u00a01 and Table\u00a01: draw"
    folds = ["Show the parameters", drawn, "Show the parameters", "Show the code of Figure\u00a02"]
    assert [summary.get_text() for summary in soup.select("details.code summary")] == folds
    shown = soup.find(id="01_first-2").pre.get_text()
    assert 'note: str = ""' in shown and 'note = "</code><script>"' in shown  # the default, and the value in this run


@pytest.mark.parametrize(("cell", "name"), [
    (code("", {"text/html": FIGURE.replace("A dot.", " ")}), "alternative text"),
    (code("", {"image/png": "iVBORw0KGgo="}), "sgsc_study.figure"),
    (code("", {"text/html": "<img>", "image/svg+xml": "<svg/>"}), "sgsc_study.figure"),
    (code("", {"text/html": FIGURE}, {"text/html": FIGURE}), "fig-a"),
    ("![a plot](plot.png)", "plot.png"),
    ("$$ \\nope \\tag{3} $$", r"\nope"),
    (code("", {"text/markdown": r"is $\nope{1}$"}), r"\nope{1}"),
    ("See [Figure](#fig-missing).", "fig-missing"),
    ("See [Equation](#eq-9.9).", "eq-9.9"),
])  # fmt: skip
def test_what_cannot_go_on_the_page_is_refused_by_name(render, cell, name):
    with pytest.raises(report.BuildError, match=f"^01_one, cell 2: .*{re.escape(name)}"):
        render(cell)


def test_an_error_a_page_too_big_and_a_citation_without_a_field_are_refused_by_name(render, tmp_path, monkeypatch):
    failed = code("boom()")
    failed.outputs = [nbformat.v4.new_output("error", ename="NameError", evalue="boom", traceback=[])]
    with pytest.raises(report.BuildError, match=r"01_one, cell 2: NameError"):
        render(failed)
    with pytest.raises(report.BuildError, match=r"CITATION\.cff.*license"):
        render(citation=CFF)
    monkeypatch.setattr(report, "SIZE_LIMIT", 100_000)
    (tmp_path / "big.csv").write_text("0" * 100_000)
    with pytest.raises(report.BuildError, match=r"0\.1 MB.*big\.csv.*fig-a"):
        render(code("", {"text/html": FIGURE}), data=[tmp_path / "big.csv"], citation=CFF + "license: MIT")


def test_the_same_page_twice_and_no_line_that_starts_with_the_comma_after_a_formula(render):
    html = render("Let $a$, $b$**c**, $d$).\n\n- $e$")
    assert html == render("Let $a$, $b$**c**, $d$).\n\n- $e$")
    cell = BeautifulSoup(html, "html.parser").find(id="01_one-2")
    assert [span.get_text() for span in cell.select(".joined")] == ["a,", "d)."]
    assert cell.p.get_text() == "Let a, bc, d)." and cell.li.get_text() == "e"


def test_explorer_and_citation_take_no_markup_from_what_they_show(render, tmp_path):
    curves = pd.read_csv(ROOT / "report/results/full/factorial_curves.csv")
    curves.loc[0, "placement"] = "</script><script>alert(1)</script>"
    curves.loc[1, "train_loss_mean"] = float("nan")  # a run that diverged
    curves.to_csv(tmp_path / "factorial_curves.csv", index=False)
    figure = code("", {"text/html": FIGURE.replace("fig-a", "fig-factorial")})
    html = render(figure, data=[tmp_path / "factorial_curves.csv"], citation=CFF + "license: MIT")
    soup = BeautifulSoup(html, "html.parser")
    cells = json.loads(soup.find(id="explorer-data").string)["cells"]
    assert len(soup.find_all("script")) == 3 and any("</script>" in name for name in cells)
    assert any(None in curve for cell in cells.values() for curve in cell)
    cite = soup.find(id="cite")
    assert "Ada Lovelace, The <team>. A & B, version 0.1.0, 2026-11-24. Licence: MIT." in cite.p.get_text()
    assert "author  = {Ada Lovelace and The <team>}," in cite.pre.get_text()
    assert cite.p.a["href"] == "https://example.org/sgsc" and soup.select_one('nav a[href="#cite"]')


# -- slow: in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture
def open_page(browser, smoke):
    """Open the smoke page, or another; what it logs and asks for is kept on `.messages` and `.requested`."""
    contexts = []

    def open_it(path=smoke[0] / "report/sgsc-smoke.html", **options):
        contexts.append(browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options}))
        page = contexts[-1].new_page()
        page.messages, page.requested = [], []
        page.on("console", lambda message: page.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()


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
    options = ["--errors-only", "--exit-zero-always", "--stdout", "--format", "json"]
    command = ["java", "-jar", jar, *options, smoke[0] / "report/sgsc-smoke.html"]
    checked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(checked.stdout)["messages"] == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 360), ("light", 768)])
def test_axe_finds_nothing_and_only_boxes_scroll_sideways_by_keyboard_too(open_page, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('main details').forEach(part => part.open = true)")
    page.evaluate(SETTLED)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unreachable = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(tag => tag.checkVisibility() && tag.tabIndex < 0"
        " && ['auto', 'scroll'].includes(getComputedStyle(tag).overflowX) && tag.scrollWidth > tag.clientWidth).length"
    )
    results = Axe().run(page, options={"resultTypes": ["violations"]})  # the rest is long, and nobody reads it
    assert unreachable == results.violations_count == 0, results.generate_report()


def drawn(page) -> list[str]:
    """The explorer's two plots, as images."""
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
    page.get_by_role("radio", name="Light").check(force=True)
    assert page.evaluate(paper) == light


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
    links = page.locator(".tools a[download]")
    assert links.count() == page.locator(".cell table").count() > 10
    with page.expect_download() as download:
        links.first.click()
    rows = "[...document.querySelector('.cell table').rows].map(row => [...row.cells].map(cell => cell.textContent))"
    assert list(csv.reader(download.value.path().read_text(encoding="utf-8").splitlines())) == page.evaluate(rows)


def test_the_first_screen_has_an_answer(open_page, render, tmp_path):
    said = findings.findings(ROOT / "report/results/full")
    figure = code("", {"text/html": FIGURE.replace("fig-a", "fig-findings")})
    (tmp_path / "full.html").write_text(render(figure, said=said, profile="full"), encoding="utf-8")
    page = open_page(tmp_path / "full.html")
    box = page.locator("#findings > p").first.bounding_box()
    assert box["y"] + box["height"] <= WIDE["height"] and page.locator("#findings img").is_visible()


@pytest.mark.parametrize(("label", "key", "said"), [
    ("γ", "ArrowLeft", "SGSC (before Adam, γ = 0, learning rate 0.0045)"),
    ("SGSC’s learning rate", "ArrowRight", "SGSC (before Adam, γ = 0.5, learning rate 0.0135)"),
    ("before Adam", "ArrowDown", "SGSC (after Adam, γ = 0.5, learning rate 0.0045)"),
    ("Adam’s learning rate", "End", "Adam (learning rate 0.0135)"),
])  # fmt: skip
def test_the_explorer_is_worked_by_keyboard_and_says_what_the_results_say(open_page, smoke, label, key, said):
    page = open_page(viewport=PHONE)
    status, before = page.locator("#explorer [role=status]"), drawn(page)
    right = page.evaluate("[...document.querySelectorAll('#explorer *')].map(tag => tag.getBoundingClientRect().right)")
    assert len(before) == 2 and said not in status.text_content() and max(right) <= PHONE["width"]
    curves = pd.read_csv(smoke[0] / "report/results/smoke/factorial_curves.csv")
    end = curves.query("epoch == epoch.max() and lr == 0.0045 and placement == 'before'")
    for _, cell in end.iterrows():
        told = rf"loss {cell['train_loss_mean']:.1f}\d*, test accuracy {100 * cell['test_accuracy_mean']:.1f} %"
        assert re.search(told, status.text_content())
    page.locator("#explorer").get_by_label(label, exact=True).focus()
    page.keyboard.press(key)
    assert said in status.text_content() and page.messages == [] and not {*before} & {*drawn(page)}


def test_without_javascript_it_reads_the_same(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#fig-factorial img").is_visible() and not page.locator("#explorer form").is_visible()
    for shown in "#explorer noscript p", "nav li a", "main h2":
        assert page.locator(shown).first.is_visible()
    page.get_by_role("radio", name="Dark").check(force=True)
    page.locator("details.code > summary").first.click()
    assert page.locator("details.code pre").first.is_visible() and page.messages == []


def test_it_prints(open_page):
    page = open_page(color_scheme="dark", viewport={"width": 643, "height": 971})  # A4 within its margins of 2 cm
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    hidden = "[...document.querySelectorAll('nav, main details, #explorer')].every(tag => !tag.checkVisibility())"
    assert page.evaluate(hidden)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    clipped = page.evaluate(
        "[...document.querySelectorAll('figure img, figure table, .equation math')].filter(tag => { const box ="
        " tag.getBoundingClientRect(); return box.left < -1 || box.right > 644 || box.height > 971; })"
        ".map(tag => tag.closest('[id]').id)"
    )
    assert clipped == []
