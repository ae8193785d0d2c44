"""The smoke page in a real browser: offline, accessible, readable on a phone, on paper and without JavaScript.

Then the parts of the page that come from result files: the findings, the first figure, the explorer, the citation.
"""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote_to_bytes

import page as report
import pandas as pd
import pytest
import summary
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from conftest import ROOT, code, write_notebook

RESULTS = ROOT / "report/results/full"
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


def test_the_html_checker_reports_no_error(smoke_page):
    jar = Path(os.environ.get("VNU_JAR", ROOT / ".cache/node_modules/vnu-jar/build/dist/vnu.jar"))
    if not (jar.exists() and shutil.which("java")):
        away = pytest.fail if os.environ.get("CI") else pytest.skip
        away("The Nu HTML checker needs Java and: npm install --no-save --prefix .cache vnu-jar (or VNU_JAR=its path)")
    command = ["java", "-jar", jar, "--errors-only", "--exit-zero-always", "--stdout", "--format", "json", smoke_page]
    checked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(checked.stdout)["messages"] == []


@pytest.mark.parametrize(("scheme", "viewport"), [("light", WIDE), ("dark", PHONE)], ids=["light-wide", "dark-phone"])
def test_axe_finds_nothing(open_page, scheme, viewport):
    page = open_page(color_scheme=scheme, viewport=viewport)
    page.evaluate("document.querySelectorAll('main details').forEach(part => part.open = true)")
    results = Axe().run(page, options={"resultTypes": ["violations"]})  # the rest is long, and nobody reads it
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


def test_code_is_folded_under_the_figure_it_makes(open_page):
    page = open_page()
    for figure in page.locator(".cell figure[id]").all():
        label = figure.locator("figcaption .label").text_content().rstrip(".")
        summary = figure.locator("xpath=ancestor::*[@class='cell']").locator("details.code > summary")
        assert re.match(rf"Show the code of (.* and )?{label}\b.*: \S", summary.text_content())


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
    page, results = open_page(), smoke_page.parent / "results/smoke"
    links = page.locator("#data a[download]")
    held = dict(links.evaluate_all("all => all.map(link => [link.download, link.href])"))
    assert "claims.csv" in held and "manifest.json" in held
    for name, href in held.items():
        assert unquote_to_bytes(href.partition(",")[2]) == (results / name).read_bytes()
    with page.expect_download() as download:  # one, as Chromium holds back a page's downloads after some in a row
        links.first.click()
    assert download.value.path().read_bytes() == (results / download.value.suggested_filename).read_bytes()


def test_every_table_can_be_saved_as_it_is_shown(open_page):
    page = open_page()
    links = page.locator(".tools a[download]")
    assert links.count() == page.locator(":is(#findings, .cell) table").count() > 10
    link = page.locator("#tbl-arms .tools a")
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "tbl-arms.csv"
    rows = list(csv.reader(download.value.path().read_text(encoding="utf-8").splitlines()))
    assert rows == page.evaluate(
        "[...document.querySelector('#tbl-arms table').rows].map(row => [...row.cells].map(cell => cell.textContent))"
    )


def test_the_first_screen_has_the_answer(open_page):
    page = open_page()
    assert page.locator("#findings > ul > li").count() == 8 and page.locator("#findings details li").count() == 4
    answer = page.locator("#findings > p").first
    box = answer.bounding_box()  # the smoke profile's banner takes some room
    assert answer.text_content().startswith("In short: ") and box["y"] + box["height"] <= WIDE["height"]
    assert page.locator("#findings figcaption").text_content().startswith("Figure\u00a01. ")
    assert re.search(r"the card's settings: −?\d+\.\d\d \[", page.locator("#findings img").get_attribute("alt"))


