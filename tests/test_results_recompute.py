"""The committed results, recomputed by another route, from bank.csv and evaluation.csv alone."""

from functools import cache, partial
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from statsmodels.stats.weightstats import DescrStatsW

from sgsc_study.results import CLAIM_COLUMNS

FULL = Path(__file__).resolve().parents[1] / "report" / "results" / "full"
CELL, ARMS = ["placement", "gamma", "lr"], {"Adam": ["Adam"], "SGSC before": ["Adam", "SGSC before"]}
ARMS["SGSC after"] = ["Adam", "SGSC after"]
MARGINS = {"accuracy": 0.01, "smooth": np.log(1.1)}
HALVES = {"verdict": (0, 1), "half_a": (0, 2), "half_b": (1, 2)}  # first seed, step
assert_close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)


@cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(FULL / f"{name}.csv")


def verdict_of(interval95, interval90, margin: float) -> str:
    """The four-way rule, in the words of the card's claims: it says less, for accuracy as for roughness."""
    if -margin < interval90[0] and interval90[1] < margin:
        return "equivalent"
    return "contradicted" if interval95[0] > 0 else "confirmed" if interval95[1] < 0 else "inconclusive"


def values(arm: str, kind: str, start: int = 0, step: int = 1) -> np.ndarray:
    """An arm's values on evaluation seeds."""
    part = table("evaluation").query("arm == @arm").sort_values("seed")
    return (part["fresh_accuracy"] if kind == "accuracy" else np.log(part["epoch_roughness"])).to_numpy()[start::step]


def scores(arm: str, start: int = 0, step: int = 1) -> dict[tuple, np.ndarray]:
    """Validation accuracies by seed of the cells of an arm's grid that ran all of the bank's seeds."""
    part = table("bank")[table("bank")["arm"].isin(ARMS[arm])].sort_values("seed")
    cells = {cell: runs["valid_accuracy"].to_numpy() for cell, runs in part.groupby(CELL)}
    longest = max(map(len, cells.values()))
    return {cell: runs[start::step] for cell, runs in cells.items() if len(runs) == longest}


def best(cells: dict[tuple, np.ndarray]) -> tuple:
    return max(cells, key=lambda cell: cells[cell].mean())


def claim(identity: str) -> pd.Series:
    return table("claims").set_index("id").loc[identity]


def test_the_claims_are_one_table_with_both_halves():
    claims = table("claims")
    assert tuple(claims.columns) == CLAIM_COLUMNS and claims["id"].is_unique
    card = {"confirmed", "contradicted", "equivalent", "inconclusive"}
    assert set(claims.loc[claims["source"] == "card", ["verdict", "half_a", "half_b"]].to_numpy().ravel()) <= card
    assert {"gamma-near-zero", "rate-lower", "filters-noise", "search-luck"} <= set(claims["id"])


def test_the_bank_is_wide_and_fine_enough_and_has_seeds_where_a_cell_could_be_best():
    bank = table("bank").query("notebook == '02_tuning'")
    for arm, gammas in (("SGSC before", {0.02, 0.05, 0.1, 0.2, 0.4, 0.8}), ("SGSC after", {0.1, 0.25, 0.5, 1, 1.5, 2})):
        assert gammas <= set(bank.query("arm == @arm")["gamma"])
        placement, gamma, lr = best(scores(arm))
        same = (bank["gamma"] == gamma) & ((bank["placement"] == placement) | (gamma == 0))
        rates = sorted(bank.loc[same, "lr"].unique())
        where = rates.index(lr)
        assert 0 < where < len(rates) - 1 and max(np.divide(rates[1:], rates[:-1])) <= 1.6
        pool = bank[(bank["gamma"] == 0) | (bank["placement"] == arm.split()[1])].pivot_table(
            index=CELL, columns="seed", values="valid_accuracy")  # fmt: skip
        n_seeds, gated = pool.notna().sum(axis=1), pool.index.get_level_values("gamma") > 0
        assert set(n_seeds) == {2, 8, 24}
        for n, far in ((2, 0.04), (8, 0.015)):  # what stopped was that far behind on the same seeds
            means = pool.loc[n_seeds >= n].iloc[:, :n].mean(axis=1)
            assert (means[(n_seeds == n) & gated] < means.max() - far + 1e-9).all()
    assert not set(bank["seed"]) & set(table("evaluation")["seed"])


