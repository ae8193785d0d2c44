"""Searches of a bank: Optuna asks, stored runs answer, so that the luck of a search can be measured.

It stands apart from `search`, which trains, so that little code decides whether its results are still good.
"""

from collections.abc import Callable, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "TPE": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "GP": optuna.samplers.GPSampler,
}


def search_stored(
    cells: Sequence[tuple[float, float]],
    scores: Sequence[Sequence[float]],
    sampler: str,
    n_trials: int,
    n_seeds: int,
    gamma_high: float,
    seeds: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Search a bank as a tabular benchmark (Klein & Hutter, arXiv 1905.04970), once for each of `seeds`.

    `cells` are (learning rate, γ), `scores` each cell's stored validation accuracies. Optuna's `sampler` ("TPE",
    "random" or "GP") asks in the log of the learning rate, over the range that the cells have, and, unless `gamma_high`
    is 0, in γ from 0 to that. The nearest cell (of the nearest γ, that with the nearest rate) answers with the mean of
    `n_seeds` of its runs, drawn with replacement. Returns each trial's cell, int [searches, n_trials], and value.

    >>> found = search_stored([(0.01, 0.0), (0.1, 0.0)], [[0.6], [0.5]], "TPE", 10, 1, 0.0, range(3))
    >>> found[1].max(1)
    array([0.6, 0.6, 0.6])
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rates, gammas = np.array(cells).T
    space: dict[str, BaseDistribution] = {"lr": FloatDistribution(rates.min(), rates.max(), log=True)}
    space |= {"gamma": FloatDistribution(0.0, gamma_high)} if gamma_high else {}
    found = []
    for seed in seeds:
        study, draw = optuna.create_study(direction="maximize"), np.random.default_rng(seed)
        study.sampler = SAMPLERS[sampler](seed=seed)
        for _ in range(n_trials):
            trial = study.ask(space)
            away = np.abs(gammas - trial.params.get("gamma", 0.0))
            cell = int(np.where(away == away.min(), np.abs(np.log(rates / trial.params["lr"])), np.inf).argmin())
            value = float(draw.choice(scores[cell], n_seeds).mean())
            study.tell(trial, value)
            found.append((cell, value))
    trials = np.array(found).reshape(len(seeds), n_trials, 2)
    return trials[..., 0].astype(int), trials[..., 1]