def drawn(page) -> list[str]:
    """The explorer's two plots, as images."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("[...document.querySelectorAll('#explorer canvas')].map(canvas => canvas.toDataURL())")


@pytest.mark.parametrize(
    ("label", "key", "said"),
    [
        ("γ", "ArrowLeft", "SGSC (before Adam, γ = 0, learning rate 0.0045)"),
        ("SGSC’s learning rate", "ArrowRight", "SGSC (before Adam, γ = 0.5, learning rate 0.0135)"),
        ("before Adam", "ArrowDown", "SGSC (after Adam, γ = 0.5, learning rate 0.0045)"),
        ("Adam’s learning rate", "End", "Adam (learning rate 0.0135)"),
    ],
)
def test_the_explorer_is_worked_by_keyboard(open_page, label, key, said):
    page = open_page()
    status, before = page.locator("#explorer [role=status]"), drawn(page)
    assert len(before) == 2 and said not in status.text_content()
    page.locator("#explorer").get_by_label(label, exact=True).focus()
    page.keyboard.press(key)
    assert said in status.text_content()
    assert all(old != new for old, new in zip(before, drawn(page), strict=True))
    assert page.messages == []


def test_the_explorer_says_what_the_results_say(open_page, smoke_page):
    curves = pd.read_csv(smoke_page.parent / "results/smoke/factorial_curves.csv")
    end = curves[(curves["epoch"] == curves["epoch"].max()) & (curves["lr"] == 0.0045)].set_index(
        ["placement", "gamma"]
    )
    said = open_page().locator("#explorer [role=status]").text_content()
    for cell in (("before", 0.5), ("before", 0.0)):
        loss, accuracy = end.loc[cell, "train_loss_mean"], end.loc[cell, "test_accuracy_mean"]
        assert re.search(rf"training loss {loss:.1f}\d*, test accuracy {100 * accuracy:.1f} %", said), said


def test_the_explorer_follows_the_theme(open_page):
    page = open_page(color_scheme="light")
    light = drawn(page)
    page.get_by_role("radio", name="Dark").check(force=True)
    assert all(old != new for old, new in zip(light, drawn(page), strict=True))


def test_the_explorer_fits_a_phone(open_page):
    page = open_page(viewport=PHONE)
    drawn(page)
    right = page.evaluate("[...document.querySelectorAll('#explorer *')].map(tag => tag.getBoundingClientRect().right)")
    assert max(right) <= PHONE["width"]


def test_without_javascript_it_reads_the_same(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#fig-factorial img").is_visible() and not page.locator("#explorer form").is_visible()
    assert page.locator("#explorer noscript p").is_visible()
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
    assert page.evaluate(
        "[...document.querySelectorAll('nav, main details, #explorer')].every(tag => !tag.checkVisibility())"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure img, figure table, .equation math')].map(tag => {"
        " const box = tag.getBoundingClientRect(); return [tag.closest('[id]').id, box.left, box.right, box.height]; })"
    )
    assert boxes
    clipped = [name for name, left, right, height in boxes if left < -1 or right > 644 or height > 971]
    assert clipped == []


# ---------------------------------------------------------------------------------------------------------------------
# From result files
# ---------------------------------------------------------------------------------------------------------------------


def claims_with(tmp_path, **verdicts: str) -> Path:
    """The committed claims with other verdicts; a name is an id with _ for -."""
    claims = pd.read_csv(RESULTS / "claims.csv").set_index("id")
    for identity, verdict in verdicts.items():
        claims.loc[identity.removeprefix("claim_").replace("_", "-"), "verdict"] = verdict
    claims.to_csv(tmp_path / "claims.csv")
    return tmp_path / "claims.csv"


@pytest.mark.parametrize(
    ("verdict", "smooth", "accurate"),
    [
        ("confirmed", "loss is **smoother than Adam's**", "lower than Adam's**"),
        ("contradicted", "loss is **rougher than Adam's**", "higher than Adam's**"),
        ("equivalent", "loss is **as rough as Adam's within the margin**", "the same as Adam's within the margin**"),
        ("inconclusive", "not clearly smoother or rougher", "not clearly lower or higher"),
    ],
)
def test_the_answer_says_what_the_verdicts_say(tmp_path, verdict, smooth, accurate):
    path = claims_with(
        tmp_path,
        **dict.fromkeys(
            [
                *("claim_1_before_tuned", "claim_1_before_searches", "claim_2_before_tuned"),
                *("claim_2f_before_tuned", "claim_2f_before_searches"),
            ],
            verdict,
        ),
    )
    first, _, third, *rest = sentences(summary.findings(path))
    assert smooth in first and third.count(accurate) == 3 and len(rest) == 5


@pytest.mark.parametrize("verdict", ["confirmed", "contradicted", "inconclusive"])
def test_the_answer_tells_of_the_rise_the_best_gamma_and_the_signal(tmp_path, verdict):
    told = {"1r-before-tuned": summary.RISES, "3-before-tuned": summary.NEAR_ZERO, "4-before-tuned": summary.RATE}
    told |= {"5-signal": summary.NOISE}
    path = claims_with(tmp_path, **dict.fromkeys([f"claim_{name.replace('-', '_')}" for name in told], verdict))
    _, second, _, fourth, _, _, seventh, *_ = sentences(summary.findings(path))
    for words, sentence in zip(told.values(), (second, fourth, fourth, seventh), strict=True):
        assert f"**{words[verdict]}**" in sentence
    assert ("but only" in seventh) == (verdict == "confirmed")


@pytest.mark.parametrize("verdict", ["confirmed", "contradicted", "equivalent", "inconclusive"])
def test_the_short_answer_says_what_the_verdicts_say_and_names_a_cause_only_where_they_do(tmp_path, verdict):
    either = [f"claim_{claim}_card_common_lr_{arm}" for claim in (1, 2) for arm in ("adam", "sgsc")]
    path = claims_with(tmp_path, claim_1_card_values="confirmed", **dict.fromkeys(either, verdict))
    short = summary.findings(path).split("\n\n")[0]
    loss, accuracy = f"**{summary.SMOOTH[verdict]}**", f"**{summary.ACCURATE[verdict]}**"
    assert f"with either of the two learning rates for both, {loss} and its accuracy {accuracy}." in short
    assert ("It is the lower learning rate that smooths, not γ." in short) == (verdict != "confirmed")
    path = claims_with(tmp_path, claim_1_card_common_lr_adam=verdict, claim_1_card_values="contradicted")
    claims = pd.read_csv(path).set_index("id")
    claims.loc[["8f-sgsc-after-vs-adamw", "11f-sgsc-after-vs-adamw"], "verdict"] = "better", "worse"
    claims.loc["2f-after-searches", "verdict"] = verdict
    claims.reset_index().to_csv(path)
    short = summary.findings(path, pd.read_csv(RESULTS / "claims.csv")).split("\n\n")[0]
    assert "It is the lower" not in short and "**more accurate than AdamW** (*replica: " in short
    assert f"so tuned, the accuracy is **{summary.ACCURATE[verdict]}**" in short
    assert "×" not in short and "points" not in short  # words alone


def sentences(findings: str) -> list[str]:
    """The sentences on the card's claims, which come before any table."""
    return [line for line in findings.split("\n|")[0].splitlines() if line.startswith("- ")]


