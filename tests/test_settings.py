"""A build under settings of a user's own: the same page and the same results. Slow."""

import os
import shutil

import pytest
from bs4 import BeautifulSoup
from conftest import run_build
from test_survival import TRAIN, training_repository

pytestmark = pytest.mark.slow
SHOWN = """
import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from sgsc_study import figure
train([Run(0, 0.01, 0.25)] * 4, data, epochs=1, stack_size=2, n_jobs=2, progress="γ")
print("γ", torch.ones(2) / 3, torch.ones(1).dtype, np.ones(2) / 3, pd.Series([1 / 3] * 99))
fig, ax = plt.subplots()
ax.plot([0, 1], [1000.5, 2000.5])
figure(fig, "line", caption="A line.", alt="A line.")
folder.name
runs[:1]"""
STARTUP = """import matplotlib, numpy, pandas, torch
torch.set_default_dtype(torch.float64)
torch.set_printoptions(precision=2)
numpy.set_printoptions(precision=2)
pandas.set_option("display.max_rows", 5)
matplotlib.rcParams["lines.linewidth"] = 9
print("hello")"""
IPYTHON = 'c.InteractiveShell.ast_node_interactivity = "all"\nc.InlineBackend.figure_formats = {"png"}'
CLEAR = '{"preprocessors": {"1": {"type": "nbconvert.preprocessors.ClearOutputPreprocessor", "enabled": true}}}'
KERNEL = '{"argv": ["false"], "display_name": "decoy", "language": "python"}'
SETTINGS = {  # below the home
    "bin/pandoc": "#!/bin/sh\necho pandoc 99.9",
    ".ipython/profile_default/ipython_config.py": IPYTHON,
    ".ipython/profile_default/startup/00.py": STARTUP,
    "startup.py": STARTUP,
    ".config/matplotlib/matplotlibrc": "figure.figsize: 2, 2\nfont.size: 20\naxes.formatter.use_locale: True\nnonsense",
    ".jupyter/jupyter_config.py": "c.TemplateExporter.exclude_input = True\nc.KernelManager.transport = 'ipc'",
    ".jupyter/jupyter_nbconvert_config.py": "c.TemplateExporter.exclude_input = True",
    ".local/share/jupyter/kernels/python3/kernel.json": KERNEL,
    ".local/share/jupyter/nbconvert/templates/base/conf.json": CLEAR,
    ".local/share/jupyter/nbconvert/templates/base/display_priority.j2": "nothing",
}
VARIABLES = {
    "PYTHONOPTIMIZE": "2", "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "pdf",
    "LC_ALL": "de_DE.ISO-8859-1", "LANGUAGE": "de", "COLUMNS": "20", "TZ": "Asia/Tokyo",
    "JUPYTER_PREFER_ENV_PATH": "0", "PYTHONHASHSEED": "7", "JOBLIB_START_METHOD": "fork",
}  # fmt: skip
FOLDERS = {
    "HOME": "", "PYPANDOC_PANDOC": "bin/pandoc", "PYTHONSTARTUP": "startup.py", "IPYTHONDIR": ".ipython",
    "JUPYTER_CONFIG_DIR": ".jupyter", "JUPYTER_DATA_DIR": ".local/share/jupyter", "MATPLOTLIBRC": ".config/matplotlib",
}  # fmt: skip


def test_page_and_results_are_the_same_whatever_the_user_has_set(tmp_path, monkeypatch):
    """In a folder with a blank, a quote and letters that are not ASCII; the home may be read only."""

    def timeless() -> str:
        page = BeautifulSoup((root / "report/sgsc-toy.html").read_text(encoding="utf-8"), "html.parser")
        for part in page.select("#made, .byline, a[download='manifest.json']"):
            part.decompose()
        return str(page)

    root, home = training_repository(tmp_path / "Fred's tüte γ", TRAIN + SHOWN), tmp_path / "home"
    tables, page = run_build(root, "toy"), timeless()
    assert len(tables) == 5 and "torch.float32" in page and "hello" not in page and page.count("A line.") >= 2
    shutil.rmtree(root / ".cache")
    for path, text in SETTINGS.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text)
    (home / "bin/pandoc").chmod(0o755)
    for folder in [home, *(path for path in home.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    for name, value in (VARIABLES | {name: str(home / folder) for name, folder in FOLDERS.items()}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{home}/bin", prepend=os.pathsep)
    assert run_build(root, "toy") == tables and timeless() == page
