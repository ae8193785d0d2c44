"""A bank: a grid of cells, each trained on seeds of its own, every run kept; and what it says is best.

It tunes by measuring the surface, not by drawing a search: the winner of a short search is a random variable, whose
spread no number of evaluation seeds removes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sgsc_lib import check
from sgsc_study.data import Dataset
from sgsc_study.measures import in_halves, verdict_of
from sgsc_study.runs import Run
from sgsc_study.training import train

# The arms whose cells make an arm's grid: SGSC with γ = 0 is Adam, so Adam's cells are in all of them.
GRIDS = {"Adam": ["Adam"], "SGSC before": ["Adam", "SGSC before"], "SGSC after": ["Adam", "SGSC after"]}
CELL = [field.name for field in fields(Run) if field.name != "seed"]  # a cell is a Run without its seed
# How far below its arm's leader a cell's mean validation accuracy may be after each round, to run the next: 4 points
# after the first round (1 or 2 seeds), 1.5 after the second (4 or 8), 0.75 after a third (12). Over as many seeds, the
# paired difference of two good cells has a standard error of 1.7, 0.85 and 0.5 points (1.2, 0.6).
MARGINS = (0.04, 0.015, 0.0075)
N_DRAWS = 10_000  # of seeds, in a bootstrap


def race(
    arms: Mapping[str, Sequence[Run]],
    data: Dataset,
    *,
    rounds: Sequence[int] = (2, 8, 24),
    first_seed: int = 10_000,
    known: pd.DataFrame | None = None,
    progress: str | None = None,
    **settings: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train every arm's cells in rounds, on more and more seeds, in later rounds only those that could still be best.

    A cell is given as a `Run`, whose own seed is not used; all have `first_seed`, `first_seed` + 1, … in common. A cell
    that has had a round's number of seeds goes to the next round, of four at most, if its mean validation accuracy is
    within the round's margin (`MARGINS`) of that of the best cell of an arm that has it. Arms may share cells, as SGSC
    with γ = 0 is Adam. `known` are rows of an earlier race of the same arms, whose cells are rivals too. `settings` go
    to `train`. Returns two tables: `Curves.final` of all runs, with the column `arm` in front, the first arm that has
    the cell; and `Curves.frame`. Raises ValueError for rounds that do not grow and for data without validation rows.

    >>> from sgsc_study import load_mnist1d
    >>> small = {"epochs": 4, "widths": (40, 10), "n_jobs": 1, "rounds": [2, 4]}
    >>> bank, _ = race({"Adam": [Run(0, lr) for lr in (1e-5, 0.1)]}, load_mnist1d(500), **small)
    >>> bank.groupby("lr").size().tolist()
    [2, 4]
    """
    if not len(data.x_valid):
        raise ValueError("`data` should have validation rows, on which cells are judged. Found none.")
    counts = [0, *(check("rounds", n, int, low=1) for n in rounds)]
    if counts != sorted(set(counts)) or len(rounds) > len(MARGINS) + 1:
        raise ValueError(f"`rounds` should be at most {len(MARGINS) + 1} growing numbers of seeds. Found {rounds}.")
    pools = {arm: [replace(cell, seed=0) for cell in cells] for arm, cells in arms.items()}
    arm_of = {cell: arm for arm, pool in reversed(pools.items()) for cell in pool}
    running, done, bank = list(dict.fromkeys(cell for pool in pools.values() for cell in pool)), 0, pd.DataFrame()
    by_epoch = []
    for n_seeds, margin in zip(rounds, (*MARGINS, 0.0), strict=False):
        runs = [replace(cell, seed=first_seed + k) for cell in running for k in range(done, n_seeds)]
        label = progress and f"{progress}, {len(running)} cells to {n_seeds} seeds"
        curves = train(runs, data, progress=label, **settings)
        by_epoch.append(curves.frame())
        found = curves.final()
        found.insert(0, "arm", [arm_of[replace(run, seed=0)] for run in runs])
        bank = pd.concat([bank, found], ignore_index=True)
        means = {Run(0, *cell): mean for cell, mean in bank.groupby(CELL)["valid_accuracy"].mean().items()}
        alive = {arm: [cell for cell in pool if cell in running] for arm, pool in pools.items()}
        best = {arm: max([*(means[cell] for cell in cells), _best_of(known, arm, first_seed, n_seeds)])
                for arm, cells in alive.items()}  # fmt: skip
        kept = {cell for arm, cells in alive.items() for cell in cells if means[cell] >= best[arm] - margin}
        running, done = [cell for cell in running if cell in kept], n_seeds
        if not running:  # known cells are better
            break
    return bank, pd.concat(by_epoch, ignore_index=True)


