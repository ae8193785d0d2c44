"""Search hyperparameters with Optuna, on real training.

A search keeps no state of its own: begun again, it asks the same questions, and the cache of runs answers those that
were answered before. Its study is written down for whoever wants to look at it, and never read.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from filelock import FileLock
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from sgsc_lib import check
from sgsc_study.cache import CACHE
from sgsc_study.data import Dataset, sha256_of
from sgsc_study.runs import Run
from sgsc_study.training import train


def tune(
    arms: Mapping[str, Mapping[str, Any]],
    data: Dataset,
    *,
    study: str,
    n_trials: int = 24,
    ask_batch: int = 8,
    n_seeds: int = 1,
    first_seed: int = 10_000,
    storage: str = "",
    cache: str | os.PathLike = CACHE,
    progress: str | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Search every arm's space for the best final validation accuracy; one tidy row a trial, its `Run` fields included.

    An arm is {field of `Run`: Optuna distribution to search, or value to keep}. Each arm has a TPE study of `n_trials`
    trials; a trial's value is a mean over `n_seeds` seeds. All studies advance together, `ask_batch` trials at a time.
    `settings` go to `train`. Returns the columns `arm`, `trial` (0, 1, … in order), the fields, and `valid_accuracy`.

    The studies are written to a journal file in the folder `cache`, or to the database at the URL `storage`, where
    Optuna's dashboard shows them while they grow; one that was there under the same name, which ends with a hash of
    what it depends on, is replaced. Raises TypeError or ValueError for a bad setting, number or URL.

    >>> import tempfile
    >>> from optuna.distributions import FloatDistribution
    >>> from sgsc_study.data import load_mnist1d
    >>> arms = {"SGSC": {"lr": FloatDistribution(1e-3, 1e-1, log=True), "gamma": 0.25}}
    >>> small = {"epochs": 1, "widths": (40, 10), "n_jobs": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trials = tune(arms, load_mnist1d(500), study="example", n_trials=4, cache=folder, **small)
    >>> list(trials.columns), len(trials)
    (['arm', 'trial', 'gamma', 'lr', 'valid_accuracy'], 4)
    """
    numbers = {"n_trials": n_trials, "ask_batch": ask_batch, "n_seeds": n_seeds}
    for name, value in numbers.items():
        check(name, value, int, low=1)
    if not len(data.x_valid):
        raise ValueError("`data` should have validation rows, on which trials are judged. Found none.")
    searched = {arm: {f: d for f, d in space.items() if isinstance(d, BaseDistribution)} for arm, space in arms.items()}
    kept = {arm: {f: value for f, value in space.items() if f not in searched[arm]} for arm, space in arms.items()}
    with _storage(storage, Path(cache) / "tuning" / f"{study}.journal") as opened:
        studies = {}
        for arm in arms:
            space = {f: distribution_to_json(d) for f, d in searched[arm].items()}
            depends = json.dumps([sha256_of(*data), settings, numbers, first_seed, space, kept[arm]], default=str)
            name = f"{study}, {arm}, {hashlib.sha256(depends.encode()).hexdigest()[:8]}"
            with suppress(KeyError):
                optuna.delete_study(study_name=name, storage=opened)
            studies[arm] = optuna.create_study(study_name=name, storage=opened, direction="maximize")
        for done in range(0, n_trials, ask_batch):
            asked = []
            for s, (arm, each) in enumerate(studies.items()):
                each.sampler = optuna.samplers.TPESampler(seed=1_000 * s + done)
                batch = [each.ask(searched[arm]) for _ in range(min(ask_batch, n_trials - done))]
                asked += [(each, trial.number, kept[arm] | trial.params) for trial in batch]
            runs = [Run(seed=first_seed + i, **fields) for _, _, fields in asked for i in range(n_seeds)]
            label = f"{progress}, {len(studies) * (n_trials - done)} trials left" if progress else None
            curves = train(runs, data, evaluate_every=sys.maxsize, cache=cache, progress=label, **settings)
            scores = curves.valid_accuracy[:, -1].reshape(-1, n_seeds).mean(1)
            for (each, number, _), score in zip(asked, scores, strict=True):
                each.tell(number, float(score))
        rows = [
            {"arm": arm, "trial": trial.number} | {**kept[arm], **trial.params, "valid_accuracy": trial.value}
            for arm, each in studies.items()
            for trial in each.get_trials(deepcopy=False)
        ]
    return pd.DataFrame(rows)


@contextmanager
def _storage(url: str, journal: Path) -> Iterator[BaseStorage]:
    """The trials' storage: a database, or a new journal for this process alone; another search on it waits."""
    if url:
        yield open_database(url)
        return
    journal.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{journal}.held"):
        for left in (journal, Path(f"{journal}.lock")):  # the lock is Optuna's own, of a search that was killed
            left.unlink(missing_ok=True)
        yield JournalStorage(JournalFileBackend(str(journal)))


def open_database(url: str) -> RDBStorage:
    """Open the database at a URL as Optuna's storage; ValueError where it can't be, without the password of the URL.

    >>> open_database("here")
    Traceback (most recent call last):
    ValueError: `storage` should be empty or a database URL, like 'postgresql+psycopg://host/name'. It has no '://'.
    """
    if "://" not in url:
        raise ValueError(
            "`storage` should be empty or a database URL, like 'postgresql+psycopg://host/name'. It has no '://'."
        )
    try:
        return RDBStorage(url)
    except Exception as error:  # of SQLAlchemy, of a driver, of Optuna
        said = str(error)
        for secret in re.findall(r"[^:/@]+", url.partition("://")[2].rpartition("@")[0])[1:]:
            said = said.replace(secret, "…")
        raise ValueError(f"`storage` should be the URL of a database that can be opened. Found: {said}") from None
