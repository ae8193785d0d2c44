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
    """Check a notebook's parameters, given as its `globals()`; return the folder `results`, made if need be, or None.

    Each parameter must have the type and the bounds that its parameters cell declares, and each name that papermill
    injected must be declared; one ValueError tells all that is wrong. A `storage` or `scheduler` must answer. Sets
    torch to one thread, as more add up in another order, and the report's style of figures.

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
