"""The findings for the top of the page and the README: result files in, sentences, tables and a figure out.

No number is typed, and no verdict either: each sentence says what the verdict in claims.csv says, whichever that is.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from manifest import BuildError, read_manifest
from scipy.stats import norm

from sgsc_lib import result_problem, write_text

FIGURE = "report/findings.svg"  # the README's figure, from the project's root

# Conditions as claims.csv and comparisons.csv name them: how a reader meets them, in the order of reading.
CONDITIONS = {
    "card's values, before": "the card's settings",
    "card's values at common-lr (Adam's), before": "the card's γ, both at its Adam rate",
    "card's values at common-lr (SGSC's), before": "the card's γ, both at its SGSC rate",
    "tuned, before": "both tuned",
    "every search, before": "both tuned, every search",
    "common-lr (Adam's), before": "tuned γ, both at Adam's rate",
    "common-lr (SGSC's), before": "tuned γ, both at SGSC's rate",
    "matched-loss, before": "both tuned, to equal loss",
    "tuned, after": "gate after Adam, both tuned",
    "every search, after": "gate after Adam, every search",
    "matched-loss, after": "gate after Adam, to equal loss",
}

# The short table: claims by id, with both arms tuned (the best search's winner, and every search counted once), as the
# card ran them, and at one learning rate.
SHORT = [
    *(
        (f"{claim}-before-tuned", f"{claim}-before-searches", f"{claim}-card-values", f"{claim}-card-common-lr-adam")
        for claim in ("1", "1r", "2", "2f")
    ),
    (None, "3-before-tuned", None, None),
    (None, "4-before-tuned", None, None),
    ("5-signal", None, None, None),
    (None, None, None, "5-before-permuted"),
]

# What notebook 05 compares: claims by id, on the test set and on the fresh draw, each arm tuned at the same budget.
BEYOND = {
    "SGSC before Adam against Adam": ("7-sgsc-before", "7f-sgsc-before"),
    "SGSC after Adam against Adam": ("7-sgsc-after", "7f-sgsc-after"),
    **{
        f"SGSC after Adam{', both with cosine decay,' if number == 11 else ''} against {rival}": (
            f"{number}-sgsc-after-vs-{slug}",
            f"{number}f-sgsc-after-vs-{slug}",
        )
        for number, slug, rival in (
            (8, "after-shuffled-gates", "its gates shuffled over parameters"),
            (8, "adam-cosine-decay", "Adam with cosine decay"),
            (8, "adamw", "AdamW"),
            (8, "adam-label-smoothing", "Adam with label smoothing"),
            (11, "adam", "Adam"),
            (11, "adamw", "AdamW"),
            (11, "after-shuffled-gates", "its gates shuffled over parameters"),
            (11, "after-layer-means", "its gates averaged in each layer"),
            (11, "after-frozen-gates", "its gates frozen at the first step"),
        )
    },
}

SMOOTH = {
    "confirmed": "smoother than Adam's",
    "contradicted": "rougher than Adam's",
    "equivalent": "as rough as Adam's within the margin",
    "inconclusive": "not clearly smoother or rougher than Adam's",
}
ACCURATE = {
    "confirmed": "lower than Adam's",
    "contradicted": "higher than Adam's",
    "equivalent": "the same as Adam's within the margin",
    "inconclusive": "not clearly lower or higher than Adam's",
}
AGAINST = {
    "better": "more accurate than",
    "worse": "less accurate than",
    "equivalent": "as accurate within the margin as",
    "inconclusive": "not clearly more or less accurate than",
}
RISES = {
    "confirmed": "rises less than Adam's",
    "contradicted": "rises more than Adam's",
    "equivalent": "rises as much as Adam's within the margin",
    "inconclusive": "rises not clearly less or more than Adam's",
}
NOISE = {
    "confirmed": "marks a noisy gradient",
    "contradicted": "marks a clean gradient, not a noisy one",
    "inconclusive": "may or may not mark a noisy gradient",
}
NEAR_ZERO = {"confirmed": "below 0.1", "contradicted": "above 0.1", "inconclusive": "not clearly below or above 0.1"}
RATE = {
    "confirmed": "lower than Adam's",
    "contradicted": "higher than Adam's",
    "inconclusive": "not clearly lower or higher than Adam's",
}

WORDS = """\
The *card* is the short report whose claims are tested. The *gate* is the factor c^γ: *before Adam* (the card's
method) it scales the gradient that enters Adam, *after Adam* the finished update. *Paired* runs share initial
weights and batches. *Roughness* says how much the logarithm of the training loss bends from epoch to epoch, × 2 is
twice Adam's; a loss *rises* by so many nats in all. Brackets are 95 % intervals. *Equivalent*, or the same within
the margin: the 90 % interval lies within a margin fixed beforehand (1 point of accuracy, 10 % of roughness, 0.05
nats of rise), even where the 95 % interval leaves out 0. *Better*, *worse*, *confirmed*, *contradicted*: the 95 %
interval leaves out what no difference would be, 0 or × 1 (for the best γ: the 0.1 of the claim). *Inconclusive*, or
not clearly: neither. A *fresh draw* is a new, larger sample to test on. *Both tuned* compares the best winners of
several searches for the hyperparameters, on the seeds of the evaluation; *every search* counts each search once, by
its winner's mean over those seeds, so that it speaks of tuning and not of one winner. Gates *shuffled over
parameters*, *averaged in each layer* or *frozen at the first step* are look-alikes: where they do as well, it is
not the agreement of the signs that helps."""
NO_SENTENCES = "Sentences on the card's claims need the notebooks 02 to 05, with two searches or more."
REPLICA = " A *replica* is the whole study run once more with its sums rounded otherwise."

OPPOSITE = {"better": "worse", "worse": "better", "confirmed": "contradicted", "contradicted": "confirmed"}


def typeset(text: str) -> str:
    """Return numbers as print has them: a minus for a hyphen, and no line break within × 2.02 or [1.62, 2.53]."""
    return re.sub(r"(?<=×) |(?<=\d,) (?=[\d+−])", "\N{NO-BREAK SPACE}", re.sub(r"-(?=\d)", "−", text))


def shown(row: Mapping) -> str:
    """A claim's estimate and 95 % interval in the unit that a reader thinks in."""
    values, measure = [row["estimate"], row["ci_low"], row["ci_high"]], row["measure"]
    if "accuracy" in measure:
        pattern, values = "{:+.2f} points [{:+.2f}, {:+.2f}]", [100 * value for value in values]
    elif "smoothness (-log roughness)" in measure:  # more is smoother there; a reader wants the factor of roughness
        pattern, values = "roughness × {:.2f} [{:.2f}, {:.2f}]", [math.exp(-values[k]) for k in (0, 2, 1)]
    elif "log roughness" in measure:
        pattern, values = "roughness × {:.2f} [{:.2f}, {:.2f}]", [math.exp(value) for value in values]
    elif "log10" in measure:
        pattern, values = "× {:.2f} [{:.2f}, {:.2f}]", [10**value for value in values]
    elif "total rise" in measure:
        pattern, values = "rise {:+.3f} nats [{:+.3f}, {:+.3f}]", [-values[k] for k in (0, 2, 1)]
    else:
        pattern = "{:.2f} [{:.2f}, {:.2f}]"
    return typeset(pattern.format(*values))


