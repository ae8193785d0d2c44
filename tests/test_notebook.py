"""`begin`: what a notebook's first cell checks and sets."""

import matplotlib.pyplot as plt
import optuna
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


@pytest.fixture(autouse=True)
def settings():
    """What `begin` sets is as before after each test."""
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    with plt.rc_context():
        yield
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(verbosity)


def notebook(tmp_path, injected: str = "", **edited) -> dict:
    """The globals of a notebook that ran its parameters cell, and papermill's below it."""
    cells = ["", "import math", CELL] + ["# Parameters\n" + injected] * bool(injected)
    names: dict = {}
    exec("\n".join(cells), names)
    return names | {"In": [*cells, "begin(globals())"], "results": str(tmp_path / "made"), **edited}


def test_a_notebook_begins_with_its_folder_one_thread_and_numbers_of_their_types(tmp_path):
    torch.set_num_threads(2)
    names = notebook(tmp_path, 'lr = "1e-3"\n')
    assert begin(names) == tmp_path / "made" and (tmp_path / "made").is_dir()
    assert names["lr"] == 0.001 and type(names["lr"]) is float and names["epochs"] == 50
    assert torch.get_num_threads() == 1 and torch.get_default_dtype() == torch.float32
    assert begin({"In": ["x = 1"]}) is None


@pytest.mark.parametrize(
    ("injected", "name"),
    [
        ("epoch = 5", "epoch"),
        ("epochs = 3", "epochs"),
        ("epochs = 4.0", "epochs"),
        ("samples = 15", "samples"),
        ("lr = -0.1", "lr"),
        ("lr = 'fast'", "lr"),
        ("widths = []", "widths"),
        ("results = ''", "results"),
        ("storage = 'here'", "storage"),
        ("scheduler = 'here'", "scheduler"),
    ],
)
def test_a_bad_parameter_is_refused_by_name_and_makes_nothing(tmp_path, injected, name):
    names = notebook(tmp_path, injected)
    names |= {"results": ""} if name == "results" else {}
    with pytest.raises(ValueError, match=f"`{name}`"):
        begin(names)
    assert not (tmp_path / "made").exists()


def test_an_edited_cell_counts_as_well_and_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ValueError) as refused:
        begin(notebook(tmp_path, "epoch = 5", epochs=3, lr=float("nan")))
    assert [line.split("`")[1] for line in str(refused.value).splitlines()] == ["epochs", "lr", "epoch"]


def test_a_database_that_opens_is_accepted(tmp_path):
    names = notebook(tmp_path, f"storage = 'sqlite:///{tmp_path / 'trials.db'}'")
    assert begin(names) == tmp_path / "made"


def test_a_users_own_style_of_figures_does_not_matter(tmp_path):
    def style() -> dict:
        begin(notebook(tmp_path))
        return {name: value for name, value in plt.rcParams.items() if not name.startswith(("backend", "interactive"))}

    first = style()
    plt.style.use("dark_background")
    plt.rcParams |= {"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "none", "axes.grid": True}
    assert style() == first