def past_the_card(path: Path, part: int = 0) -> str:
    """The second fold of the findings, past the words: its sentences (part 0) or its table (part 1)."""
    return summary.findings(path).split("<details>")[2].split("\n\n")[1:][part]


def test_the_answer_counts_the_cells_with_wrong_labels(tmp_path):
    claims = pd.read_csv(RESULTS / "claims.csv").set_index("id")
    noisy = claims.index.str.fullmatch(r"9-sgsc-after-vs-adam(-cosine-decay)?-0\.\d+-\d+-equal-epochs")
    claims.loc[noisy, "verdict"] = "better"
    claims.loc[noisy & claims.index.str.contains("cosine") & claims.index.str.contains("-128-"), "verdict"] = "worse"
    claims.to_csv(tmp_path / "claims.csv")
    n, worse = noisy.sum() // 2, (claims[noisy]["verdict"] == "worse").sum()
    last = past_the_card(tmp_path / "claims.csv").splitlines()[-1]
    assert (
        f"Of the {n} cells of that map" in last
        and f"after Adam is **more accurate than Adam in {n} and less in 0**" in last
    )
    assert f"**more accurate than Adam with cosine decay in {n - worse} and less in {worse}**" in last and worse > 0


def test_the_answers_numbers_are_the_claims_in_a_readers_units(tmp_path):
    path = claims_with(tmp_path)
    claims = pd.read_csv(path).set_index("id")
    claims.loc["1-before-tuned", ["estimate", "ci_low", "ci_high"]] = -0.6931472, -1.0986123, 0.0
    claims.loc["2-before-tuned", ["estimate", "ci_low", "ci_high"]] = -0.0123, -0.02, 0.001
    claims.to_csv(path)
    text = summary.findings(path).replace("\u00a0", " ")
    assert "roughness × 2.00 [1.00, 3.00]" in text and "−1.23 points [−2.00, +0.10]" in text