def test_the_tuned_values_are_the_best_cells_on_validation_data():
    tuned = table("tuned").drop_duplicates("arm").set_index("arm")
    for arm in ARMS:
        cells = scores(arm)
        assert tuple(tuned.loc[arm, CELL]) == best(cells)
        assert tuned.loc[arm, "valid_accuracy"] == pytest.approx(cells[best(cells)].mean())
        evaluated = table("evaluation").query("arm == @arm")[CELL].drop_duplicates()
        assert [tuple(row) for row in evaluated.to_numpy()] == [best(cells)]


@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize(("condition", "a", "b"), [
    ("card", "card's SGSC", "card's Adam"),
    ("card-at-adams-rate", "card's SGSC at Adam's rate", "card's Adam"),
    ("card-at-sgscs-rate", "card's SGSC", "card's Adam at SGSC's rate"),
])  # fmt: skip
def test_the_card_s_values_are_judged_over_paired_seeds(kind, condition, a, b):
    row = claim(f"{kind}-{condition}")
    assert row["n"] >= 64
    for column, half in HALVES.items():
        difference = DescrStatsW(values(a, kind, *half) - values(b, kind, *half))
        interval = difference.tconfint_mean()
        if column == "verdict":
            assert_close([row["estimate"], row["ci_low"], row["ci_high"]], [difference.mean, *interval])
        assert row[column] == verdict_of(interval, difference.tconfint_mean(alpha=0.1), MARGINS[kind])


def drawn(cells: dict[tuple, np.ndarray], seeds: np.ndarray) -> tuple:
    return best({cell: runs[seeds] for cell, runs in cells.items()})


@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_tuned_arms_are_judged_over_seeds_and_the_choice_of_the_cell(kind, place):
    row, draw, evaluation = claim(f"{kind}-tuned-{place}"), np.random.default_rng(7), table("evaluation")
    column = "fresh_accuracy" if kind == "accuracy" else "epoch_roughness"
    of_cell = {
        c: runs.drop_duplicates("seed").sort_values("seed")[column].to_numpy() for c, runs in evaluation.groupby(CELL)
    }
    of_cell = of_cell if kind == "accuracy" else {cell: np.log(runs) for cell, runs in of_cell.items()}
    for name, half in HALVES.items():
        a, b = (
            {c: runs for c, runs in scores(arm, *half).items() if c in of_cell} for arm in (f"SGSC {place}", "Adam")
        )
        n_bank, n = len(next(iter(a.values()))), len(of_cell[best(b)][half[0] :: half[1]])
        differences = []
        for _ in range(4000):
            bank_seeds, seeds = draw.integers(n_bank, size=n_bank), draw.integers(n, size=n)
            one, two = (of_cell[drawn(arm, bank_seeds)][half[0] :: half[1]][seeds].mean() for arm in (a, b))
            differences.append(one - two)
        low, low90, high90, high = np.quantile(differences, [0.025, 0.05, 0.95, 0.975])
        assert row[name] == verdict_of((low, high), (low90, high90), MARGINS[kind])
        if name == "verdict":
            assert row["estimate"] == pytest.approx((of_cell[best(a)] - of_cell[best(b)]).mean(), abs=1e-9)
            np.testing.assert_allclose([row["ci_low"], row["ci_high"]], [low, high], atol=0.15 * (high - low) + 1e-9)


@pytest.mark.parametrize(("identity", "reference"), [("gamma-near-zero", 0.1), ("rate-lower", 0.0)])
def test_the_best_exponent_and_rate_are_judged_over_draws_of_the_banks_seeds(identity, reference):
    def found(before: tuple, adam: tuple) -> float:
        return before[1] if reference else np.log10(before[2] / adam[2])

    row, draw = claim(identity), np.random.default_rng(7)
    for name, half in HALVES.items():
        before, adam = scores("SGSC before", *half), scores("Adam", *half)
        n = len(next(iter(adam.values())))
        draws = [found(*(drawn(arm, seeds) for arm in (before, adam))) for seeds in draw.integers(n, size=(4000, n))]
        low, high = np.quantile(draws, [0.025, 0.975])
        assert row[name] == ("confirmed" if high < reference else "contradicted" if low > reference else "inconclusive")
        if name == "verdict":
            assert row["estimate"] == pytest.approx(found(best(before), best(adam)), abs=1e-9)
            below, above = np.array(draws) - row["ci_low"], np.array(draws) - row["ci_high"]
            for beyond, reached in ((below < -1e-9, below < 1e-9), (above > 1e-9, above > -1e-9)):  # cells are steps
                assert beyond.mean() < 0.035 and reached.mean() > 0.015


