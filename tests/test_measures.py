"""Smoothness and the paired comparison, against numbers by hand, SciPy and statsmodels."""

import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW
from study_inputs import assert_refused

from sgsc_study import compare_paired, in_halves, judged, smoothness


def test_smoothness_by_hand():
    found = smoothness([4.0, 2.0, 3.0, 1.0], window=3, spike_threshold=0.0)
    assert found["total_rise"] == 1.0 and found["upward_share"] == pytest.approx(1 / 3)
    assert found["normalised_total_variation"] == pytest.approx(5 / 3)
    log = np.log([4.0, 2.0, 3.0, 1.0])
    second = [log[2] - 2 * log[1] + log[0], log[3] - 2 * log[2] + log[1]]
    assert found["roughness"] == pytest.approx(np.sqrt(np.mean(np.square(second))))
    change = np.array([-2.0, 1.0, -2.0]) + 1.0
    assert found["lag1_autocorrelation"] == pytest.approx((change[1:] * change[:-1]).sum() / (change**2).sum())
    assert found["spike_count"] == 1  # 3 lies above 2, its window's median


def test_a_falling_curve_is_perfectly_smooth_and_a_spike_is_found():
    curve = 3 * np.exp(-np.linspace(0, 4, 200)) + 0.1
    falling = smoothness(curve)
    assert falling["total_rise"] == falling["upward_share"] == falling["spike_count"] == 0
    assert falling["normalised_total_variation"] == pytest.approx(1)
    assert np.isnan(smoothness(curve[::-1])["normalised_total_variation"])  # no net fall
    curve[100] += 1
    assert smoothness(curve)["spike_count"] == 1


def test_smoothness_keeps_leading_axes_and_isolates_diverged_curves():
    curves = np.random.default_rng(0).uniform(1, 2, (2, 3, 60))
    curves[1, 2, 30], curves[0, 0, 5] = np.nan, -1.0
    found, alone = smoothness(curves), smoothness(curves[0, 1])
    assert all(value.shape == (2, 3) and np.isnan(value[1, 2]) for value in found.values())
    assert all(found[name][0, 1] == pytest.approx(alone[name], nan_ok=True) for name in found)
    assert [name for name in found if np.isnan(found[name][0, 0])] == ["roughness"]  # -1 has no logarithm


def test_paired_comparison_against_scipy_and_statsmodels():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.2, 1, 40), rng.normal(0, 1, 40)
    found, theirs = compare_paired(a, b, margin=0.1), scipy.stats.ttest_rel(a, b)
    np.testing.assert_allclose([found.ci_low, found.ci_high], theirs.confidence_interval(0.95))
    np.testing.assert_allclose([found.ci90_low, found.ci90_high], DescrStatsW(a - b).tconfint_mean(alpha=0.10))
    assert found.p == pytest.approx(theirs.pvalue, abs=0.03)
    low, high = proportion_confint((a > b).sum(), 40, method="wilson")
    np.testing.assert_allclose([found.probability_low, found.probability_high], [low, high])
    assert found.correlation == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert found.effect_size == pytest.approx(theirs.statistic / math.sqrt(40))
    tied = compare_paired([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 3.0, 5.0], margin=0.1)  # ties: half, and both ways
    low, high = proportion_confint(1, 4, method="wilson")[0], proportion_confint(3, 4, method="wilson")[1]
    found = tied.probability_low, tied.probability_greater, tied.probability_high
    np.testing.assert_allclose(found, [low, 0.5, high])


@pytest.mark.parametrize("n", [2, 5, 12])
def test_sign_flip_p_is_exact_for_few_pairs(n):
    d = np.random.default_rng(n).normal(0.3, 1, n)
    flips = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=n)]
    expected = np.mean(np.array(flips) >= abs(d.mean()) - 1e-12)
    assert compare_paired(d, np.zeros(n), margin=1e-3).p == pytest.approx(expected)


VERDICTS = [(0.05, 0.01, "better"), (-0.05, 0.01, "worse"), (0.005, 0.05, "inconclusive")]
VERDICTS += [(0.001, 0.005, "equivalent"), (0.004, 0.001, "equivalent")]


@pytest.mark.parametrize(("shift", "spread", "verdict"), VERDICTS)
def test_the_four_verdicts(shift, spread, verdict):
    noise = np.linspace(-1, 1, 20)
    assert compare_paired(0.6 + shift + spread * noise, np.full(20, 0.6), margin=0.01).verdict == verdict


def test_equal_arms_are_equivalent_with_p_one():
    found = compare_paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], margin=0.01)
    assert (found.verdict, found.p, found.effect_size, found.probability_greater) == ("equivalent", 1.0, 0.0, 0.5)
    found = compare_paired([1.5, 1.5], [1.0, 1.0], margin=0.01)
    assert found.effect_size == math.inf and math.isnan(found.correlation) and found.verdict == "better"


@pytest.mark.parametrize(("reference", "verdict"), [(0.0, "better"), (10.0, "worse"), (2.0, "inconclusive")])
def test_an_estimate_is_judged_by_its_interval_against_the_reference(reference, verdict):
    found = judged(2.125, (1.0, 3.0), n=4, p=0.1, reference=reference)
    assert found["verdict"] == verdict and (found["n"], found["mean_difference"]) == (4, 2.125)


def test_halves_are_the_even_and_the_odd_seeds_of_every_value():
    a = np.random.default_rng(0).normal(size=9)
    tables = pd.DataFrame([a, a + 1])
    found = in_halves(lambda x, y, margin: (x.tolist(), y.to_numpy().tolist(), margin), a, tables, margin=3)
    for (x, y, margin), half in zip(found, (a, a[::2], a[1::2]), strict=True):
        assert x == half.tolist() and y == [half.tolist(), (half + 1).tolist()] and margin == 3


def test_bad_arguments_are_refused_by_name():
    smooth, paired = partial(smoothness, np.ones(50)), partial(compare_paired, a=[1.0, 2.0], b=[2.0, 1.0], margin=1.0)
    assert_refused(smooth, ValueError, window=[24, 1], spike_threshold=[-1])
    assert_refused(smoothness, ValueError, loss=[[1.0, 2.0], 1.0])
    assert_refused(paired, ValueError, a=[[1.0], [1.0, math.nan]], b=[[2.0], 2.0], margin=[0.0])