def _best_of(known: pd.DataFrame | None, arm: str, first_seed: int, n_seeds: int) -> float:
    """The best mean over these seeds of an arm's cells in a bank; 0 where there is none."""
    if known is None:
        return 0.0
    valid = by_cell(known[known["seed"].between(first_seed, first_seed + n_seeds - 1)], [arm])
    return valid.mean(axis=1).max() if valid.shape[1] == n_seeds else 0.0


def grown(
    bank: pd.DataFrame,
    arms: Mapping[str, Sequence[str]],
    train_more: Callable[[dict[str, list[Run]], pd.DataFrame], pd.DataFrame],
    ratio: float = 1.6,
) -> pd.DataFrame:
    """A bank with more cells, beyond an end of a grid, until no arm's best cell has its last learning rate or decay.

    `arms` as in `border_hits`. `train_more` trains cells, given as for `race`, beside the bank so far, and returns the
    rows of their runs. Two rates are added at a time, each `ratio` times the one before, or a fraction of it; of weight
    decays the next one, for all rates of the last. A grid of one rate or decay stays.

    >>> def more(cells, _known=None):
    ...     rows = [{"arm": arm, **vars(run)} for arm, runs in cells.items() for run in runs]
    ...     return pd.DataFrame(rows).assign(valid_accuracy=lambda bank: 1 - (bank["lr"] - 0.4).abs())
    >>> sorted(grown(more({"Adam": [Run(0, 0.1), Run(0, 0.16)]}), {"Adam": ["Adam"]}, more)["lr"])
    [0.1, 0.16, 0.26, 0.41, 0.66, 1.0]
    """
    while True:
        cells: dict[str, list[Run]] = {}
        for parts in arms.values():
            best = Run(0, *best_cell(by_cell(bank, parts)))
            same = pd.Series(vars(best)).drop(["seed", "lr", "weight_decay"])
            plane = bank[bank["arm"].isin(parts) & (bank[same.index] == same).all(axis=1)].set_index("weight_decay")
            row = plane.loc[[best.weight_decay]]
            rates, decays = sorted(set(row["lr"])), sorted(set(plane.index))
            found = [replace(best, lr=lr) for lr in _beyond(best.lr, rates, 2, ratio)]
            found += [replace(best, lr=lr, weight_decay=decay)
                      for decay in _beyond(best.weight_decay, decays, 1) for lr in rates]  # fmt: skip
            if found:
                cells.setdefault(row.loc[row["lr"] == best.lr, "arm"].iloc[0], []).extend(found)
        if not cells:
            return bank
        bank = pd.concat([bank, train_more({arm: [*dict.fromkeys(own)] for arm, own in cells.items()}, bank)])


def _beyond(value: float, grid: list[float], n: int, ratio: float | None = None) -> list[float]:
    """The next n values of a rising grid, to two digits, beyond that end of it which `value` is; below 0 are none.

    They go on by `ratio`; left out, by that of the grid's last two, or by 4 where the last but one is 0.
    """
    if not (end := _end(value, grid)):
        return []
    ratio = ratio or grid[-1] / (grid[-2] or grid[-1] / 4)
    by = ratio if end == "highest" else 1 / ratio
    return [float(f"{value * by**k:.2g}") for k in range(1, n + 1)]


def _end(value: float, grid: Iterable[float]) -> str:
    """Which end of a grid a value is: lowest, highest or none. A single value has no ends, and 0 has nothing below."""
    low, high = min(grid), max(grid)
    return "" if low == high or value == 0 else {low: "lowest", high: "highest"}.get(value, "")