def winner(arm: str, seed: int, draw: np.random.Generator) -> pd.DataFrame:
    """The stored runs of the cell at which a search of 20 trials of one seed ends."""
    bank = table("bank")
    rates = sorted(bank.query("arm == 'SGSC before'")["lr"].unique())
    part = bank[bank["arm"].isin(ARMS[arm]) & bank["lr"].isin(rates)]
    cells = dict(list(part.groupby(["gamma", "lr"])))
    gammas = sorted({gamma for gamma, _ in cells})
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    asked = []
    for _ in range(20):
        trial = study.ask()
        lr = trial.suggest_float("lr", rates[0], rates[-1], log=True)
        gamma = trial.suggest_float("gamma", 0, gammas[-1]) if len(gammas) > 1 else 0.0
        nearest = min(gammas, key=lambda g: abs(g - gamma)), min(rates, key=lambda r: abs(np.log(r / lr)))
        score = draw.choice(cells[nearest]["valid_accuracy"])
        study.tell(trial, score)
        asked.append((score, nearest))
    return cells[max(asked, key=lambda trial: trial[0])[1]]


@pytest.mark.slow
def test_as_many_studies_like_the_card_s_report_what_it_reports():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    row, draw, n = claim("search-luck"), np.random.default_rng(7), 300
    reported = 0
    for study in range(n):
        sgsc, adam = (
            draw.choice(winner(arm, 9_000_000 + 1000 * k + study, draw)["test_accuracy"], 3).mean()
            for k, arm in enumerate(("SGSC before", "Adam"))
        )
        reported += sgsc - adam <= 0.6737 - 0.6880 + 1e-9
    error = np.sqrt(row["estimate"] * (1 - row["estimate"]) * (1 / n + 1 / row["n"]))
    assert abs(reported / n - row["estimate"]) < 4 * error
    assert {row[name] for name in HALVES} == {"confirmed"} and row["ci_low"] > 0.05  # more than 1 in 20


def test_the_attribution_recomputes_and_its_parts_add_up():
    contrasts = {"card": ("card's Adam", "card's SGSC", "card's Adam at SGSC's rate", "card's SGSC at Adam's rate")}
    contrasts["tuned-after"] = "Adam", "SGSC after", "Adam at after's rate", "SGSC after at Adam's rate"
    for contrast, arms in contrasts.items():
        corner, *others = (values(arm, "smooth") for arm in arms)
        total, rate, gamma = (other - corner for other in others)
        parts = {"learning-rate": rate, "gamma": gamma, "interaction": total - rate - gamma}
        for part, difference in {"total": total, **parts}.items():
            row = claim(f"attribution-{contrast}-{part}")
            interval = DescrStatsW(difference).tconfint_mean()
            assert_close([row["estimate"], row["ci_low"], row["ci_high"]], [difference.mean(), *interval])
        estimates = [claim(f"attribution-{contrast}-{part}")["estimate"] for part in parts]
        assert claim(f"attribution-{contrast}-total")["estimate"] == pytest.approx(sum(estimates))


# -- notebook 05: an arm's grid told by what its cells are, not by whose they were called ------------------------------

FIELDS = ["lr", "gamma", "placement", "control", "gate", "schedule", "weight_decay", "label_smoothing", "optimizer"]
PAIRS = {f"accuracy-gated-{name.lower()}{'-cosine' * (schedule == 'cosine')}": ((name, True), (name, False), schedule)
         for name in ("Adam", "AdamW", "SGD") for schedule in ("constant", "cosine")}  # fmt: skip
PAIRS |= {
    "accuracy-gated-muon-cosine": (("Muon", True), ("Muon", False), "cosine"),
    "accuracy-sgd-cosine-against-adamw-cosine": (("SGD", False), ("AdamW", False), "cosine"),
    "accuracy-gated-adamw-cosine-against-sgd-cosine": (("AdamW", True), ("SGD", False), "cosine"),
}


def contest_cells(name: str, gated: bool, schedule: str, start: int = 0, step: int = 1) -> dict[tuple, np.ndarray]:
    """Validation accuracies by seed of the cells that ran all seeds: of an optimizer, with and without the gate."""
    own = {"optimizer": name.lower().removesuffix("w"), "schedule": schedule, "control": "none", "gate": "sign"}
    bank = table("bank").query("notebook == '05_gate_after_adam' and label_smoothing == 0")
    bank = bank[(bank[[*own]] == pd.Series(own)).all(axis=1)]
    bank = bank[(bank["gamma"] == 0) | gated]
    bank = bank[(bank["weight_decay"] == 0) | (name != "Adam")].sort_values("seed")
    cells = {c: runs["valid_accuracy"].to_numpy() for c, runs in bank.groupby(FIELDS)}
    longest = max(map(len, cells.values()))
    return {cell: runs[start::step] for cell, runs in cells.items() if len(runs) == longest}


