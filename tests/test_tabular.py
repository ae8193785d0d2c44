"""Searches of stored runs."""

import pytest

from sgsc_study import search_stored
from sgsc_study.tabular import SAMPLERS

CELLS = [(lr, gamma) for gamma in (0.0, 0.5) for lr in (0.001, 0.01, 0.1)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_of_stored_runs_asks_the_nearest_cells_and_is_the_same_alone_and_among_others(sampler):
    scores = [[k / 10, k / 10 + 0.02] for k in range(6)]
    cells, values = search_stored(CELLS, scores, sampler, 14, 2, 0.5, [3, 4])
    assert cells.shape == values.shape == (2, 14) and set(cells.ravel()) == set(range(6))
    assert (abs(values - cells / 10 - 0.01) < 0.011).all() and len({*values.ravel()}) > 6  # means of two draws
    alone = search_stored(CELLS, scores, sampler, 14, 2, 0.5, [4])
    assert (alone[0][0] == cells[1]).all() and (alone[1][0] == values[1]).all()


def test_a_search_without_an_exponent_stays_at_zero_and_finds_the_best_rate():
    cells, values = search_stored(CELLS, [[0.1], [0.9], [0.2], [1.0], [1.0], [1.0]], "TPE", 12, 1, 0.0, range(5))
    assert set(cells.ravel()) <= {0, 1, 2} and (values.max(1) == 0.9).all()