def test_every_verdict_of_the_card_is_in_the_folded_table():
    claims = pd.read_csv(RESULTS / "claims.csv")
    folded = summary.findings(RESULTS / "claims.csv").split("<details>")[3]
    card = claims[(claims["source"] == "card") & ~claims["id"].str.contains("after")]
    verdicts = [line.split("|")[-2].strip() for line in folded.splitlines() if line.startswith("| ")][1:]
    assert sorted(verdicts) == sorted(card["verdict"])


@pytest.mark.parametrize(("verdict", "words"), summary.AGAINST.items())
def test_a_sentence_and_the_second_table_say_what_the_finalists_did(tmp_path, verdict, words):
    claims = pd.read_csv(RESULTS / "claims.csv").set_index("id")
    for ids in summary.BEYOND.values():
        for identity in ids:
            claims.loc[identity] = claims.loc["2-before-tuned"]
            claims.loc[identity, ["source", "verdict", "estimate"]] = "beyond", verdict, 0.0234
    claims.to_csv(tmp_path / "claims.csv")
    rivals = past_the_card(tmp_path / "claims.csv").splitlines()[0]
    assert rivals.count(f"**{words} AdamW**: +2.34 points") == 2  # without decay, and with it
    assert rivals.count(f"**{words} its gates shuffled over parameters**") == 2
    _, _, *rows = past_the_card(tmp_path / "claims.csv", part=1).splitlines()
    n = claims.loc["2-before-tuned", "n"]
    assert len(rows) == len(summary.BEYOND)
    assert all(row.count(f"**{verdict}** +2.34") == 2 and row.endswith(f"| {n} |") for row in rows)


@pytest.mark.parametrize(("verdict", "words"), summary.AGAINST.items())
def test_the_answer_names_the_maps_own_cell(tmp_path, verdict, words):
    path = claims_with(tmp_path, **{"claim_9_sgsc_after_vs_adam_0_128_equal_epochs": verdict})
    words = words.removesuffix(" than").removesuffix(" as")
    after = past_the_card(path).splitlines()[1].split("the gate after Adam is ")[1]
    assert f"] in the contest and **{words}**: " in after and after.endswith("] in the map.")


def test_a_replicas_other_verdicts_stand_beside_the_studys(tmp_path):
    own = pd.read_csv(claims_with(tmp_path, claim_1_before_tuned="contradicted", claim_2_before_tuned="equivalent"))
    assert "(*replica" not in summary.findings(tmp_path / "claims.csv", own)
    replica = own.set_index("id")
    replica.loc["1-before-tuned", ["verdict", "estimate"]] = "confirmed", own["ci_high"].max() + 100
    replica.loc["2-before-tuned", "verdict"] = "inconclusive"
    text = summary.findings(tmp_path / "claims.csv", replica.reset_index()).replace("\u00a0%", " %")
    first, _, second, *others = sentences(text)
    assert "loss is **rougher than Adam's**: " in first and "(*replica: smoother than Adam's*: roughness" in first
    assert "is **the same as Adam's within" in second and "(*replica: not clearly lower or" in second
    assert first.count("(*replica") == second.count("(*replica") == 1 and "(*replica" not in "".join(others)
    assert f"Of {len(own)} verdicts {len(own) - 2} are the same, 0 are definite in one of the two alone" in text
    assert "1 change between equivalent and inconclusive, and 1 is the opposite (SGSC's training loss" in text
    given = own["setting"].str.startswith("card's values").sum()
    assert f"in {given} of {given} cases on" in text and "were seeds alone to make the difference, 83 % would." in text
    _, short, _, whole = text.split("<details>")
    assert short.count("<br>replica: **") == 2 and "<br>replica: **confirmed**" in short
    assert whole.count("| verdict | replica |") == 1 and whole.count("**confirmed**") >= 1


