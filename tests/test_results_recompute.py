"""The committed results, recomputed by another route: statsmodels."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.weightstats import DescrStatsW

from sgsc_study.results import CLAIM_COLUMNS

FULL = Path(__file__).resolve().parents[1] / "report" / "results" / "full"
MARGINS = {"test accuracy": 0.01, "fresh accuracy": 0.01, "smoothness (-total rise)": 0.05}
MARGINS["smoothness (-log roughness)"] = np.log(1.1)
assert_close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(FULL / f"{name}.csv")


def verdict_of(difference: np.ndarray, margin: float) -> str:
    """The four-way rule from statsmodels' intervals."""
    low90, high90 = DescrStatsW(difference).tconfint_mean(alpha=0.10)
    low95, high95 = DescrStatsW(difference).tconfint_mean(alpha=0.05)
    if -margin < low90 and high90 < margin:
        return "equivalent"
    return "better" if low95 > 0 else "worse" if high95 < 0 else "inconclusive"


def values(frame: pd.DataFrame, measure: str) -> np.ndarray:
    frame = frame.sort_values("seed")
    if "accuracy" in measure:
        return frame["final_test_accuracy" if measure == "test accuracy" else "fresh_accuracy"].to_numpy()
    return (-frame["epoch_total_rise"] if "rise" in measure else -0.5 * np.log(frame["epoch_roughness"])).to_numpy()


def test_every_paired_comparison_recomputes():
    comparisons, matched, searches, evaluation = map(table, ("comparisons", "matched", "searches", "evaluation"))
    counted = comparisons["setting"].str.startswith("every search")
    assert len(comparisons) >= 40 and comparisons[~counted]["n"].min() >= 32 and set(comparisons[counted]["n"]) == {6}
    for row in comparisons.itertuples():
        if "every search" in row.setting:
            means = (searches[searches["arm"] == arm].groupby("study") for arm in (row.a, row.b))
            a, b = (np.array([values(part, row.measure).mean() for _, part in studies]) for studies in means)
        elif "matched" in row.setting:
            part = matched[(matched["setting"] == row.setting) & (matched["measure"] == row.measure)]
            a, b = part["a"].to_numpy(), part["b"].to_numpy()
        else:
            a, b = (values(evaluation[evaluation["arm"] == arm], row.measure) for arm in (row.a, row.b))
        interval = DescrStatsW(a - b).tconfint_mean()
        assert_close([row.mean_difference, row.ci_low, row.ci_high], [(a - b).mean(), *interval])
        assert row.verdict == verdict_of(a - b, MARGINS[row.measure]), (row.setting, row.measure)


def test_every_claim_about_a_pair_of_arms_carries_its_comparisons_verdict():
    claims = table("claims")
    assert tuple(claims.columns) == CLAIM_COLUMNS and claims["id"].is_unique
    assert {"1", "2", "3", "4", "5"} <= {identity[0] for identity in claims["id"]}
    card = {"confirmed", "contradicted", "equivalent", "inconclusive"}
    assert set(claims.loc[claims["source"] == "card", "verdict"]) <= card
    for row in table("comparisons").itertuples():
        same = (claims["setting"] == row.setting) & (claims["measure"] == f"difference in {row.measure}")
        (verdict,) = claims.loc[same & (claims["notebook"] == "03_evaluation"), "verdict"]
        agreeing, opposite = ("worse", "better") if "accuracy" in row.measure else ("better", "worse")
        assert verdict == {agreeing: "confirmed", opposite: "contradicted"}.get(row.verdict, row.verdict)


def test_the_attribution_recomputes_and_its_parts_add_up():
    attribution, parts = table("attribution"), ["learning rate", "γ", "interaction"]
    rho = {arm: -values(frame, "smoothness (-log roughness)") for arm, frame in table("evaluation").groupby("arm")}
    corners = {
        "card's values": ("card's Adam", "card's SGSC", "card's Adam at SGSC's rate", "card's SGSC at Adam's rate")
    }
    for place in ("before", "after"):
        sgsc = f"SGSC {place}"
        corners[f"tuned, {place}"] = "Adam", sgsc, f"Adam at {place}'s rate", f"{sgsc} at Adam's rate"
    for contrast, (adam, *others) in corners.items():
        part = attribution[attribution["contrast"] == contrast].set_index("part")
        total, rate, gate = (rho[arm] - rho[adam] for arm in others)
        for name, difference in zip(["total", *parts], (total, rate, gate, total - rate - gate), strict=True):
            interval = DescrStatsW(difference).tconfint_mean()
            assert_close(
                part.loc[name, ["estimate", "ci_low", "ci_high"]].astype(float), [difference.mean(), *interval]
            )
        assert part.loc["total", "estimate"] == pytest.approx(part.loc[parts, "estimate"].sum())
