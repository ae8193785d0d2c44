"""How a notebook begins: its parameters and services checked, one thread, the figures' style, its folder of results."""

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optuna
import torch

from sgsc_study.cache import ROOT
from sgsc_study.parameters import declarations, parameter_problems
from sgsc_study.results import results_folder
from sgsc_study.search import open_database
from sgsc_study.workers import on_workers


def begin(notebook: dict[str, Any]) -> Path | None:
    """Check the parameters of a notebook, given as its `globals()`, where papermill or a reader may have set them.

    Every parameter declared in its parameters cell (`name: type = default  # help`) must have its declared type and the
    bounds that its help says; a name that was injected but is not declared is refused; one ValueError tells all that is
    wrong. A `storage` or `scheduler` that is given must answer. Returns the folder at the parameter `results`, made if
    need be (None without it). Sets torch to one thread, as more would add up in another order, and the report's style
    of figures on matplotlib's defaults, whatever a user's own are.

    >>> begin({"In": ["epochs: int = 50  # length of a run, at least 2"], "epochs": 1})
    Traceback (most recent call last):
    ValueError: `epochs` should be ≥ 2. Found 1.
    """
    ran = notebook.get("In", [])
    declared: dict[str, tuple[str, str]] = {}  # by the parameters' cell as it was run last
    for found in filter(None, map(declarations, ran)):
        declared = found if not declared or declared.keys() & found.keys() else declared
    values = {name: notebook[name] for name in declared}
    for cell in ran:
        if cell.startswith("# Parameters\n"):  # papermill's, which a notebook opened in Jupyter does not have
            values |= {name: notebook[name] for name in re.findall(r"^(\w+) = ", cell, re.MULTILINE)}
    if problems := parameter_problems(declared, values):
        raise ValueError("\n".join(problems))
    notebook.update(values)
    if values.get("storage"):
        open_database(values["storage"])
    if values.get("scheduler"):
        with on_workers(values["scheduler"], 1, 1):
            pass
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plt.style.use(["default", ROOT / "report" / "sgsc.mplstyle"])
    return results_folder(values["results"]) if "results" in values else None
