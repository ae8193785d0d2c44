"""The committed results, recomputed by another route: statsmodels."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.weightstats import DescrStatsW

from sgsc_study.results import CLAIM_COLUMNS

FULL = Path(__file__).resolve().parents[1] / "report" / "results" / "full"


@pytest.fixture(scope="module")
def evaluation() -> pd.DataFrame:
    return pd.read_csv(FULL / "evaluation.csv")


def verdict_of(difference: np.ndarray, margin: float) -> str:
    """The four-way rule from statsmodels' intervals."""
    stats = DescrStatsW(difference)
    low90, high90 = stats.tconfint_mean(alpha=0.10)
    low95, high95 = stats.tconfint_mean(alpha=0.05)
    if -margin < low90 and high90 < margin:
        return "equivalent"
    return "better" if low95 > 0 else "worse" if high95 < 0 else "inconclusive"


def values(frame: pd.DataFrame, measure: str) -> np.ndarray:
    frame = frame.sort_values("seed")
    if measure == "test accuracy":
        return frame["final_test_accuracy"].to_numpy()
    if measure == "fresh accuracy":
        return frame["fresh_accuracy"].to_numpy()
    return (-frame["epoch_total_rise"] if "rise" in measure else -0.5 * np.log(frame["epoch_roughness"])).to_numpy()


MARGINS = {"test accuracy": 0.01, "fresh accuracy": 0.01, "smoothness (-log roughness)": np.log(1.1)}
MARGINS["smoothness (-total rise)"] = 0.05


def test_every_paired_comparison_recomputes(evaluation):
    comparisons = pd.read_csv(FULL / "comparisons.csv")
    matched = pd.read_csv(FULL / "matched.csv")
    searches = pd.read_csv(FULL / "searches.csv")
    counted = comparisons["setting"].str.startswith("every search")
    assert len(comparisons) >= 40 and comparisons[~counted]["n"].min() >= 32 and set(comparisons[counted]["n"]) == {6}
    for row in comparisons.itertuples():
        if "every search" in row.setting:
            a, b = (
                np.array(
                    [values(part, row.measure).mean() for _, part in searches[searches["arm"] == arm].groupby("study")]
                )
                for arm in (row.a, row.b)
            )
            difference = a - b
        elif "matched" in row.setting:
            part = matched[(matched["setting"] == row.setting) & (matched["measure"] == row.measure)]
            difference = (part["a"] - part["b"]).to_numpy()
        else:
            a, b = (values(evaluation[evaluation["arm"] == arm], row.measure) for arm in (row.a, row.b))
            difference = a - b
        low, high = DescrStatsW(difference).tconfint_mean()
        np.testing.assert_allclose(
            [row.mean_difference, row.ci_low, row.ci_high], [difference.mean(), low, high], rtol=1e-6, atol=1e-9
        )
        assert row.verdict == verdict_of(difference, MARGINS[row.measure]), (row.setting, row.measure)


def test_every_claim_about_a_pair_of_arms_carries_its_comparisons_verdict():
    claims, comparisons = pd.read_csv(FULL / "claims.csv"), pd.read_csv(FULL / "comparisons.csv")
    assert tuple(claims.columns) == CLAIM_COLUMNS and claims["id"].is_unique
    assert {"1", "2", "3", "4", "5"} <= {identity[0] for identity in claims["id"]}
    card = {"confirmed", "contradicted", "equivalent", "inconclusive"}
    assert set(claims.loc[claims["source"] == "card", "verdict"]) <= card
    agreeing = {"test accuracy": "worse", "fresh accuracy": "worse"}
    for row in comparisons.itertuples():
        same = (claims["setting"] == row.setting) & (claims["measure"] == f"difference in {row.measure}")
        (verdict,) = claims.loc[same & (claims["notebook"] == "03_evaluation"), "verdict"]
        if row.verdict in ("better", "worse"):
            agrees = row.verdict == agreeing.get(row.measure, "better")
            assert verdict == ("confirmed" if agrees else "contradicted")
        else:
            assert verdict == row.verdict


def test_the_attribution_recomputes_and_its_parts_add_up(evaluation):
    attribution = pd.read_csv(FULL / "attribution.csv")
    rho = {arm: -values(frame, "smoothness (-log roughness)") for arm, frame in evaluation.groupby("arm")}
    corners = {
        "card's values": ("card's Adam", "card's SGSC", "card's Adam at SGSC's rate", "card's SGSC at Adam's rate")
    }
    for place in ("before", "after"):
        corners[f"tuned, {place}"] = (
            "Adam",
            f"SGSC {place}",
            f"Adam at {place}'s rate",
            f"SGSC {place} at Adam's rate",
        )
    for contrast, (adam, sgsc, slow, fast) in corners.items():
        part = attribution[attribution["contrast"] == contrast].set_index("part")
        total, rate, gate = (rho[arm] - rho[adam] for arm in (sgsc, slow, fast))
        by_hand = {"total": total, "learning rate": rate, "γ": gate, "interaction": total - rate - gate}
        for name, difference in by_hand.items():
            low, high = DescrStatsW(difference).tconfint_mean()
            row = part.loc[name]
            np.testing.assert_allclose(
                [row["estimate"], row["ci_low"], row["ci_high"]], [difference.mean(), low, high], rtol=1e-6, atol=1e-9
            )
        assert part.loc["total", "estimate"] == pytest.approx(
            part.loc[["learning rate", "γ", "interaction"], "estimate"].sum()
        )