def strength_of(correlation: float) -> str:
    """A word for the size of a correlation."""
    words = ((0.1, "very weakly"), (0.3, "weakly"), (0.6, "moderately"), (2, "strongly"))
    return next(word for limit, word in words if correlation < limit)


def said_of(
    row: dict[str, dict], there: dict[str, dict], *, numbers: bool = True
) -> Callable[[str, Mapping[str, str]], str]:
    """Return how to say a claim: its verdict in the given words and, with `numbers`, its estimate.

    Where the replica's claims, `there`, hold another verdict, it follows in brackets.
    """

    def said(identity: str, words: Mapping[str, str]) -> str:
        own, other = row[identity], there.get(identity, row[identity])
        estimate, its = (f": {shown(claim)}" if numbers else "" for claim in (own, other))
        text = f"**{words[own['verdict']]}**{estimate}"
        if other["verdict"] != own["verdict"]:
            text += f" (*replica: {words[other['verdict']]}*{its})"
        return text

    return said


def in_short(row: dict[str, dict], there: dict[str, dict]) -> str:
    """The answer in words alone, of what no search chose or every search counts in; empty without those claims."""
    rates, alone_rate = ("common-lr-adam", "common-lr-sgsc"), "1a-card-values-learning-rate"
    needed = {f"{claim}-card-{setting}" for claim in (1, 2) for setting in ("values", *rates)} | {
        alone_rate,
        *("1-before-searches", "2f-before-searches", "3-before-tuned", "2f-after-searches"),
        *(f"{number}f-sgsc-after-vs-adamw" for number in (8, 11)),
    }
    if not needed <= row.keys():
        return ""
    said = said_of(row, there, numbers=False)
    given, at_adams, at_sgscs = (
        f"{said(f'1-card-{setting}', SMOOTH)} and its accuracy {said(f'2-card-{setting}', ACCURATE)}"
        for setting in ("values", *rates)
    )
    one_rate = f"with its Adam rate for both, the loss is {at_adams}; with its SGSC rate for both, {at_sgscs}"
    if at_adams == at_sgscs:
        one_rate = f"with either of the two learning rates for both, {at_adams}"
    given_smooths, *gamma_smooths = (
        row[f"1-card-{setting}"]["verdict"] == "confirmed" for setting in ("values", *rates)
    )
    cause = ""
    if given_smooths and row[alone_rate]["verdict"] == "better" and not any(gamma_smooths):
        cause = " It is the lower learning rate that smooths, not γ."
    against = {verdict: f"{words} AdamW" for verdict, words in AGAINST.items()}
    return (
        f"In short: with the card's settings SGSC's training loss is {given}; {one_rate}.{cause} Tuned anew, with "
        f"every search counted, its loss is {said('1-before-searches', SMOOTH)} and its accuracy "
        f"{said('2f-before-searches', ACCURATE)}; its best γ is {said('3-before-tuned', NEAR_ZERO)}. With the gate "
        f"after Adam and so tuned, the accuracy is {said('2f-after-searches', ACCURATE)}; with one search for each it "
        f"is {said('8f-sgsc-after-vs-adamw', against)} and, both with cosine decay, "
        f"{said('11f-sgsc-after-vs-adamw', against)}."
    )