def by_cell(runs: pd.DataFrame, arms: Sequence[str] = (), column: str = "valid_accuracy") -> pd.DataFrame:
    """A column of runs as [cells, seeds], of these arms (none: of all): the cells that have all of the seeds.

    The index of a cell is a `Run`'s fields after the seed, so that `Run(seed, *index)` is a run of it.

    >>> bank = pd.DataFrame([{"arm": "Adam", **vars(Run(s, 0.01)), "valid_accuracy": 0.6 + s / 10} for s in (0, 1)])
    >>> by_cell(bank, ["Adam"]).to_numpy().tolist()
    [[0.6, 0.7]]
    """
    part = runs[runs["arm"].isin(arms)] if len(arms) else runs
    return part.drop_duplicates([*CELL, "seed"]).pivot(index=CELL, columns="seed", values=column).dropna()


def best_cell(valid: pd.DataFrame) -> tuple:
    """The cell of [cells, seeds] with the best mean: an arm's tuned value.

    >>> best_cell(pd.DataFrame([[0.6, 0.7], [0.8, 0.6]], index=["one", "other"]))
    'other'
    """
    return valid.mean(axis=1).idxmax()


def rechosen(valid: pd.DataFrame, n_draws: int = N_DRAWS) -> np.ndarray:
    """Which cell of [cells, seeds] is best where the seeds are drawn anew, with replacement: row numbers [n_draws].

    The same seeds are drawn for every table of as many seeds, as arms have their tuning seeds in common.

    >>> sorted(set(rechosen(pd.DataFrame([[0.6, 0.6], [0.5, 0.8]]), n_draws=100).tolist()))
    [0, 1]
    """
    n_seeds = valid.shape[1]
    counts = np.random.default_rng(0).multinomial(n_seeds, [1 / n_seeds] * n_seeds, n_draws)  # [n_draws, seeds]
    return (valid.to_numpy() @ counts.T).argmax(0)


# A hyperparameter's border is that of the cells which agree with the best one in these others.
AXES = {"lr": ["gamma", "weight_decay", "label_smoothing"], "gamma": [], "weight_decay": ["gamma"],
        "label_smoothing": []}  # fmt: skip


def border_hits(bank: pd.DataFrame, arms: Mapping[str, Sequence[str]]) -> list[str]:
    """Where the best cell of an arm (whose grid is made of these arms' cells) lies at the border of its grid.

    At 0 there is no border, as below it there is nothing.

    >>> bank = pd.DataFrame([{"arm": "Adam", **vars(Run(0, lr)), "valid_accuracy": lr} for lr in (0.1, 0.2)])
    >>> border_hits(bank, {"Adam": ["Adam"]})
    ["Adam's best lr, 0.2, is the highest of its grid."]
    """
    hits = []
    for arm, parts in arms.items():
        best = Run(0, *best_cell(by_cell(bank, parts)))
        own = bank[bank["arm"].isin(parts) & ((bank["placement"] == best.placement) | (bank["gamma"] == 0))]
        for name, others in AXES.items():
            grid = own.loc[(own[others] == [getattr(best, other) for other in others]).all(axis=1), name]
            value = getattr(best, name)
            if end := _end(value, grid):
                hits.append(f"{arm}'s best {name}, {value:g}, is the {end} of its grid.")
    return hits