def test_a_replica_is_of_the_same_study_with_another_arithmetic_or_left_out(tmp_path, capsys):
    own, folder = tmp_path / "full", tmp_path / "full-replica"
    shutil.copytree(RESULTS, own)
    assert summary.replica_of(own) is None and capsys.readouterr().err == ""
    folder.mkdir()
    shutil.copy(own / "claims.csv", folder)
    manifest = json.loads((own / "manifest.json").read_text())
    other = {"machine": manifest["machine"] | {"arithmetic": "8 bits"}}
    for change, said in (
        (other, ""),
        ({}, "it has the same arithmetic"),
        (other | {"library_sha256": "0"}, "it is of another study, in library_sha256."),
        (other | {"notebooks": {}}, "it is of another study, in 01_derivation, "),
        ({"machine": {}}, "it is damaged ('arithmetic')."),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        replica = summary.replica_of(own)
        assert len(replica) == len(pd.read_csv(own / "claims.csv")) if not said else replica is None
        assert said in capsys.readouterr().err
    (folder / "manifest.json").write_text(json.dumps(manifest | other))
    (folder / "claims.csv").write_text("id\n")
    assert summary.replica_of(own) is None
    assert "claims.csv is not what manifest.json says" in capsys.readouterr().err


def test_where_the_sentences_lack_a_claim_the_page_says_so(tmp_path):
    claims = pd.read_csv(RESULTS / "claims.csv")
    claims[claims["notebook"] != "04_gamma_and_smoothness"].to_csv(tmp_path / "claims.csv", index=False)
    text = summary.findings(tmp_path / "claims.csv")
    assert "In short" not in text and summary.NO_SENTENCES in text and "| The card's claim |" in text
    assert "replica" not in text


def test_without_claims_there_are_no_findings(tmp_path):
    assert summary.findings(tmp_path / "claims.csv") == ""


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Render a notebook that shows the factorial, with given result files and CITATION.cff; the page, parsed."""
    figure = BeautifulSoup(summary.forest_figure(RESULTS / "comparisons.csv"), "html.parser").figure
    figure["id"] = "fig-factorial"
    executed = {"01_one": write_notebook(tmp_path / "01_one.ipynb", "# One", code("", {"text/html": str(figure)}))}
    manifest = json.loads((RESULTS / "manifest.json").read_text())

    def render(*data: Path, citation: str | None = None) -> BeautifulSoup:
        monkeypatch.setattr(report, "CITATION", tmp_path / "CITATION.cff")
        if citation is not None:
            report.CITATION.write_text(citation)
        return BeautifulSoup(report.render(executed, manifest, list(data)), "html.parser")

    return render


def test_no_line_starts_with_the_comma_after_a_formula(tmp_path):
    executed = {"01_one": write_notebook(tmp_path / "two.ipynb", "# One\n\nLet $a$, $b$**c**, $d$).\n\n- $e$")}
    html = report.render(executed, json.loads((RESULTS / "manifest.json").read_text()), [])
    soup = BeautifulSoup(html, "html.parser").find(class_="cell")
    assert [span.get_text() for span in soup.select(".joined")] == ["a,", "d)."]
    assert soup.p.get_text() == "Let a, bc, d)." and soup.li.get_text() == "e"


def test_what_has_no_result_file_is_left_out(rendered):
    soup = rendered()
    assert not soup.find(id="explorer") and not soup.find(id="cite") and not soup.select("header figure")
    assert len(soup.find_all("script")) == 1


def test_names_in_results_cannot_leave_the_explorers_data(rendered, tmp_path):
    curves = pd.read_csv(RESULTS / "factorial_curves.csv")
    curves.loc[0, "placement"] = "</script><script>alert(1)</script>"
    curves.loc[1, "train_loss_mean"] = float("nan")  # a run that diverged
    curves.to_csv(tmp_path / "factorial_curves.csv", index=False)
    soup = rendered(tmp_path / "factorial_curves.csv")
    assert len(soup.find_all("script")) == 3
    cells = json.loads(soup.find(id="explorer-data").string)["cells"]
    assert "</script><script>alert(1)</script> 0.05 0.001" in cells and None in cells["after 0.05 0.001"][0]


CFF = """
title: A & B
version: 0.1.0
authors: [{given-names: Ada, family-names: Lovelace}, {name: The <team>}]
date-released: 2026-11-24
license: MIT
"""


def test_the_citation_is_that_of_the_repository(rendered):
    soup = rendered(citation=CFF + "url: https://example.org/sgsc")
    cite = soup.find(id="cite")
    assert "Ada Lovelace, The <team>. A & B, version 0.1.0, 2026-11-24. Licence: MIT." in cite.p.get_text()
    assert "author  = {Ada Lovelace and The <team>}," in cite.pre.get_text()
    assert cite.p.a["href"] == "https://example.org/sgsc" and soup.select_one('nav a[href="#cite"]')


def test_a_citation_without_a_field_names_it(rendered):
    with pytest.raises(report.BuildError, match=r"CITATION\.cff should have license\. Found title, version"):
        rendered(citation=CFF.replace("license: MIT", ""))