def abstract(row: dict[str, dict], there: dict[str, dict]) -> list[str]:
    """The answer in some sentences, from the claims by id; none where a claim that they need was not judged."""
    tuned = {f"{claim}-tuned" for claim in ("1-before", "1r-before", "2-before", "2f-before", "3-before", "4-before")}
    tuned |= {f"{claim}-searches" for claim in ("1-before", "1r-before", "2f-before", "2f-after")}
    given = {f"1-card-{rates}" for rates in ("values", "common-lr-adam", "common-lr-sgsc")}
    given |= {
        "1a-card-values-learning-rate",
        *(f"{claim}-before-common-lr-{arm}" for claim in (1, 2) for arm in ("adam", "sgsc")),
        "2-after-tuned",
        "2f-after-tuned",
        "3-after-tuned",
        "4-after-tuned",
        "5-signal",
    }
    if not tuned | given <= row.keys():
        return []

    said = said_of(row, there)

    def accuracy(place: str) -> str:
        return (
            f"its test accuracy is {said(f'2-{place}-tuned', ACCURATE)}; on a fresh draw "
            f"{said(f'2f-{place}-tuned', ACCURATE)}; there, with every search counted once, "
            f"{said(f'2f-{place}-searches', ACCURATE)}"
        )

    at_adams, at_sgscs = (
        f"{said(f'1-before-common-lr-{arm}', SMOOTH)} and its test accuracy "
        f"{said(f'2-before-common-lr-{arm}', ACCURATE)}"
        for arm in ("adam", "sgsc")
    )
    adams, sgscs = (shown(row[f"1-card-common-lr-{arm}"]).removeprefix("roughness ") for arm in ("adam", "sgsc"))
    signal = row["5-signal"]
    only = f", but only {strength_of(signal['estimate'])}" if signal["verdict"] == "confirmed" else ""
    missed = ""
    if row["2-before-tuned"]["verdict"] == "confirmed":
        missed = (
            " SGSC with γ = 0 is Adam, so a perfect search would cost it nothing; what it loses when tuned is the "
            "price of searching one parameter more with as many trials."
        )
    marks, _, correlation = said("5-signal", NOISE).partition(": ")
    return [
        f"With both tuned alike, SGSC's training loss is {said('1-before-tuned', SMOOTH)}, over "
        f"{row['1-before-tuned']['n']} paired seeds; with each of {row['1-before-searches']['n']} searches counted "
        f"once, which speaks of tuning and not of one winner, {said('1-before-searches', SMOOTH)}.",
        f"So tuned, over a whole run that loss {said('1r-before-tuned', RISES)}; with every search counted once it "
        f"{said('1r-before-searches', RISES)}.",
        f"Tuned alike, {accuracy('before')}.",
        f"Before Adam, the best γ of {row['3-before-tuned']['n']} independent searches is "
        f"{said('3-before-tuned', NEAR_ZERO)} on average; SGSC's best learning rate is {said('4-before-tuned', RATE)}.",
        f"With SGSC's tuned learning rate for both, its loss is {at_sgscs}; with Adam's tuned rate for both, it is "
        f"{at_adams}.{missed}",
        f"With the card's own settings SGSC's training loss is {said('1-card-values', SMOOTH)}. The lower learning "
        f"rate alone makes {shown(row['1a-card-values-learning-rate'])}; γ alone makes {adams} at Adam's rate and "
        f"{sgscs} at SGSC's.",
        f"A low c {marks}{only}: its rank correlation with the gradient's signal-to-noise ratio is {correlation}.",
        f"With the gate after Adam and tuned again, {accuracy('after')}. Its best γ is "
        f"{said('3-after-tuned', NEAR_ZERO)} on average, its learning rate {said('4-after-tuned', RATE)}.",
    ]


