"""What is measured on runs: the smoothness of a loss curve, and the verdict on two paired arms."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from sgsc_lib import check


def smoothness(loss: Any, *, window: int = 25, spike_threshold: float = 5.0) -> dict[str, np.ndarray]:
    """Smoothness measures of loss curves [..., T], each [...], NaN where a curve is not finite.

    - `total_rise`: Σ max(0, L_t − L_{t−1}), in units of the loss; 0 for a falling curve.
    - `upward_share`: the fraction of steps that rise.
    - `normalised_total_variation`: Σ|L_t − L_{t−1}| / (L_0 − L_{T−1}); 1 for a falling curve, NaN without a net fall.
    - `roughness`: root mean square of the second differences of log L; NaN where L is not > 0.
    - `spike_count`: steps above the median of the `window` around them by `spike_threshold` robust deviations
      (1.4826 × the median absolute deviation in the same window); whole windows only, 0 for a monotone curve.
    - `lag1_autocorrelation`: of the changes L_t − L_{t−1}; negative where the loss oscillates from step to step.

    Raises ValueError for fewer than 4 points or an even window.

    >>> float(smoothness([4.0, 2.0, 3.0, 1.0])["total_rise"])
    1.0
    """
    loss = np.asarray(loss, dtype=np.float64)
    if loss.ndim == 0 or loss.shape[-1] < 4:
        raise ValueError(f"`loss` should be [..., T] with T ≥ 4. Found shape {loss.shape}.")
    if check("window", window, int, low=3) % 2 == 0:
        raise ValueError(f"`window` should be odd. Found {window}.")
    check("spike_threshold", spike_threshold, float, low=0.0)
    finite = np.isfinite(loss).all(-1)
    safe = np.where(finite[..., None], loss, 1.0)
    change = np.diff(safe)
    fall = safe[..., 0] - safe[..., -1]
    positive = np.where((safe > 0).all(-1, keepdims=True), safe, np.nan)
    centred = change - change.mean(-1, keepdims=True)
    variance = (centred**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        measures = {
            "total_rise": np.maximum(change, 0).sum(-1),
            "upward_share": (change > 0).mean(-1),
            "normalised_total_variation": np.where(fall > 0, np.abs(change).sum(-1) / fall, np.nan),
            "roughness": np.sqrt((np.diff(np.log(positive), n=2) ** 2).mean(-1)),
            "spike_count": _spikes(safe, window, spike_threshold).sum(-1).astype(float),
            "lag1_autocorrelation": (centred[..., 1:] * centred[..., :-1]).sum(-1) / variance,
        }
    return {name: np.where(finite, value, np.nan) for name, value in measures.items()}


def _spikes(loss: np.ndarray, window: int, threshold: float) -> np.ndarray:
    """[..., T] -> bool [..., T − window + 1]: which points with a whole window around them are spikes."""
    if loss.shape[-1] < window:
        return np.zeros((*loss.shape[:-1], 0), dtype=bool)
    windows = np.lib.stride_tricks.sliding_window_view(loss, window, axis=-1)  # [..., T - window + 1, window]
    deviation = scipy.stats.median_abs_deviation(windows, axis=-1, scale="normal")
    centre = np.median(windows, axis=-1)
    return loss[..., window // 2 : loss.shape[-1] - window // 2] > centre + threshold * deviation


class PairedComparison(NamedTuple):
    """What `compare_paired` found about a − b; the fields in the order in which a table shows them.

    >>> compare_paired([1.0, 2.0, 4.0], [1.0, 1.0, 1.0], margin=0.5).n
    3
    """

    n: int
    mean_difference: float
    ci_low: float  # 95 % t interval
    ci_high: float
    ci90_low: float  # 90 % t interval: inside ± margin is equivalence (two one-sided tests at 5 %)
    ci90_high: float
    p: float
    probability_greater: float  # P(a > b), ties counted half
    probability_low: float
    probability_high: float
    effect_size: float
    correlation: float
    margin: float
    verdict: str


def compare_paired(a: Any, b: Any, *, margin: float) -> PairedComparison:
    """Compare paired values a[k], b[k] (same seed), where more is better, against the smallest difference that matters.

    - mean difference a − b with 95 % and 90 % t intervals;
    - `p` of the two-sided sign-flip permutation test of no difference: all 2ⁿ flips to n = 13, 9,999 random beyond;
    - P(a > b) with a 95 % Wilson interval whose lower end counts ties as losses and upper end as wins;
    - `effect_size`: mean difference in standard deviations of the difference (Cohen's d_z); the pair correlation;
    - `verdict`, in this order: "equivalent" where the 90 % interval lies inside ± `margin` (Schuirmann 1987), "better"
      or "worse" where the 95 % interval lies above or below 0, else "inconclusive".

    For a measure where less is better, negate both. Raises ValueError for unequal or short input, for a value that is
    not finite (a diverged run must be given a value openly, not dropped), and for a margin that is not positive.

    >>> found = compare_paired([0.71, 0.69, 0.73, 0.72], [0.66, 0.65, 0.67, 0.68], margin=0.01)
    >>> round(found.mean_difference, 4), found.verdict
    (0.0475, 'better')
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"`a` and `b` should be equally long, with at least 2 pairs. Found {a.shape} and {b.shape}.")
    if bad := int((~np.isfinite(a) | ~np.isfinite(b)).sum()):
        raise ValueError(f"`a` and `b` should be finite. Found {bad} pairs that are not: give diverged runs a value.")
    if check("margin", margin, float) <= 0:
        raise ValueError(f"`margin` should be > 0. Found {margin!r}.")
    difference, n = a - b, len(a)
    mean, deviation = float(difference.mean()), float(difference.std(ddof=1))
    half95, half90 = (float(scipy.stats.t.ppf(q, n - 1)) * deviation / math.sqrt(n) for q in (0.975, 0.95))
    how: dict[str, Any] = {"permutation_type": "samples", "n_resamples": 9_999, "alternative": "greater"}
    how |= {"vectorized": True, "rng": np.random.default_rng(0)}
    flips = scipy.stats.permutation_test((difference,), lambda d, axis: np.abs(d.mean(axis)), **how)
    wins, ties = int((difference > 0).sum()), int((difference == 0).sum())
    wilson = [scipy.stats.binomtest(k, n).proportion_ci(method="wilson") for k in (wins, wins + ties)]
    correlation = float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else math.nan
    effect = mean / deviation if deviation else math.copysign(math.inf, mean) if mean else 0.0
    ends = mean - half95, mean + half95, mean - half90, mean + half90
    greater = (wins + ties / 2) / n, float(wilson[0].low), float(wilson[1].high)
    verdict = verdict_of(ends[:2], ends[2:], margin)
    return PairedComparison(n, mean, *ends, float(flips.pvalue), *greater, effect, correlation, margin, verdict)