def tuned_cells(valid: Mapping[str, pd.DataFrame], least: float = 0.05) -> pd.DataFrame:
    """The tuned value of each arm, from its validation accuracies as `by_cell` gives them: {arm: [cells, seeds]}.

    One row a cell, the arm's best first; after it the cells that either half of the seeds, or a share of at least
    `least` of other draws of them, would choose. `chosen` is that share, `se` the standard error of `valid_accuracy`.

    >>> bank = pd.DataFrame([{"arm": "Adam", **vars(Run(s, 0.1)), "valid_accuracy": s / 2} for s in (0, 1)])
    >>> tuned_cells({"Adam": by_cell(bank)})[["arm", "lr", "chosen", "valid_accuracy"]].values.tolist()
    [['Adam', 0.1, 1.0, 0.25]]
    """
    rows = []
    for arm, cells in valid.items():
        index = cells.index.to_frame(index=False)
        share = np.bincount(rechosen(cells), minlength=len(cells)) / N_DRAWS
        bests = in_halves(lambda part: int(part.mean(axis=1).argmax()), cells)
        for row in dict.fromkeys([*bests, *np.argsort(-share)[: (share >= least).sum()]]):
            scores = {"valid_accuracy": cells.iloc[row].mean(), "se": cells.iloc[row].sem()}
            rows.append({"arm": arm, **index.iloc[row], "chosen": share[row], **scores})
    return pd.DataFrame(rows)


class TunedComparison(NamedTuple):
    """What `compare_tuned` found about a − b.

    >>> TunedComparison(64, 0.01, 0.002, 0.02, 0.003, 0.018, 0.01, "better").verdict
    'better'
    """

    n: int  # evaluation seeds
    mean_difference: float  # of the cells that all of the bank's seeds choose
    ci_low: float  # 95 % bootstrap interval, over evaluation seeds and the choice of both cells
    ci_high: float
    ci90_low: float
    ci90_high: float
    p: float
    verdict: str


def compare_tuned(
    valid_a: pd.DataFrame, valid_b: pd.DataFrame, a: pd.DataFrame, b: pd.DataFrame, *, margin: float
) -> TunedComparison:
    """Compare two tuned arms by values (more is better) on seeds that are not the bank's, [cells, evaluation seeds].

    `valid_a` and `valid_b` are the bank's validation accuracies of the same cells, [cells, bank seeds], which choose.
    In each of 10,000 draws both the bank's seeds and the evaluation's are drawn anew (the same for both arms), each
    arm's cell is chosen again, and the mean paired difference of the chosen cells is taken: the percentiles of these
    are the intervals, and `p` is twice the smaller share on one side of 0. The verdict is `compare_paired`'s rule.

    >>> cells = pd.DataFrame([[0.6, 0.7, 0.65]])
    >>> compare_tuned(cells, cells, cells + 0.1, cells, margin=0.01).verdict
    'better'
    """
    n = a.shape[1]
    counts = np.random.default_rng(1).multinomial(n, [1 / n] * n, N_DRAWS)  # [draws, n]
    drawn, rows = [], np.arange(len(counts))
    for valid, values in ((valid_a, a), (valid_b, b)):
        means = values.to_numpy() @ counts.T / n  # [cells, draws]
        drawn.append(means[rechosen(valid, len(counts)), rows])
    difference = drawn[0] - drawn[1]
    low, low90, high90, high = np.quantile(difference, [0.025, 0.05, 0.95, 0.975])
    p = min(1.0, 2 * min((difference <= 0).mean(), (difference >= 0).mean()))
    mean = a.loc[best_cell(valid_a)].mean() - b.loc[best_cell(valid_b)].mean()
    return TunedComparison(n, mean, low, high, low90, high90, p, verdict_of((low, high), (low90, high90), margin))


def tuned_against(
    valid_a: pd.DataFrame, valid_b: pd.DataFrame, evaluated: pd.DataFrame, *, margin: float
) -> list[TunedComparison]:
    """`compare_tuned` of two arms of a bank on all seeds and on both halves, of the bank's and of the evaluation's.

    `evaluated` [cells, evaluation seeds] holds cells of both arms; those that were not evaluated are not chosen.

    >>> cells = pd.DataFrame([[0.6, 0.7, 0.65, 0.7]])
    >>> [found.verdict for found in tuned_against(cells, cells, cells, margin=0.01)]
    ['equivalent', 'equivalent', 'equivalent']
    """
    valid = [each[each.index.isin(evaluated.index)] for each in (valid_a, valid_b)]
    values = [evaluated.loc[each.index] for each in valid]
    return in_halves(compare_tuned, *valid, *values, margin=margin)
