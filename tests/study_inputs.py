"""What the tests of `sgsc_study` share: data, runs of every kind, short trainings and short searches."""

import itertools

import numpy as np
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution

from sgsc_study import Curves, Dataset, Run, load_mnist1d, train, tune
from sgsc_study.runs import EPOCH_CURVES, HALVES

DATA = load_mnist1d()
SMALL = Dataset(*(part[:96] for part in DATA))
DOUBLE = Dataset(*(part.double() if part.is_floating_point() else part for part in SMALL))
FRESH = SMALL.x_test, SMALL.y_test

RATES, PLACES = [(0, 0.003), (1, 0.02)], [(0.0, "before"), (0.3, "before"), (0.3, "after")]
RUNS = [Run(*rate, *place) for rate, place in itertools.product(RATES, PLACES)]
CONTROLLED = [Run(0, 0.01, 0.5, p, c) for p in ("before", "after") for c in ("permuted", "layer-mean", "frozen")]
OTHERS = ("active", "magnitude", "snr", "and-mask")  # the gates beside SGSC's
RELATED = [Run(0, 0.01, 0.4, p, gate=g) for p in ("before", "after") for g in OTHERS]
RELATED += [Run(0, 0.003, 1.0, p, gate="vote") for p in ("before", "after")]
RELATED += [Run(0, 0.01, 1.0, "after", gate="cautious"), Run(0, 0.01, schedule="cosine")]
RELATED += [Run(0, 0.01, weight_decay=0.3), Run(0, 0.01, label_smoothing=0.2)]
RELATED += [Run(0, 0.05, 0.5, "after", schedule="cosine", label_smoothing=0.1)]
OPTIMIZED = [Run(0, 0.05, g, "after", optimizer="sgd", weight_decay=0.1, schedule="cosine") for g in (0.0, 0.5)]
OPTIMIZED += [Run(0, 0.03, 0.5, "after", weight_decay=0.3), Run(0, 0.05, 0.5, "before", optimizer="sgd")]
OPTIMIZED += [Run(0, 0.02, 0.5, "after", control, optimizer=o) for control in HALVES for o in ("adam", "sgd")]
MUON = [Run(s, 0.02, g, "after", optimizer="muon", weight_decay=0.1) for s in (0, 1) for g in (0.0, 0.5)]
SHORT = {"epochs": 2, "batch_size": 40, "widths": (40, 24, 10), "probe_size": 8}


def shortly(runs: list[Run], data: Dataset = SMALL, **settings) -> Curves:
    """Train for two epochs, in this process."""
    return train(runs, data, **{"n_jobs": 1, **SHORT, **settings})


def assert_same(found: Curves, expected: Curves, rows: slice = slice(None)) -> None:
    """The same bits in every curve, NaNs included, as in these rows of what is expected."""
    for name in ("step_loss", "probe_loss", *EPOCH_CURVES, "fresh_loss", "fresh_accuracy"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[rows], name)


SPACE = {"lr": FloatDistribution(1e-3, 1e-1, log=True), "gamma": FloatDistribution(0.0, 2.0), "placement": "after"}
TRAINED = {"epochs": 1, "batch_size": 40, "widths": (40, 10), "n_jobs": 1}
SEARCH = {"study": "test", "n_trials": 7, "ask_batch": 3, **TRAINED}


def search(cache, data: Dataset = SMALL, arms: dict | None = None, **changes) -> pd.DataFrame:
    """Search two arms, of seven trials each."""
    return tune(arms or {"Adam": {"lr": SPACE["lr"]}, "after": SPACE}, data, cache=cache, **SEARCH | changes)


def nobody_trains(*_, **__):
    """In the place of the engine's `backward` it fails whoever trains."""
    raise AssertionError("something was trained")


def assert_refused(call, error: type[Exception], **bad: list) -> None:
    """Each of these values of each parameter is refused by the parameter's name, before any training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgsc_study.engine.backward", nobody_trains)
        for name, value in ((name, value) for name, values in bad.items() for value in values):
            with pytest.raises(error, match=f"`{name}`"):
                call(**{name: value})