@cache
def contest_evaluation() -> dict[tuple, np.ndarray]:
    return {c: runs.sort_values("seed")["fresh_accuracy"].to_numpy() for c, runs in table("contest").groupby(FIELDS)}


@pytest.mark.parametrize("identity", PAIRS)
def test_the_contest_is_judged_over_seeds_and_the_choice_of_the_cell(identity):
    row, (one, two, schedule), of_cell = claim(identity), PAIRS[identity], contest_evaluation()
    draw = np.random.default_rng(7)
    for name, half in HALVES.items():
        arms = [{c: runs for c, runs in contest_cells(*arm, schedule, *half).items() if c in of_cell}
                for arm in (one, two)]  # fmt: skip
        n_bank, n = len(next(iter(arms[0].values()))), len(of_cell[best(arms[0])][half[0] :: half[1]])
        assert n >= 20 / half[1]
        differences = []
        for _ in range(4000):
            bank_seeds, seeds = draw.integers(n_bank, size=n_bank), draw.integers(n, size=n)
            a, b = (of_cell[drawn(arm, bank_seeds)][half[0] :: half[1]][seeds].mean() for arm in arms)
            differences.append(a - b)
        low, low90, high90, high = np.quantile(differences, [0.025, 0.05, 0.95, 0.975])
        words = {"contradicted": "better", "confirmed": "worse"}
        clear = min(abs(np.array([low, high, low90 - 0.01, high90 + 0.01, low90 + 0.01, high90 - 0.01]))) > 5e-4
        verdict = verdict_of((low, high), (low90, high90), 0.01)
        assert row[name] == words.get(verdict, verdict) or not clear  # an end at 0 or a margin is a toss of the draws
        if name == "verdict":
            estimate = (of_cell[best(arms[0])] - of_cell[best(arms[1])]).mean()
            assert row["estimate"] == pytest.approx(estimate, abs=1e-9)
            np.testing.assert_allclose([row["ci_low"], row["ci_high"]], [low, high], atol=0.15 * (high - low) + 1e-9)


@pytest.mark.parametrize("arm", {(*arm, pair[2]) for pair in PAIRS.values() for arm in pair[:2]}, ids=str)
def test_the_best_cell_of_an_arm_of_the_contest_lies_inside_a_fine_grid(arm):
    cell = best(contest_cells(*arm))
    lr, gamma, decay = (cell[FIELDS.index(name)] for name in ("lr", "gamma", "weight_decay"))
    bank = table("bank").query("notebook == '05_gate_after_adam' and control == 'none' and gate == 'sign'")
    bank = bank[(bank["schedule"] == arm[2]) & (bank["optimizer"] == arm[0].lower().removesuffix("w"))]
    rates = sorted(bank.query("gamma == @gamma and weight_decay == @decay")["lr"].unique())
    assert rates[0] < lr < rates[-1] and max(np.divide(rates[1:], rates[:-1])) <= 1.65  # two digits are kept
    assert gamma == 0 or gamma < bank["gamma"].max()
    assert decay == 0 or decay < bank.query("gamma == @gamma")["weight_decay"].max()
    tuned = table("contest_tuned").drop_duplicates("arm").set_index("arm")
    name = f"{'gated ' * arm[1]}{arm[0]}, {arm[2]}"
    assert tuple(tuned.loc[name, FIELDS]) == cell


def test_every_setting_of_06_has_its_claim_and_nothing_chosen_by_test_data():
    claims, bank, where = table("claims"), table("where_bank"), table("where")
    settings = set(where["setting"])
    assert {"noise-20", "noise-40", "batch-32", "batch-512", "batch-full", "depth-1", "depth-3", "digits", "cnn",
            "cnn-shuffled"} <= settings and sum(key.startswith("draw-") for key in settings) == 3  # fmt: skip
    assert {f"carries-over-{key}" for key in settings} <= set(claims["id"])
    for of, rows in bank.groupby(["setting", "arm"]):
        means = rows.groupby(FIELDS)["valid_accuracy"].agg(["mean", "size"])
        means = means[means["size"] == means["size"].max()]["mean"]
        chosen = where.set_index(["setting", "arm"]).loc[of, FIELDS]
        assert tuple(chosen) in set(means[means >= means.max() - 1e-12].index)
