"""The notebooks as a reader meets them: in JupyterLab, in a real browser, with live controls and by keyboard. Slow."""

import os
import re
import secrets
import shutil
import subprocess
import sys

import nbformat
import page as report
import pytest
from bs4 import BeautifulSoup, Comment
from conftest import ROOT, wait_for, write_notebook
from corpus import CORPUS, REFUSED

pytestmark = pytest.mark.slow
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port of this machine alone: a function from a notebook's name to its address."""
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copytree(ROOT / "notebooks", home / "notebooks")  # copies: JupyterLab saves what it shows
    write_notebook(home / "notebooks/corpus.ipynb", "# Corpus", *CORPUS)
    tracker = home / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # all cells are drawn, in view or not
    own = {"JUPYTER_CONFIG_DIR": f"{home}/config", "JUPYTER_DATA_DIR": f"{home}/data", "IPYTHONDIR": f"{home}/ipython"}
    own["JUPYTERLAB_SETTINGS_DIR"] = f"{home}/settings"
    options = f"""--no-browser --ip=127.0.0.1 --port=0 --allow-root --ServerApp.root_dir={home} --LabApp.news_url=None
        --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"""
    command, log = [sys.executable, "-m", "jupyterlab", *options.split()], home / "log"
    with log.open("w") as lines:
        environment = os.environ | own | {"JUPYTER_TOKEN": token}
        server = subprocess.Popen(command, env=environment, stdout=lines, stderr=subprocess.STDOUT)
    try:
        assert wait_for(lambda: "/lab?token=" in log.read_text() or server.poll() is not None, 90)
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/lab", log.read_text())
        yield lambda name: f"{address}/tree/notebooks/{name}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture
def open_notebook(lab, browser):
    """Open a notebook in JupyterLab; the page's own errors are kept on `.errors`."""
    with browser.new_context(viewport={"width": 1440, "height": 1000}, reduced_motion="reduce") as context:

        def open_it(name):
            page = context.new_page()
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.goto(lab(name))
            page.locator(".jp-Notebook .jp-Cell h1").first.wait_for(timeout=90_000)
            return page

        yield open_it


def test_every_notebook_opens(open_notebook):
    page = open_notebook(NOTEBOOKS[0])
    for name in NOTEBOOKS:
        first = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells[0].source.splitlines()[0]
        page.get_by_role("listitem", name=re.compile(f"Name: {name}")).dblclick()
        shown = page.locator(".jp-NotebookPanel:visible")
        shown.get_by_role("heading", name=first.removeprefix("# ")).wait_for(timeout=60_000)
        assert page.locator(".jp-Dialog").count() == 0, name
    assert page.errors == []


def test_the_playground_answers_to_the_keyboard(open_notebook):
    page = open_notebook("playground.ipynb")
    status, pictures = page.get_by_role("status"), page.locator(".jp-OutputArea img[alt]")

    def drawn(shown: str) -> list[str]:
        status.filter(has_text=re.compile(f"^Shown: .*{shown}")).wait_for(timeout=90_000)
        assert all(pictures.nth(k).get_attribute("alt").strip() for k in range(pictures.count()))
        return [pictures.nth(k).get_attribute("src") for k in range(pictures.count())]

    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu").get_by_text("Run All Cells", exact=True).click()
    first = drawn("γ 0.05 before Adam")
    page.locator(".widget-slider").filter(has_text="γ").get_by_role("slider").focus()
    for _ in range(15):  # faster than anything trains: the settings passed through are given up, not queued
        page.keyboard.press("ArrowRight")
    second = drawn("γ 0.8 before Adam")
    assert len(first) == len(second) == 3 and not set(first) & set(second)

    page.get_by_role("button", name="Pin this setting").click()
    page.get_by_role("cell", name="pin 1: γ 0.8 before Adam").first.wait_for(timeout=60_000)
    page.get_by_label("gate").select_option("after Adam")
    drawn("γ 0.8 after Adam")
    assert page.get_by_role("row").filter(has_text="test accuracy").count() == 2  # this setting and the pinned one
    page.set_viewport_size({"width": 760, "height": 900})
    boxes, panel = [pictures.nth(k).bounding_box() for k in range(3)], page.locator(".jp-NotebookPanel").bounding_box()
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one below the other, and none cut off
    assert all(box["x"] + box["width"] <= panel["x"] + panel["width"] for box in boxes)
    for kind in ("error", "stderr"):
        assert page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").count() == 0
    assert page.errors == []


ALIKE = {"“": '"', "”": '"', "‘": "'", "’": "'", "′": "'", "–": "-", "—": "-", "−": "-", "…": ".", "∗": "*"}
UNSEEN = dict.fromkeys("\u00a0\u2061\u2062")  # between the parts of a formula, or a blank


def shown_text(html: str) -> str:
    """The letters of rendered Markdown, formulas included, without blanks and the signs that one of two may keep.

    These are dollars and tildes: `costs $5 and $6` is a formula in JupyterLab, and `H~2~O` has a struck 2.
    """
    soup = BeautifulSoup(html, "html.parser")
    unread = "script, style, .jp-InternalAnchorLink, annotation, mjx-container > :not(mjx-assistive-mml)"
    for part in soup.select(unread):
        part.decompose()
    for comment in soup.find_all(string=lambda text: isinstance(text, Comment)):
        comment.extract()
    for image in soup.select("img[alt]"):
        image.replace_with(image["alt"])
    text = soup.get_text().translate(str.maketrans(ALIKE | UNSEEN))
    return re.sub(r"([-.])\1+", r"\1", re.sub(r"[\s$~]", "", text))


def test_the_page_shows_the_text_that_jupyterlab_shows_of_markdown(open_notebook):
    page = open_notebook("corpus.ipynb")
    outputs = page.locator(".jp-Notebook .jp-MarkdownOutput")
    outputs.nth(len(CORPUS)).locator("mjx-assistive-mml").first.wait_for(state="attached", timeout=60_000)
    rendered = [outputs.nth(k).inner_html() for k in range(1, len(CORPUS) + 1)]
    differ = [(source, ours, theirs) for source, html in zip(CORPUS, rendered, strict=True)
              if (ours := shown_text(report.markdown({}, source))) != (theirs := shown_text(html))]  # fmt: skip
    assert differ == [] and len(CORPUS) > 100
    for source, name in REFUSED.items():
        with pytest.raises(report.BuildError, match=re.escape(name)):
            report.markdown({}, source)
