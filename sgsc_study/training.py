"""Train many runs in stacks, on all cores or a cluster, from the cache where it holds them."""

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgsc_lib import check
from sgsc_study.cache import function_version
from sgsc_study.curves import Curves
from sgsc_study.data import Dataset, sha256_of
from sgsc_study.engine import train_stack
from sgsc_study.gates import GATES, check_gate
from sgsc_study.runs import HALVES, Run
from sgsc_study.workers import parallel


def train(
    runs: Iterable[Run],
    data: Dataset,
    *,
    epochs: int = 50,
    batch_size: int = 128,
    widths: Sequence[int] = (40, 128, 128, 10),
    probe_size: int = 0,
    fresh: tuple[Tensor, Tensor] | None = None,
    evaluate_every: int = 1,
    stack_size: int | None = None,
    device: str = os.environ.get("SGSC_DEVICE", "cpu"),
    n_jobs: int = -1,
    scheduler: str = "",
    cache: str | os.PathLike | None = None,
    progress: str | None = None,
) -> Curves:
    """Train multi-layer perceptrons with Adam and SGSC, many runs at once; return their `Curves` in order of `runs`.

    >>> from sgsc_study.data import load_mnist1d
    >>> runs = [Run(seed, lr=0.01, gamma=gamma) for seed in (0, 1) for gamma in (0.0, 0.25)]
    >>> curves = train(runs, load_mnist1d(500), epochs=2, widths=(40, 8, 10), n_jobs=1)
    >>> curves.test_accuracy.shape, len(curves.frame())
    ((4, 2), 8)

    Up to `stack_size` runs are stacked on a leading axis and trained together on one thread (left out: 8, which stay in
    a processor's cache, or 256 on another `device`, such as "cuda"), stacks in parallel on `n_jobs` processes (-1: one
    a core, or 1 on another device), or on the workers of the Dask cluster whose `scheduler` has this address
    ("tcp://host:port"; they need this project installed). Run r gives the same numbers, bit for bit, alone and in any
    stack: it has own generators for its initial weights and its batches. The last batch of an epoch may be smaller, as
    with a DataLoader.

    `probe_size` > 0 also records the loss of the first `probe_size` training rows after every step. `fresh` is a sample
    (x [N, in], y [N]) on which the final models are evaluated. All rows are evaluated after each `evaluate_every`-th
    epoch, and the last. `cache` is a folder: a stack computed before by the same code on the same data is read from it
    instead. `progress` is a label under which stacks done and time left are printed to stderr. Raises TypeError or
    ValueError, naming the parameter, before any training.
    """
    runs = list(runs)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise TypeError(f"`runs` should be a non-empty list of Run. Found {runs[:3]!r}.")
    settings = check_training(data, epochs=epochs, batch_size=batch_size, widths=widths, probe_size=probe_size)
    settings["evaluate_every"] = every = min(check("evaluate_every", evaluate_every, int, low=1), epochs)
    try:
        on_cpu = torch.empty(0, device=device).device.type == "cpu"
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"`device` should be one that torch can use here. Found {device!r}: {error}") from None
    settings["device"], n_jobs = device, n_jobs if on_cpu else 1
    stack_size = check("stack_size", (8 if on_cpu else 256) if stack_size is None else stack_size, int, low=1)
    groups: dict[Any, list[int]] = {}  # a stack shares these; without a gate but the optimizer none of them matters
    for r, run in enumerate(runs):
        kind = (run.placement, run.control, run.gate) if run.gamma else None
        groups.setdefault((run.optimizer, kind), []).append(r)
    if any(run.control in HALVES for run in runs) and min(batch_size, (len(data.x_train) - 1) % batch_size + 1) < 2:
        raise ValueError(f"`batch_size` should leave 2 samples a batch or more for halves. Found {batch_size}.")
    gates = {run.gate: GATES[run.gate] for run in runs if run.gamma and run.gate in GATES}
    for name, gate in gates.items():
        check_gate(name, gate)
    versions = {name: function_version(gate) for name, gate in gates.items()}
    stacks = [group[i : i + stack_size] for group in groups.values() for i in range(0, len(group), stack_size)]

    made_by = [sha256_of(*data), sha256_of(*fresh) if fresh else None, settings]
    tasks, keys = [], []
    for stack in stacks:
        stacked = [runs[r] for r in stack]
        name = stacked[0].gate if stacked[0].gamma else ""
        tasks.append((stacked, data, fresh, gates.get(name), *settings.values()))
        keys.append([*made_by, versions.get(name), [asdict(run) for run in stacked]])
    label = progress and f"{progress}, stacks of up to {stack_size} runs"
    shared: dict[str, Any] = {"n_jobs": n_jobs, "scheduler": scheduler, "progress": label}
    results = parallel(train_stack, tasks, cache=cache and Path(cache) / "runs", keys=keys, **shared)
    back = np.argsort(np.concatenate(stacks))
    arrays = {name: np.concatenate([result[name] for result in results])[back] for name in results[0]}
    curves = Curves(runs, **arrays, evaluated=np.unique([*range(every, epochs + 1, every), epochs]))
    for name, gate in gates.items():
        lost = [r.gate for r, loss in zip(runs, curves.train_loss, strict=True) if not np.isfinite(loss).all()]
        if name in lost and getattr(gate, "__module__", "") != "sgsc_study.gates":  # of those it is the learning rate
            warnings.warn(
                f"The loss of {lost.count(name)} runs with the gate {name!r} is not finite: the gate makes NaN or "
                "infinity of some sums, or the learning rate is too high.",
                stacklevel=2,
            )
    return curves


def check_training(
    data: Dataset, *, epochs: int, batch_size: int, widths: Sequence[int], probe_size: int = 0
) -> dict[str, Any]:
    """Return the settings of a training run, checked against the data; TypeError or ValueError names what is wrong.

    >>> from sgsc_study.data import load_mnist1d
    >>> check_training(load_mnist1d(100), epochs=2, batch_size=16, widths=[40, 10])
    {'epochs': 2, 'batch_size': 16, 'widths': (40, 10), 'probe_size': 0}
    """
    classes = int(data.y_train.max()) + 1
    widths = tuple(int(check("widths", width, int, low=1)) for width in widths)
    if len(widths) < 2 or widths[0] != data.x_train.shape[1] or widths[-1] < classes:
        raise ValueError(
            f"`widths` should start with {data.x_train.shape[1]}, the number of features, and end with at "
            f"least {classes}, the number of classes. Found {widths}."
        )
    return {
        "epochs": check("epochs", epochs, int, low=1),
        "batch_size": check("batch_size", batch_size, int, low=1, high=len(data.x_train)),
        "widths": widths,
        "probe_size": check("probe_size", probe_size, int, low=0, high=len(data.x_train)),
    }
