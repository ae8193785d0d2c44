"""The findings in words: claims.csv in, Markdown out, for the top of the page and the README. No number is typed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd

MARKS = "<!-- findings: written by report/build.py from report/results/full/claims.csv -->", "<!-- /findings -->"

# The abstract is worded for these verdicts. Where a run reaches others, its words would be wrong, and it is left out.
WORDED_FOR = {
    "1-before-tuned": "contradicted",
    "1-card-values": "confirmed",
    "2-card-values": "confirmed",
    "2-card-common-lr-adam": "equivalent",
    "2-card-common-lr-sgsc": "equivalent",
    "2-after-tuned": "contradicted",
    "5-signal": "confirmed",
    "6-after-permuted": "better",
    "6-after-layer-mean": "better",
    "6-after-frozen": "better",
}


def shown(row: pd.Series) -> str:
    """A claim's estimate and 95 % interval in the unit that a reader thinks in."""
    values = [row["estimate"], row["ci_low"], row["ci_high"]]
    if "accuracy" in row["measure"]:
        return "{:+.2f} points [{:+.2f}, {:+.2f}]".format(*(100 * value for value in values))
    if (
        "smoothness (-log roughness)" in row["measure"]
    ):  # more is smoother there; a reader wants the factor of roughness
        return "roughness × {:.2f} [{:.2f}, {:.2f}]".format(*(math.exp(-values[k]) for k in (0, 2, 1)))
    if "log roughness" in row["measure"]:
        return "roughness × {:.2f} [{:.2f}, {:.2f}]".format(*(math.exp(value) for value in values))
    if "log10" in row["measure"]:
        return "× {:.2f} [{:.2f}, {:.2f}]".format(*(10**value for value in values))
    if "total rise" in row["measure"]:
        return "rise {:+.3f} nats [{:+.3f}, {:+.3f}]".format(*(-values[k] for k in (0, 2, 1)))
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def abstract(claims: pd.DataFrame) -> list[str]:
    """Five sentences, the uncomfortable parts first; none where the verdicts are not those they are worded for."""
    row = dict(claims.set_index("id").iterrows())
    if {identity: row[identity]["verdict"] for identity in WORDED_FOR if identity in row} != WORDED_FOR:
        return []

    def say(identity: str) -> str:
        return f"{shown(row[identity])}, **{row[identity]['verdict']}**"

    seeds = int(row["2-before-tuned"]["n"])
    return [
        f"With both tuned by equal searches, over {seeds} paired seeds, the card's method is rougher than Adam, "
        f"not smoother "
        f"({say('1-before-tuned')}), and about as accurate: {say('2-before-tuned')} as «less accurate», and "
        f"{say('2f-before-tuned')} on a fresh test draw.",
        f"The card's own two settings do behave as it says ({say('2-card-values')} as «less accurate»; "
        f"{say('1-card-values')} as «smoother»), but not because of SGSC: the lower learning rate alone makes "
        f"{shown(row['1a-card-values-learning-rate'])} of that, γ alone {shown(row['1a-card-values-gamma'])}, and at a "
        f"common learning rate the accuracies differ by {shown(row['2-card-common-lr-adam'])} and "
        f"{shown(row['2-card-common-lr-sgsc'])}.",
        f"The best γ before Adam is {say('3-before-tuned')} as «close to 0», and SGSC's best learning rate is "
        f"{say('4-before-tuned')} as «lower than Adam's».",
        f"Behind Adam the same gate is another method: with a learning rate {shown(row['4-after-tuned'])} that "
        f"of Adam it "
        f"beats it by {shown(row['2-after-tuned'])} of test accuracy and {shown(row['2f-after-tuned'])} on the "
        f"fresh draw, "
        f"and its look-alikes at the same rate by {say('6-after-permuted')} (gates shuffled over parameters), "
        f"{say('6-after-layer-mean')} (their layer means) and {say('6-after-frozen')} (frozen at the first step).",
        "A low c marks a noisy gradient only weakly (rank correlation with the signal-to-noise ratio "
        f"{say('5-signal')}), and before Adam filtering by it does not explain smoothness: {say('5-before-permuted')} "
        f"against shuffled gates, {say('5-before-no-gate')} against no gate.",
    ]


def findings(claims_csv: Path) -> str:
    """Markdown: the abstract and a table of the card's claims about its own method; empty where there is no file."""
    if not claims_csv.exists():
        return ""
    claims = pd.read_csv(claims_csv)
    card = claims[
        (claims["source"] == "card") & ~claims["id"].str.contains("after") & claims["id"].str.match(r"[1-5]-")
    ]
    lines = ["| the card's claim | condition | n | estimate, 95 % interval | verdict |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['claim']} | {row['setting']} | {row['n']} | {shown(row)} | {row['verdict']} |"
        for _, row in card.iterrows()
    ]
    return "\n\n".join(["\n".join(f"- {sentence}" for sentence in abstract(claims)), "\n".join(lines)])


def update_readme(readme: Path, claims_csv: Path) -> None:
    """Put the findings between the README's two marks."""
    text, (begin, end) = readme.read_text(encoding="utf-8"), MARKS
    block = f"{begin}\n{findings(claims_csv)}\n{end}"
    beside = readme.with_name(f".{readme.name}.part")
    beside.write_text(
        re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL), encoding="utf-8"
    )
    beside.replace(readme)
