"""The findings in words: claims.csv in, Markdown out, for the top of the page and the README. No number is typed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd

MARKS = "<!-- findings: written by report/build.py from report/results/full/claims.csv -->", "<!-- /findings -->"


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
    """Five sentences on the card's five claims, the uncomfortable parts first; needs the rows of notebooks 02 to 04."""
    row = dict(claims.set_index("id").iterrows())

    def say(identity: str) -> str:
        return f"{shown(row[identity])}, **{row[identity]['verdict']}**"

    seeds = int(row["2-before-tuned"]["n"])
    return [
        f"SGSC is less accurate than Adam, says the card: with both tuned by equal searches and {seeds} paired "
        f"seeds the "
        f"card's method differs by {say('2-before-tuned')}; at SGSC's learning rate for both arms by "
        f"{say('2-before-common-lr-sgsc')}; at matched training loss by {say('2-before-matched-loss')}.",
        f"It is smoother, says the card: at tuned settings {say('1-before-tuned')}, at Adam's learning rate for "
        f"both arms "
        f"{say('1-before-common-lr-adam')}, at matched training loss {say('1-before-matched-loss')}.",
        f"The card's own two settings differ by {shown(row['1a-card-values-total'])}; its lower learning rate "
        f"alone makes "
        f"{shown(row['1a-card-values-learning-rate'])} of that, γ alone {shown(row['1a-card-values-gamma'])}.",
        f"The best γ of a study is {say('3-before-tuned')} as «close to 0», and SGSC's best learning rate is "
        f"{say('4-before-tuned')} as «lower than Adam's»; moved behind Adam, the gate ends at "
        f"{say('2-after-tuned')} as "
        "«less accurate» at its own tuned rate.",
        f"A low c does mark a noisy gradient (rank correlation {say('5-signal')}), but whether filtering those "
        f"smooths is "
        f"another matter: against the same gates shuffled over parameters {say('5-before-permuted')}, against "
        f"their layer "
        f"means {say('5-before-layer-mean')}.",
    ]


def findings(claims_csv: Path) -> str:
    """Markdown: the abstract and a table of the card's claims about its own method; empty without the rows for it."""
    if not claims_csv.exists():
        return ""
    claims = pd.read_csv(claims_csv)
    if not {"2-before-tuned", "3-before-tuned", "5-signal"} <= set(claims["id"]):
        return ""
    card = claims[
        (claims["source"] == "card") & ~claims["id"].str.contains("after") & claims["id"].str.match(r"[1-5]-")
    ]
    lines = ["| the card's claim | condition | n | estimate, 95 % interval | verdict |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['claim']} | {row['setting']} | {row['n']} | {shown(row)} | {row['verdict']} |"
        for _, row in card.iterrows()
    ]
    return "\n\n".join([" ".join(abstract(claims)), "\n".join(lines)])


def update_readme(readme: Path, claims_csv: Path) -> None:
    """Put the findings between the README's two marks."""
    text, (begin, end) = readme.read_text(encoding="utf-8"), MARKS
    block = f"{begin}\n{findings(claims_csv)}\n{end}"
    beside = readme.with_name(f".{readme.name}.part")
    beside.write_text(
        re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL), encoding="utf-8"
    )
    beside.replace(readme)
