"""Shared by the tests: toy notebooks and their build, copies of the repository, the smoke page, a browser."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "report"))  # report/build.py is a script, not an installed module
importlib.import_module("instructions")  # before NumPy
MARK = "SGSC_TEST"  # an environment variable by which a test finds the processes that it set off


@pytest.fixture(autouse=True)
def settings():
    """What a test sets of torch and of matplotlib is as before after it."""
    import matplotlib.pyplot as plt
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with plt.rc_context():
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What builds the smoke profile or starts a browser is slow, marked or not."""
    for item in items:
        if {"smoke", "browser"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """A code cell; each output is a mime bundle, such as {"text/html": "..."}."""
    made = [nbformat.v4.new_output("display_data", data) for data in outputs]
    return nbformat.v4.new_code_cell(source, outputs=made, metadata={"tags": list(tags)})


def parameters(source: str) -> nbformat.NotebookNode:
    return code(source, tags=("parameters",))


def write_notebook(path: Path, *cells: str | nbformat.NotebookNode) -> Path:
    """Write a Python notebook; a str is a Markdown cell."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.cells = [nbformat.v4.new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def write_profile(root: Path, text: str | bytes, name: str = "toy") -> None:
    (root / "report/profiles").mkdir(parents=True, exist_ok=True)
    (root / f"report/profiles/{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def damaged(whole: bytes, flips: int) -> Iterator[bytes]:
    """A file damaged in one way after another: emptied, cut anywhere, a bit flipped anywhere."""
    at = random.Random(0)
    yield from (b"", whole[: at.randrange(1, len(whole))])
    for _ in range(flips):
        byte = at.randrange(len(whole))
        yield whole[:byte] + bytes([whole[byte] ^ 1 << at.randrange(8)]) + whole[byte + 1 :]


# -- a toy repository of two notebooks, built in this process ----------------------------------------------------------

SVG = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
FIGURE = f'<figure id="fig-a"><img alt="A dot." src="{SVG}"><figcaption>One.</figcaption></figure>'
TABLE = '<figure id="tbl-t"><figcaption>Two.</figcaption><table><tr><td>1</td></tr></table></figure>'
CLAIM = """
claims = Path(results) / "claims.csv"
rows = {"NAME", *(claims.read_text().split() if claims.exists() else ["id"])}
_ = claims.write_text("\\n".join(sorted(rows)) + "\\n")
"""
FIRST = (
    "# First\n\n[Figure](#fig-a), [Table](#tbl-t), [Equation](#eq-1.1), [](#fig-b), [the second](#nb-02_second).",
    parameters('results: str = "."  # folder\nnote: str = ""  # may be empty'),
    "## Same name\n\n$$ a < b \\tag{1.1} $$\n\nInline $\\frac{1}{2}$ costs \\$5.",
    code(f"""# draw
import filelock, sys
from pathlib import Path
from IPython.display import HTML, Markdown, display
print("on stdout & <kept>")
print("on stderr", file=sys.stderr)
6 * 7
for made in HTML({FIGURE!r}), HTML({TABLE!r}), HTML("<b>foreign</b>"), Markdown("The mean is **$0.5$**."):
    display(made)
(Path(results) / "raw.csv").write_text('name,seed\\n"a, <b> & 100 %",3\\n')
(Path(results) / "interpreter.json").write_text(f'"{{sys.executable}}"')
{CLAIM.replace("NAME", "one")}"""),
)
SECOND = (
    "# Second",
    parameters('results: str = "."'),
    "## Same name\n\nAs in [Figure](#fig-a).",
    code(f"""from pathlib import Path
from IPython.display import HTML, display
display(HTML({FIGURE.replace("fig-a", "fig-b")!r}))
{CLAIM.replace("NAME", "two")}"""),
)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A repository with the profile `toy`, built. A kernel, a module and settings of a user lay in wait."""
    root, home = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("home")
    write_notebook(root / "notebooks/01_first.ipynb", *FIRST)
    write_notebook(root / "notebooks/02_second.ipynb", *SECOND)
    write_profile(root, "01_first: {note: </code><script>}\n02_second:\n")
    decoy = json.dumps({"argv": ["false"], "display_name": "decoy", "language": "python"})
    settings = 'c.InteractiveShell.ast_node_interactivity = "all"'
    for path, text in {
        home / "kernels/python3/kernel.json": decoy,
        home / ".ipython/profile_default/ipython_config.py": settings,
        root / "report/results/toy/stale.csv": "old",
        root / "filelock.py": "raise SystemExit('not the one that is installed')",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in {"JUPYTER_PATH": "", "HOME": "", "IPYTHONDIR": ".ipython"}.items():
            patch.setenv(name, str(home / folder))
        assert importlib.import_module("build").main(["--profile", "toy"], root) == 0
    return root


@pytest.fixture
def toy(built, tmp_path) -> Path:
    """A copy of the built toy repository."""
    return shutil.copytree(built, tmp_path / "toy")


# -- copies of this repository, built by the command line --------------------------------------------------------------


def copy_repository(to: Path) -> Path:
    """Copy all that a build needs, without results, pages and the cache."""
    ignored = shutil.ignore_patterns("results", "executed", "sgsc*.html", "__pycache__", ".*")
    for folder in ("report", "sgsc_core", "sgsc_study", "notebooks"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignored)
    for name in ("sgsc_lib.py", "CITATION.cff"):
        shutil.copy(ROOT / name, to)
    return to


def environment(root: Path) -> dict[str, str]:
    """This process's environment, with the modules of `root` in place of this repository's."""
    own = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", MARK: root}
    return {k: v for k, v in os.environ.items() if k != "SGSC_CACHE"} | {k: str(v) for k, v in own.items()}


def start_build(root: Path, profile: str) -> subprocess.Popen:
    command = [sys.executable, root / "report/build.py", "--profile", profile]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    return subprocess.Popen(command, cwd=root, env=environment(root), preexec_fn=heed, **pipes)


def run_build(root: Path, profile: str) -> dict[str, bytes]:
    """Build a profile, which should succeed; returns its tables."""
    process = start_build(root, profile)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]
    return {path.name: path.read_bytes() for path in (root / "report/results" / profile).glob("*.csv")}


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A copy of the repository with the smoke profile, built from an empty cache, and its tables."""
    root = copy_repository(tmp_path_factory.mktemp("smoke"))
    return root, run_build(root, "smoke")


@pytest.fixture(scope="session")
def browser():
    """Chromium: the one in the environment variable CHROMIUM, or the one on the PATH. None there is a failure."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "The page's tests need Chromium: install Debian's `chromium`, or name a browser in CHROMIUM."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