def verdict_of(ci95: tuple[float, float], ci90: tuple[float, float], margin: float) -> str:
    """The verdict on a difference by its 95 % and 90 % intervals; the order and the rule are `compare_paired`'s."""
    if -margin < ci90[0] and ci90[1] < margin:
        return "equivalent"
    return "better" if ci95[0] > 0 else "worse" if ci95[1] < 0 else "inconclusive"


def in_halves(compare: Callable[..., Any], *values: Any, **how: Any) -> list[Any]:
    """What `compare` finds of values by seed, seeds on the last axis: of all, of the even ones and of the odd ones.

    A finding that is not of the same kind in both halves is no headline.

    >>> [found.n for found in in_halves(compare_paired, np.arange(5.0), np.zeros(5), margin=1)]
    [5, 3, 2]
    """

    def of_seeds(value: Any, start: int) -> Any:
        return value.iloc[:, start::2] if isinstance(value, pd.DataFrame) else np.asarray(value)[..., start::2]

    parts = [values, *([of_seeds(value, start) for value in values] for start in (0, 1))]
    return [compare(*part, **how) for part in parts]


def judged(
    estimate: float, interval: tuple[float, float], *, n: int, p: float, reference: float = 0.0
) -> dict[str, Any]:
    """An estimate with its 95 % interval as a comparison: "better" where that is above `reference`, "worse" below.

    Returns the fields that `sgsc_study.results.claim` takes.

    >>> judged(0.31, (0.2, 0.4), n=100, p=0.001, reference=0.05)["verdict"]
    'better'
    """
    low, high = interval
    verdict = "better" if low > reference else "worse" if high < reference else "inconclusive"
    return {"n": n, "mean_difference": estimate, "ci_low": low, "ci_high": high, "p": p, "verdict": verdict}