def beyond_the_card(row: dict[str, dict], there: dict[str, dict]) -> list[str]:
    """Sentences on what notebook 05 compared: the gate after Adam with its rivals, and both gates over a map."""
    said, sentences = said_of(row, there), []

    def against(rival: str) -> dict[str, str]:
        return {verdict: f"{words} {rival}" for verdict, words in AGAINST.items()}

    told = {"adamw": "AdamW", "after-shuffled-gates": "its gates shuffled over parameters"}
    plain, decaying = ({f"{number}f-sgsc-after-vs-{slug}": told[slug] for slug in told} for number in (8, 11))
    if {*plain, *decaying} <= row.keys():
        without, with_decay = (
            " and ".join(said(identity, against(rival)) for identity, rival in rivals.items())
            for rivals in (plain, decaying)
        )
        sentences.append(
            f"On a fresh draw, each tuned once more at equal budget, the gate after Adam is {without}. With cosine "
            f"decay for all, it is {with_decay}."
        )
    again = [[f"7f-sgsc-{place}", f"9-sgsc-{place}-vs-adam-0-128-equal-epochs"] for place in ("before", "after")]
    if {*again[0], *again[1]} <= row.keys():
        words = {verdict: told.removesuffix(" than").removesuffix(" as") for verdict, told in AGAINST.items()}
        before, after = (
            f"{said(contest, words)} in the contest and {said(cell, words)} in the map" for contest, cell in again
        )
        sentences.append(
            "Notebook 05 tuned SGSC and Adam twice more: for its contest of methods, and at every cell of its map over "
            "wrong labels and batch sizes, of which one has the study's own labels and batch size. On a fresh draw the "
            f"gate before Adam is {before}, both against Adam; the gate after Adam is {after}."
        )
    return sentences + over_the_map(row, there)


def over_the_map(row: dict[str, dict], there: dict[str, dict]) -> list[str]:
    """The sentences that count the verdicts over the cells of notebook 05's map, with clean and with wrong labels."""
    pairs = {
        "before-vs-adam": ("the gate before Adam is", "than Adam"),
        "after-vs-adam": ("the gate after Adam is", "than Adam"),
        "after-vs-adam-cosine-decay": ("the gate after Adam is", "than Adam with cosine decay"),
    }
    kinds = {
        "clean labels": r"0-\d+-equal-(epochs|steps)",
        "wrong training labels": r"0\.\d+-\d+-equal-epochs",
    }

    def verdicts(claims: dict[str, dict], cell: str) -> list[str]:
        return [claim["verdict"] for identity, claim in claims.items() if re.fullmatch(cell, identity)]

    sentences = []
    for kind, cells in kinds.items():
        parts = []
        for pair, (name, rival) in pairs.items():
            here, replica = (verdicts(claims, f"9-sgsc-{pair}-{cells}") for claims in (row, there))
            part = f"{name} **more accurate {rival} in {here.count('better')} and less in {here.count('worse')}**"
            if replica and sorted(replica) != sorted(here):
                part += f" (*replica: {replica.count('better')} and {replica.count('worse')}*)"
            parts += [part] if here else []
        if parts:
            n = len(verdicts(row, f"9-sgsc-after-vs-adam-{cells}"))
            sentences.append(f"Of the {n} cells of that map with {kind}, {'; '.join(parts)}.")
    return sentences


def bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def folded(title: str, *parts: str) -> str:
    """The parts that are not empty under a title that opens them; empty without any."""
    inside = [part for part in parts if part]
    return "\n\n".join([f"<details>\n<summary>{title}</summary>", *inside, "</details>"]) if inside else ""


def markdown_table(header: str, rows: list[list[str]]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) if rows else ""


def replica_of(results: Path) -> pd.DataFrame | None:
    """Return the claims of a study that differs from this one in arithmetic alone, from `results` + "-replica".

    None where there is no such folder, and, with a message, where it is damaged or not such a study.
    """
    folder = results.with_name(f"{results.name}-replica")
    if not folder.exists():
        return None

    def study(manifest: Mapping[str, Any]) -> dict[str, Any]:
        ran = {stem: (entry["sha256"], entry["parameters"]) for stem, entry in manifest["notebooks"].items()}
        return ran | {key: manifest[key] for key in ("library_sha256", "data_sha256", "python", "packages")}

    try:
        made, own = read_manifest(folder), read_manifest(results)
        there, here = study(made), study(own)
        problem = result_problem(folder / "claims.csv", made["results"]["claims.csv"])
        if differ := [key for key in there | here if there.get(key) != here.get(key)]:
            problem = f"it is of another study, in {', '.join(differ)}."
        if made["machine"]["arithmetic"] == own["machine"]["arithmetic"]:
            problem = "it has the same arithmetic as this study."
    except (KeyError, BuildError) as error:
        problem = f"it is damaged ({error})."
    if problem:
        print(f"The page leaves out {folder}: {problem} README.md says how to make it.", file=sys.stderr)
        return None
    return pd.read_csv(folder / "claims.csv")


def firmness(claims: pd.DataFrame, replica: pd.DataFrame) -> str:
    """How far the same study, rounded otherwise, comes to the same verdicts."""
    both = claims.merge(replica, on="id", suffixes=("", "_there"))
    same = both["verdict"] == both["verdict_there"]
    opposite = both["verdict_there"] == both["verdict"].map(OPPOSITE)
    once = ~opposite & (both["verdict"].isin(OPPOSITE) ^ both["verdict_there"].isin(OPPOSITE))
    named = "; ".join(
        f"{c['claim']}, {CONDITIONS.get(c['setting'], c['setting'])}: {shown(c)}, "
        f"there {shown({k: c.get(f'{k}_there', c[k]) for k in claims})}"
        for c in both[opposite].to_dict("records")
    )
    given = both["setting"].str.startswith("card's values")
    inside = both["estimate_there"].between(both["ci_low"], both["ci_high"])
    # Two such means differ by √2 times the error of one: Cumming and Maillardet 2006, Psychological Methods 11, 217.
    expected = 2 * norm.cdf(norm.ppf(0.975) / math.sqrt(2)) - 1
    said = (
        "**Would the same study say the same again?** The *replica* is the whole study run once more, with the same "
        "code, data and seeds, but its sums taken in another order, as vectors of another width do, which changes "
        f"their last bits. Runs then drift apart, and a search may end at another winner. Of {len(both)} verdicts "
        f"{same.sum()} are the same, {once.sum()} are definite in one of the two alone, "
        f"{(~same & ~once & ~opposite).sum()} change between equivalent and inconclusive, and "
        f"{opposite.sum()} {'is' if opposite.sum() == 1 else 'are'} the opposite{f' ({named})' if named else ''}. The "
        f"replica's estimate lies within this study's 95 % interval in {inside[given].sum()} of {given.sum()} cases on "
        "the card's own hyperparameters, which no search chose, and in "
        f"{100 * inside[~given].mean():.0f} % of the others; were seeds alone to make the difference, "
        f"{100 * expected:.0f} % would. So an interval speaks of the seeds on which a winner was "
        "evaluated, not of the search that found it; for that, count every search once. "
        "The tables give the replica's verdict where it differs."
    )
    return said.replace(" %", "\N{NO-BREAK SPACE}%")


