"""The bank: which cells run on, what its seeds choose, and how sure a difference of two choices is."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from study_inputs import SMALL, TRAINED, assert_refused

from sgsc_study import (
    CELL,
    Run,
    best_cell,
    border_hits,
    by_cell,
    compare_paired,
    compare_tuned,
    grown,
    race,
    rechosen,
    train,
    tuned_against,
    tuned_cells,
)
from sgsc_study import bank as module

RATES = (1e-5, 0.003, 0.01, 0.03)
ADAM = [Run(0, lr) for lr in RATES]
ARMS = {"Adam": ADAM, "after": [*ADAM, *(Run(0, lr, 0.5, "after") for lr in RATES)]}
SETTINGS = TRAINED | {"epochs": 4}


@pytest.fixture
def bank(monkeypatch) -> pd.DataFrame:
    monkeypatch.setattr(module, "MARGINS", (0.1, 0.03))
    return race(ARMS, SMALL, rounds=[2, 3, 6], first_seed=70, **SETTINGS)[0]


def test_every_run_is_kept_and_a_cell_goes_on_where_an_arm_that_has_it_could_need_it(bank):
    runs_of = dict(list(bank.groupby(CELL)))
    sizes = {cell: len(runs) for cell, runs in runs_of.items()}
    assert {*sizes.values()} >= {2, 6} and len(sizes) == 8 and set(bank["arm"]) == {"Adam", "after"}
    assert (bank["arm"] == "Adam").equals(bank["gamma"] == 0)
    assert all(runs["seed"].tolist() == list(range(70, 70 + len(runs))) for runs in runs_of.values())
    running = {arm: [tuple(vars(cell).values())[1:] for cell in cells] for arm, cells in ARMS.items()}
    for n, margin in ((2, 0.1), (3, 0.03)):
        means = {c: runs_of[c]["valid_accuracy"].iloc[:n].mean() for cells in running.values() for c in cells}
        top = {arm: max(means[cell] for cell in cells) for arm, cells in running.items()}
        on = {cell for arm, cells in running.items() for cell in cells if means[cell] >= top[arm] - margin}
        assert {cell for cell in means if sizes[cell] > n} == on
        running = {arm: [cell for cell in cells if cell in on] for arm, cells in running.items()}


def test_a_row_is_the_run_that_its_fields_say_and_the_index_of_a_cell_makes_it_again(bank):
    valid = by_cell(bank, ["Adam", "after"])
    assert valid.shape[1] == 6 and len(valid) < 8 and set(by_cell(bank, ["Adam"]).index) <= set(valid.index)
    again = train([Run(seed, *best_cell(valid)) for seed in valid.columns], SMALL, **SETTINGS).final()
    np.testing.assert_array_equal(again["valid_accuracy"], valid.loc[best_cell(valid)])
    assert by_cell(pd.concat([bank, bank.assign(arm="same cells")])).equals(by_cell(bank))


def test_a_bank_grows_until_no_best_rate_is_the_last_of_its_grid_and_shared_cells_stay_with_their_first_arm():
    how = {"rounds": [2, 4], "first_seed": 70, **SETTINGS}
    few, parts = {"Adam": ADAM[:2], "after": [Run(0, lr, 0.5, "after") for lr in RATES[:2]]}, ["Adam", "after"]
    arms = {"Adam": ["Adam"], "both": parts}
    first = race(few, SMALL, **how)[0]
    assert any("lr" in hit for hit in border_hits(first, arms))
    whole = grown(first, arms, lambda more, known: race(more, SMALL, known=known, **how)[0])
    assert not any("lr" in hit for hit in border_hits(whole, arms))
    assert whole.iloc[: len(first)].equals(first) and (whole["arm"] == "Adam").equals(whole["gamma"] == 0)
    assert not whole.duplicated(["seed", *CELL]).any()


@pytest.mark.parametrize(("decays", "best", "expected"), [
    ((0.05, 0.2), 0.75, [0.05, 0.2, 0.8, 3.2]),
    ((0.0, 0.2), 0.2, [0.0, 0.2, 0.8]),
    ((0.8, 3.2), 0.8, [0.2, 0.8, 3.2]),
    ((0.0, 0.2), 0.0, [0.0, 0.2]),
    ((0.2,), 0.2, [0.2]),
])  # fmt: skip
def test_a_bank_grows_along_decays_at_every_rate_of_the_last_one(decays, best, expected):
    def more(cells, _known=None):
        bank = pd.DataFrame([{"arm": arm, **vars(run)} for arm, runs in cells.items() for run in runs])
        return bank.assign(valid_accuracy=-((bank["lr"] - 0.2) ** 2) - (bank["weight_decay"] - best) ** 2)

    first = more({"AdamW": [Run(0, lr, weight_decay=d) for lr in (0.1, 0.2, 0.3) for d in decays]})
    whole = grown(first, {"AdamW": ["AdamW"]}, more)
    assert sorted(set(whole["weight_decay"])) == expected and len(whole) == 3 * len(expected)
    assert not border_hits(whole, {"AdamW": ["AdamW"]})


def test_cells_of_a_later_race_go_on_only_where_they_come_near_what_is_known_on_the_same_seeds():
    how = {"rounds": [2, 4], "first_seed": 70, **SETTINGS}
    best = race({"Adam": [Run(0, 0.03)]}, SMALL, **how)[0]
    sizes = {arm: len(race({arm: [Run(0, 1e-5)]}, SMALL, known=best, **how)[0]) for arm in ("Adam", "of its own")}
    assert sizes == {"Adam": 2, "of its own": 4}
    other_seeds = best[best["seed"] > 70]
    assert len(race({"Adam": [Run(0, 1e-5)]}, SMALL, known=other_seeds, **how)[0]) == 4


def grid(values: list[list[float]], placement: str = "after") -> pd.DataFrame:
    """A bank of one seed, rates by rows and exponents 0, 1, … by columns; γ = 0 is Adam."""
    rows = [vars(Run(0, 0.1 * 2**i, float(g), placement if g else "before"))
            | {"arm": "after" if g else "Adam", "valid_accuracy": value}
            for i, row in enumerate(values) for g, value in enumerate(row)]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("values", "said"), [
    ([[1, 0, 1], [2, 9, 1], [1, 1, 1]], []),
    ([[1, 0, 1], [9, 2, 1], [1, 1, 1]], []),  # γ = 0 is no border
    ([[1, 9, 1], [2, 1, 1], [1, 1, 1]], ["best lr, 0.1, is the lowest"]),
    ([[1, 0, 1], [2, 1, 1], [1, 9, 1]], ["best lr, 0.4, is the highest"]),
    ([[1, 0, 1], [2, 1, 9], [1, 1, 1]], ["best gamma, 2, is the highest"]),
])  # fmt: skip
def test_a_best_cell_at_a_border_is_said_with_its_arm_and_side(values, said):
    hits = border_hits(grid(values), {"SGSC after": ["Adam", "after"]})
    assert len(hits) == len(said) and all(f"SGSC after's {words}" in hit for words, hit in zip(said, hits, strict=True))


@pytest.mark.parametrize(("decays", "said"), [((0.0, 0.1, 0.2), "highest"), ((0.1, 0.2), "lowest"), ((0.0, 0.2), "")])
def test_a_border_of_the_decay_is_that_of_the_cells_with_the_best_exponent_and_at_0_there_is_none(decays, said):
    best = {"highest": decays[-1], "lowest": decays[0], "": decays[0]}[said]
    rows = [vars(Run(0, lr, weight_decay=decay)) | {"arm": "AdamW", "valid_accuracy": (decay == best) - abs(lr - 0.2)}
            for lr in (0.1, 0.2, 0.3) for decay in decays]  # fmt: skip
    rows += [vars(Run(0, 0.2, 1.0, "after", weight_decay=9.0)) | {"arm": "AdamW", "valid_accuracy": 0.0}]
    hits = border_hits(pd.DataFrame(rows), {"AdamW": ["AdamW"]})
    assert [f"best weight_decay, {best:g}, is the {said}" in hit for hit in hits] == [True] * bool(said)


def test_the_tuned_cells_are_the_best_one_those_of_both_halves_and_those_that_other_draws_choose():
    lead, half, never = [0.9, 0.6] * 8, [0.6, 0.89] * 8, [0.1, 0.1] * 8
    rows = [vars(Run(s, lr)) | {"arm": "Adam", "valid_accuracy": values[s]}
            for lr, values in ((0.1, lead), (0.2, half), (0.3, never)) for s in range(16)]  # fmt: skip
    valid = by_cell(pd.DataFrame(rows))
    found = tuned_cells({"Adam": valid}, least=0.9)
    assert found["lr"].tolist() == [0.1, 0.2] and found["chosen"].between(0.1, 0.9).all()
    assert found["valid_accuracy"].tolist() == pytest.approx([0.75, 0.745])
    three = tuned_against(valid, valid.loc[[best_cell(valid)]], valid, margin=0.01)
    assert [each.n for each in three] == [16, 8, 8] and three[0].ci_high > 0.05 and three[1].ci_high < 1e-9


def test_the_choice_follows_the_seeds_and_a_tie_of_two_halves_is_drawn_both_ways():
    clear, open_ = pd.DataFrame([[0.5, 0.6], [0.7, 0.8]]), pd.DataFrame([[0.5, 0.8], [0.8, 0.5]])
    assert set(rechosen(clear)) == {1} and rechosen(open_).mean() == pytest.approx(0.25, abs=0.02)  # ties: the first
    assert (rechosen(clear - 0.1) == rechosen(clear)).all()


def test_a_tuned_comparison_of_single_cells_is_the_paired_one_and_a_choice_widens_it():
    rng = np.random.default_rng(0)
    a, b, valid = rng.normal(0.02, 0.01, 400), rng.normal(0, 0.01, 400), pd.DataFrame([[0.5, 0.6, 0.7]])
    one, paired = compare_tuned(valid, valid, pd.DataFrame([a]), pd.DataFrame([b]), margin=0.01), None
    paired = compare_paired(a, b, margin=0.01)
    assert (one.n, one.verdict, one.mean_difference) == (400, paired.verdict, pytest.approx(paired.mean_difference))
    ends = [paired.ci_low, paired.ci_high, paired.ci90_low, paired.ci90_high]
    np.testing.assert_allclose([one.ci_low, one.ci_high, one.ci90_low, one.ci90_high], ends, atol=2e-4)
    two = pd.DataFrame([[0.5, 0.8, 0.7], [0.8, 0.5, 0.6]])
    wide = compare_tuned(two, valid, pd.DataFrame([a, a - 0.05]), pd.DataFrame([b]), margin=0.01)
    assert wide.mean_difference == one.mean_difference and wide.ci_low < -0.02 < one.ci_low
    assert wide.ci_high == pytest.approx(one.ci_high, abs=5e-4) and wide.verdict == "inconclusive"
    same = compare_tuned(two, two, pd.DataFrame([a, b]), pd.DataFrame([a, b]), margin=0.01)
    assert (same.mean_difference, same.p, same.verdict) == (0.0, 1.0, "equivalent")


def test_bad_rounds_and_data_without_validation_rows_are_refused_by_name():
    call = partial(race, ARMS, SMALL, **SETTINGS)
    assert_refused(call, ValueError, rounds=[[2, 2], [4, 2], [1, 2, 3, 4, 5]])
    assert_refused(call, TypeError, rounds=[[1.5]])
    without = SMALL._replace(x_valid=SMALL.x_valid[:0], y_valid=SMALL.y_valid[:0])
    assert_refused(partial(race, ARMS), ValueError, data=[without])
