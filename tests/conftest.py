"""Shared by the tests: toy notebooks, the smoke page built once a session, and a browser to read it in."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "report"))  # report/build.py is a script, not an installed module
importlib.import_module("instructions")  # before NumPy


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """A code cell; each output is a mime bundle, such as {"text/html": "..."}."""
    made = [nbformat.v4.new_output("display_data", data) for data in outputs]
    return nbformat.v4.new_code_cell(source, outputs=made, metadata={"tags": list(tags)})


def write_notebook(path: Path, *cells: str | nbformat.NotebookNode) -> Path:
    """Write a Python notebook; a str is a Markdown cell."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.cells = [nbformat.v4.new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="session")
def smoke_page() -> Path:
    """The page of the smoke profile, made by the command that the README gives."""
    command = [sys.executable, ROOT / "report" / "build.py", "--profile", "smoke"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, f"{made.stdout[-2000:]}\n{made.stderr[-8000:]}"
    return ROOT / "report" / "sgsc-smoke.html"


@pytest.fixture(scope="session")
def browser():
    """Chromium: the one in the environment variable CHROMIUM, or the one on the PATH. None there is a failure."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.fail("The page's tests need Chromium: install Debian's `chromium`, or name a browser in CHROMIUM.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
