"""`train`: what it refuses, what it keeps in the cache, gates of one's own, and the published accuracies."""

from functools import partial

import numpy as np
import pytest
import torch
from study_inputs import CONTROLLED, FRESH, RUNS, SHORT, SMALL, assert_refused, assert_same, nobody_trains, shortly

from sgsc_study import GATES, Dataset, Run, check_training, load_mnist1d, train


def test_the_papers_own_table_comes_out():
    """MNIST-1D's authors report 32 % for logistic regression and 68 % for an MLP (arXiv 2011.14439, table 1)."""
    whole, runs = load_mnist1d(valid_fraction=0.0), [Run(seed, 0.01) for seed in range(2)]
    linear = train(runs, whole, epochs=60, batch_size=100, widths=(40, 10), n_jobs=1)
    deep = train(runs, whole, epochs=100, batch_size=100, widths=(40, 100, 100, 10), n_jobs=1)
    assert abs(linear.test_accuracy[:, -1].mean() - 0.32) < 0.04
    assert abs(deep.test_accuracy.max(1).mean() - 0.68) < 0.04
    assert np.isnan(deep.valid_loss).all() and np.isnan(deep.fresh_accuracy).all()


def test_the_cache_answers_for_the_same_runs_data_and_settings_only(tmp_path, monkeypatch):
    flipped = Dataset(*(part.clone() for part in SMALL))
    flipped.x_test[0, 0].neg_()
    same = {"runs": RUNS + CONTROLLED, "data": SMALL, "fresh": FRESH, "cache": tmp_path}
    first = shortly(**same)
    monkeypatch.setattr("sgsc_study.engine.backward", nobody_trains)
    assert_same(shortly(**same), first)
    others = {"epochs": 3, "batch_size": 41, "widths": (40, 10), "probe_size": 9, "fresh": None, "data": flipped}
    for name, value in (others | {"runs": [Run(0, 0.0031)]}).items():
        with pytest.raises(AssertionError, match="trained"):
            shortly(**same | {name: value})


def test_a_gate_of_ones_own_trains_on_other_processes_and_has_a_cache_of_its_own(tmp_path, monkeypatch):
    def train_by(gate, *others: Run, **options) -> np.ndarray:
        monkeypatch.setitem(GATES, "mine", gate)
        return shortly([Run(0, 0.01, 0.5, gate="mine"), *others], cache=tmp_path, stack_size=1, **options).probe_loss

    half = lambda sign, *, batch_size, gamma: (sign.abs() / batch_size) ** 0.5  # noqa: E731
    np.testing.assert_allclose(*train_by(half, Run(0, 0.01, 0.5), n_jobs=2), rtol=1e-5)
    assert np.ptp(train_by(lambda sign, *, batch_size, gamma: sign * 0.0)) == 0  # a gate of zeros moves nothing
    draws = torch.Generator().manual_seed(0)  # can't be compared, so that the gate is trained with anew
    first, second = (train_by(lambda sign, *, batch_size, gamma: sign.bernoulli(0.5, generator=draws)) for _ in "ab")
    assert not np.array_equal(first, second)


def test_what_is_no_gate_is_refused_and_one_that_loses_the_loss_is_named(monkeypatch):
    def mine(total, *, batch_size, gamma):  # finite on every small sum that the check tries
        return torch.where(total.abs() < 1e-3, torch.nan, 1.0) if total.shape[-1] > 5 else torch.ones_like(total)

    monkeypatch.setitem(GATES, "mine", mine)
    with pytest.warns(UserWarning, match="'mine'"):
        shortly([Run(0, 0.1, 1.0, gate="mine"), Run(0, 0.1)])
    monkeypatch.setitem(GATES, "mine", lambda sign, *, batch_size: sign)
    with pytest.raises(TypeError, match="'mine'"):
        shortly([Run(0, 0.1, 1.0, gate="mine")])


def test_the_default_dtype_of_the_caller_does_not_matter(tmp_path):
    expected = shortly(RUNS, fresh=FRESH)
    torch.set_default_dtype(torch.float64)
    for n_jobs in (1, 2):
        curves = shortly(RUNS, fresh=FRESH, n_jobs=n_jobs, cache=tmp_path / str(n_jobs))
        assert_same(curves, expected)
        assert curves.step_loss.dtype == np.float32 and np.isfinite(curves.train_loss).all()


def test_bad_arguments_are_refused_by_name_before_any_training():
    short, check = partial(shortly, [Run(0, 0.1)]), partial(check_training, SMALL, **SHORT)
    bad = {"epochs": [0], "batch_size": [97], "widths": [(41, 10), (40, 5), (40,), (40, 0, 10)], "probe_size": [97]}
    assert_refused(check, ValueError, **bad)
    assert_refused(short, ValueError, stack_size=[0], evaluate_every=[0], device=["cuda", "nowhere"], **bad)
    assert_refused(short, TypeError, epochs=[2.0])
    assert_refused(shortly, TypeError, runs=[[], [{"seed": 0}]])