def alone(claims: pd.DataFrame) -> str:
    """What the number of verdicts does to them."""
    definite = claims["verdict"].isin(OPPOSITE).sum()
    return (
        f"Each verdict stands for itself, uncorrected for their number: of all {len(claims)} in the study's "
        f"claims.csv, {definite} are definite (better, worse, confirmed or contradicted), where "
        f"{0.05 * len(claims):.0f} at most would be on average if nothing differed."
    )


def findings(claims_csv: Path, replica: pd.DataFrame | None = None) -> str:
    """Markdown: the answer, the card's claims in short, and every verdict on them folded; empty without the file.

    Where a `replica` comes to another verdict, it stands beside.
    """
    if not claims_csv.exists():
        return ""
    claims = pd.read_csv(claims_csv)
    row = {claim["id"]: claim for claim in claims.to_dict("records")}
    there = {} if replica is None else {claim["id"]: claim for claim in replica.to_dict("records")}

    def verdict_of(claim: Mapping) -> str:
        return f"**{claim['verdict']}** {shown(claim)}"

    def cell(identity: str | None) -> str:
        if identity not in row:
            return "–"
        differs = identity in there and there[identity]["verdict"] != row[identity]["verdict"]
        return verdict_of(row[identity]) + (f"<br>replica: {verdict_of(there[identity])}" if differs else "")

    def where(identity: str | None) -> str:
        return f"<br>({CONDITIONS.get(row[identity]['setting'], row[identity]['setting'])})" if identity in row else ""

    short = [
        [next(row[k] for k in ids if k in row)["claim"], *map(cell, ids[:-1]), cell(ids[-1]) + where(ids[-1])]
        for ids in SHORT
        if {*ids} & row.keys()
    ]
    beyond = [
        [claim, *map(cell, ids), str(next(row[k] for k in ids if k in row)["n"])]
        for claim, ids in BEYOND.items()
        if {*ids} & row.keys()
    ]
    place = {condition: k for k, condition in enumerate(CONDITIONS)}
    card = sorted(
        (claim for identity, claim in row.items() if claim["source"] == "card" and "after" not in identity),
        key=lambda claim: (claim["id"].split("-")[0], place.get(claim["setting"], len(place))),
    )
    whole = [
        [
            *(c["claim"], CONDITIONS.get(c["setting"], c["setting"]), str(c["n"]), shown(c), c["verdict"]),
            *([verdict_of(there[c["id"]]) if c["id"] in there else "–"] if there else []),
        ]
        for c in card
    ]
    short_header = "| The card's claim | both tuned | every search | at the card's settings | at one learning rate |"
    whole_header = "| The card's claim, before Adam | condition | n | estimate, 95 % interval | verdict |"
    beyond_header = "| Beyond the card, all tuned anew (notebook 05) | on the test set | on a fresh draw | n |"
    parts = [
        in_short(row, there),
        folded("The words used here", WORDS + (REPLICA if there else "")),
        bullets(abstract(row, there)) or NO_SENTENCES,
        markdown_table(short_header, short),
        alone(claims),
        "" if replica is None else firmness(claims, replica),
        folded(
            "Past the card: the gate after Adam and its rivals, wrong labels, other batches",
            bullets(beyond_the_card(row, there)),
            markdown_table(beyond_header, beyond),
        ),
        folded(
            f"Every verdict on the card's claims, the gate before Adam ({len(whole)})",
            markdown_table(whole_header + (" replica |" if there else ""), whole),
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def forest(comparisons_csv: Path, **saved: Any) -> tuple[str, str, str]:
    """SVG, caption and written alternative of the figure of every condition's paired differences from Adam.

    `saved` goes to `savefig`.
    """
    table = pd.read_csv(comparisons_csv)
    table = table[table["setting"].isin(CONDITIONS)]
    panels = {  # measure: title, axis label, what a value is to a reader
        "test accuracy": ("Final test accuracy", "SGSC minus Adam, points", lambda value: 100 * value),
        "smoothness (-log roughness)": ("Roughness of the loss", "SGSC over Adam", lambda value: np.exp(-value)),
    }
    settings = [setting for setting in CONDITIONS if setting in set(table["setting"])]
    looks: dict[str, dict[str, Any]] = {  # by verdict; told apart by shape as well as by colour
        "better": {"marker": "^", "color": "C2"},
        "worse": {"marker": "v", "color": "C1"},
        "equivalent": {"marker": "D", "color": "C0"},
        "inconclusive": {"marker": "o", "color": "0.35", "mfc": "w"},
    }
    told = []
    with plt.style.context(Path(__file__).with_name("sgsc.mplstyle")):
        fig, axes = plt.subplots(1, 2, figsize=(7.6, 1.4 + 0.3 * len(settings)), sharey=True)
        for ax, (measure, (title, label, read)) in zip(axes, panels.items(), strict=True):
            rows = table[table["measure"] == measure].set_index("setting").reindex(settings)
            ax.axvspan(*sorted(read(side * rows["margin"].iloc[0]) for side in (-1, 1)), color="0.6", alpha=0.3, lw=0)
            ax.axvline(read(0), color="0.3", linewidth=0.8)
            for y, (setting, row) in enumerate(rows.iterrows()):
                value = read(row["mean_difference"])
                low, high = sorted([read(row["ci_low"]), read(row["ci_high"])])
                ax.plot([low, high], [y, y], color=looks[row["verdict"]]["color"])
                ax.plot(value, y, linestyle="", **looks[row["verdict"]])
                told.append(f"{CONDITIONS[setting]}: {value:.2f} [{low:.2f}, {high:.2f}], {row['verdict']}")
            told[-len(rows)] = f"{title}, {label}. {told[-len(rows)]}"
            ax.set(title=title, xlabel=label)
        axes[1].set_xscale("log")
        low, high = axes[1].get_xlim()
        axes[1].xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axes[1].xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"× {value:g}"))
        axes[1].xaxis.set_minor_locator(plt.NullLocator())
        axes[0].set_yticks(range(len(settings)), [CONDITIONS[setting] for setting in settings])
        axes[0].invert_yaxis()
        handles = [plt.Line2D([], [], linestyle="", label=verdict, **look) for verdict, look in looks.items()]
        fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None}, **saved)
        plt.close(fig)
    caption = (
        f"SGSC against Adam in {len(settings)} conditions: mean paired difference with its 95 % interval over "
        f"{table['n'].max()} seeds (where it says every search, over {table['n'].min()} searches), and the verdict on "
        "SGSC. Grey: the margin of what matters, fixed beforehand. Left, further right is more accurate; right, "
        "further left is smoother. A gate after Adam at a common learning rate is left out, as its differences are of "
        "another scale: see the table of verdicts in 03_evaluation."
    )
    return buffer.getvalue().decode(), typeset(caption), typeset("; ".join(told))


