"""`begin`: what a notebook's first cell checks and sets."""

import matplotlib.pyplot as plt
import pytest
import torch

from sgsc_study import begin

CELL = """
results: str = "results"  # a folder
epochs: int = 50  # length of a run, at least 4
samples: int = 100  # at least 10, a multiple of 10
lr: float = 0.01  # the learning rate
widths: list[int] = [40, 10]  # layer widths
storage: str = ""  # URL of a database; empty: a file
scheduler: str = ""  # address; empty: this machine
"""


def notebook(folder, injected: str = "", edited: str = "") -> dict:
    """The globals of a notebook that ran its parameters cell, edited or not, and papermill's below it."""
    names: dict = {"In": ["", "import math", CELL + edited, f"# Parameters\nresults = {str(folder)!r}\n{injected}"]}
    exec("\n".join(names["In"]), names)
    return names


def test_a_notebook_begins_with_its_folder_one_thread_and_numbers_of_their_types(tmp_path):
    torch.set_num_threads(2)
    names = notebook(tmp_path / "made", f"lr = '1e-3'\nstorage = 'sqlite:///{tmp_path}/trials.db'")
    assert begin(names) == tmp_path / "made" and (tmp_path / "made").is_dir() and torch.get_num_threads() == 1
    assert type(names["lr"]) is float and names["lr"] == 0.001 and names["epochs"] == 50
    assert begin({"In": ["x = 1"]}) is None


@pytest.mark.parametrize("bad", ["epochs = 3", "lr = 'fast'", "widths = [0]", "storage = 'here'", "scheduler = 'here'"])
def test_bad_parameters_are_refused_by_name_all_at_once_and_make_nothing(tmp_path, bad):
    for how in ("injected", "edited"):
        with pytest.raises(ValueError, match=f"`{bad.split()[0]}`"):
            begin(notebook(tmp_path / "made", **{how: bad}))
    with pytest.raises(ValueError) as refused:
        begin(notebook("", "epoch = 5", "epochs = 3"))
    assert [line.split("`")[1] for line in str(refused.value).splitlines()] == ["results", "epochs", "epoch"]
    assert not (tmp_path / "made").exists()


def test_a_users_own_style_of_figures_does_not_matter(tmp_path):
    begin(notebook(tmp_path))
    first = dict(plt.rcParams)
    plt.style.use("dark_background")
    plt.rcParams |= {"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "none", "axes.grid": True}
    begin(notebook(tmp_path))
    assert dict(plt.rcParams) == first
