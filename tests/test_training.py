"""`train`: what it refuses, what it keeps in the cache, gates of one's own, and the published accuracies."""

import math

import numpy as np
import pytest
import torch
from study_inputs import CONTROLLED, FRESH, RUNS, SHORT, SMALL, assert_same, shortly

from sgsc_study import GATES, Dataset, Run, check_training, load_mnist1d, train


def test_the_papers_own_table_comes_out():
    """MNIST-1D's authors report 32 % for logistic regression and 68 % for an MLP (arXiv 2011.14439, table 1)."""
    whole = load_mnist1d(valid_fraction=0.0)
    runs, often = [Run(seed, 0.01) for seed in range(2)], {"batch_size": 100, "n_jobs": 1}
    linear = train(runs, whole, epochs=60, widths=(40, 10), **often)
    deep = train(runs, whole, epochs=100, widths=(40, 100, 100, 10), **often)
    assert abs(linear.test_accuracy[:, -1].mean() - 0.32) < 0.04
    assert abs(deep.test_accuracy.max(1).mean() - 0.68) < 0.04


@pytest.fixture
def nobody_trains(monkeypatch):
    """From its call on, whoever trains in this process fails."""
    return lambda: monkeypatch.setattr(torch.autograd, "grad", None)


def test_the_cache_answers_for_the_same_runs_data_and_settings_only(tmp_path, nobody_trains):
    runs = RUNS + CONTROLLED
    first = shortly(runs, fresh=FRESH, cache=tmp_path)
    nobody_trains()
    assert_same(shortly(runs, fresh=FRESH, cache=tmp_path, progress="again"), first)
    flipped = Dataset(*(part.clone() for part in SMALL))
    flipped.x_test[0, 0].neg_()
    for changes in ({"epochs": 3}, {"batch_size": 41}, {"widths": (40, 10)}, {"probe_size": 9}, {"fresh": None}):
        with pytest.raises(TypeError, match="not callable"):
            shortly(runs, **{"fresh": FRESH, "cache": tmp_path, **changes})
    for data, others in ((flipped, runs), (SMALL, [Run(0, 0.0031)])):
        with pytest.raises(TypeError, match="not callable"):
            shortly(others, data, fresh=FRESH, cache=tmp_path)


def test_a_gate_of_ones_own_trains_on_other_processes_and_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(GATES, "mine", lambda sign, *, batch_size, gamma: (sign.abs() / batch_size) ** 0.5)
    mine, ours = Run(0, 0.01, 0.5, gate="mine"), Run(0, 0.01, 0.5)
    found = shortly([mine, mine, ours], n_jobs=2, stack_size=1, cache=tmp_path)
    np.testing.assert_allclose(found.step_loss[0], found.step_loss[2], rtol=1e-5)
    monkeypatch.setitem(GATES, "mine", lambda sign, *, batch_size, gamma: sign * 0.0)
    still = shortly([mine], cache=tmp_path)
    assert not np.array_equal(still.step_loss[0], found.step_loss[0])
    assert np.ptp(still.probe_loss) == 0  # a gate of zeros moves nothing
    monkeypatch.setitem(GATES, "sign", GATES["mine"])
    assert_same(shortly([ours], cache=tmp_path), still)


def test_a_gate_that_cannot_be_told_from_another_is_trained_anew(tmp_path, monkeypatch):
    draws = torch.Generator().manual_seed(0)  # it can't be pickled
    gate = lambda sign, *, batch_size, gamma: torch.rand(sign.shape, generator=draws)  # noqa: E731
    monkeypatch.setitem(GATES, "mine", gate)
    first, second = (shortly([Run(0, 0.01, 0.5, gate="mine")], cache=tmp_path) for _ in range(2))
    assert not np.array_equal(first.step_loss, second.step_loss)


def test_a_gate_whose_loss_is_lost_in_training_is_named(monkeypatch):
    def mine(total, *, batch_size, gamma):  # finite on every small sum that the check tries
        return torch.where(total.abs() < 1e-3, torch.nan, 1.0) if total.shape[-1] > 5 else torch.ones_like(total)

    monkeypatch.setitem(GATES, "mine", mine)
    with pytest.warns(UserWarning, match="'mine'") as told:
        shortly([Run(0, 0.1, 1.0, gate="mine"), Run(0, 0.1)])
    assert len(told) == 1 and told[0].filename == shortly.__code__.co_filename


def test_the_default_dtype_of_the_caller_does_not_matter(tmp_path):
    expected = shortly(RUNS, fresh=FRESH)
    torch.set_default_dtype(torch.float64)
    try:
        found = [shortly(RUNS, fresh=FRESH, n_jobs=n, cache=tmp_path / str(n)) for n in (1, 2)]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for curves in found:
        assert_same(curves, expected)
        assert curves.step_loss.dtype == np.float32 and np.isfinite(curves.train_loss).all()


def test_data_without_validation_rows_are_trained_on():
    curves = shortly([Run(0, 0.01)], load_mnist1d(100, valid_fraction=0.0))
    assert np.isnan(curves.valid_loss).all() and np.isfinite(curves.test_loss).all()
    assert np.isnan(curves.fresh_accuracy).all()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"runs": []}, TypeError),
        ({"runs": [{"seed": 0}]}, TypeError),
        ({"epochs": 0}, ValueError),
        ({"epochs": 2.0}, TypeError),
        ({"batch_size": 97}, ValueError),
        ({"widths": (41, 10)}, ValueError),
        ({"widths": (40, 5)}, ValueError),
        ({"widths": (40,)}, ValueError),
        ({"widths": (40, 0, 10)}, ValueError),
        ({"probe_size": 97}, ValueError),
        ({"stack_size": 0}, ValueError),
        ({"evaluate_every": 0}, ValueError),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name_before_any_training(bad, error, nobody_trains):
    nobody_trains()
    (name,) = bad
    with pytest.raises(error, match=f"`{name}`"):
        shortly(**{"runs": [Run(0, 0.1)], **bad})
    if name in ("epochs", "batch_size", "widths", "probe_size"):
        with pytest.raises(error, match=f"`{name}`"):
            check_training(SMALL, **{**SHORT, **bad})


@pytest.mark.parametrize("gate", [lambda sign: sign, lambda sign, *, batch_size, gamma: sign * math.nan])
def test_what_is_no_gate_is_refused_before_any_training(monkeypatch, nobody_trains, gate):
    monkeypatch.setitem(GATES, "mine", gate)
    nobody_trains()
    with pytest.raises((TypeError, ValueError), match="'mine'"):
        shortly([Run(0, 0.1, 1.0, gate="mine")])