def forest_figure(comparisons_csv: Path) -> str:
    """HTML: the forest figure, inlined."""
    svg, caption, alt = forest(comparisons_csv)
    source = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure id="fig-findings"><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def readme(text: str, results: Path, said: str) -> tuple[str, str]:
    """The README with what the results say between its marks, and its figure as SVG, white behind for a dark page.

    `said` are the `findings`.
    """
    svg, caption, alt = forest(results / "comparisons.csv", facecolor="white", transparent=False)
    picture = f'<img src="{FIGURE}" alt="{html.escape(alt)}">\n\n{caption}'
    sentences, tables = re.split(r"\n\n(?=\|)", said, maxsplit=1)  # the picture stands before the first table
    training = [entry["training"] for entry in read_manifest(results)["notebooks"].values()]
    minutes = sum(trained["seconds"] for trained in training) / 60
    machines = " and ".join(sorted({trained["machine"] for trained in training}))
    for name, content in {
        "findings": f"{sentences}\n\n{picture}\n\n{tables}",
        "time": f"With an empty cache, the notebooks of `make report` took {minutes:.0f} minutes in all on {machines}.",
    }.items():
        before, begin, rest = re.split(f"(<!-- {name}: .*? -->\n)", text, maxsplit=1)
        text = f"{before}{begin}{content}\n{rest[rest.index(f'<!-- /{name} -->') :]}"
    return text, svg


def update_readme(root: Path, results: Path, said: str) -> None:
    """Put what the results say, `said` in words, into the README and its figure."""
    text, svg = readme((root / "README.md").read_text(encoding="utf-8"), results, said)
    write_text(text, root / "README.md")
    write_text(svg, root / FIGURE)
