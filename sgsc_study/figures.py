"""Figures and tables as a reader sees them: captioned, described in words, escaped."""

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

COLOURS = {  # an arm has one colour in every figure, by Okabe and Ito's, some darker so that a thin line is seen
    "Adam": "#0072B2", "Adam at SGSC's rate": "#333333", "SGSC before": "#D55E00", "SGSC after": "#009E73",
    "AdamW": "#6B6B6B", "SGD": "#A87400", "Muon": "#A8487F",
}  # fmt: skip
GREYS = "0.1", "0.3", "0.45", "0.55"  # for what is no arm, in order


def with_interval(pattern: str, mean: float, low: float, high: float) -> str:
    """A number and its interval, each by the format `pattern`.

    >>> with_interval("{:+.2f}", 1.4, 0.47, 2.32)
    '+1.40 [+0.47, +2.32]'
    """
    return "{} [{}, {}]".format(*(pattern.format(value) for value in (mean, low, high)))


def verdict_in_words(verdict: str, measure: str) -> str:
    """A verdict as a reader meets it: more roughness or total rise is rougher, not better.

    >>> verdict_in_words("worse", "log roughness")
    'smoother'
    """
    rough = "roughness" in measure or "rise" in measure
    return {"better": "rougher", "worse": "smoother"}.get(verdict, verdict) if rough else verdict


def in_words(found: Any, measure: str) -> str:
    """A comparison `found` as a table shows it: the difference with its 95 % interval, and the verdict.

    An accuracy is in points, log roughness a factor, total rise in nats.

    >>> from sgsc_study.measures import compare_paired
    >>> in_words(compare_paired([0.71, 0.69, 0.73, 0.72], [0.66, 0.65, 0.67, 0.68], margin=0.01), "fresh accuracy")
    '+4.75 [+3.23, +6.27] better'
    """
    numbers = np.array([found.mean_difference, found.ci_low, found.ci_high])
    if "accuracy" in measure:
        shown = with_interval("{:+.2f}", *(100 * numbers))
    elif "roughness" in measure:
        shown = "× " + with_interval("{:.2f}", *np.exp(numbers))
    else:
        shown = with_interval("{:+.3f}", *numbers)
    return f"{shown} {verdict_in_words(found.verdict, measure)}"


def forest(
    ax: Any, rows: Mapping[str, Sequence[Any]], *, xlabel: str, read: Callable[[float], float] | None = None,
    margin: float = 0.01, reach: float | None = None,
) -> None:  # fmt: skip
    """Draw comparisons as intervals, a row each: of all seeds, thick, and of both halves, as `in_halves` gives them.

    `read` turns a difference into what the axis shows; left out, an accuracy into points. Grey: within the `margin`.
    With `reach` the axis ends there on both sides of 0, and a difference beyond it is written at that end.

    >>> from sgsc_study.measures import compare_paired, in_halves
    >>> found = in_halves(compare_paired, [0.71, 0.69, 0.73, 0.72], [0.66, 0.65, 0.67, 0.68], margin=0.01)
    >>> ax = plt.subplots()[1]
    >>> forest(ax, {"gated": found}, xlabel="points")
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['gated']
    """
    read = read or (lambda value: 100 * value)
    ax.axvspan(read(-margin), read(margin), color="0.6", alpha=0.3, lw=0)
    ax.axvline(read(0), color="0.3", linewidth=0.8)
    for y, three in enumerate(rows.values()):
        for k, (each, mark) in enumerate(zip(three, "o<>", strict=True)):
            colour = GREYS[2 * min(k, 1)]
            ax.plot([read(each.ci_low), read(each.ci_high)], [y + 0.2 * k] * 2, color=colour, lw=0.9 if k else 2.2)
            ax.plot(read(each.mean_difference), y + 0.2 * k, mark, color=colour, markersize=3.5 if k else 6)
        if reach and abs(middle := read(three[0].mean_difference)) > reach:
            side = "right" if middle > 0 else "left"
            ax.text(np.copysign(reach, middle), y - 0.2, f" {middle:+.0f} ", fontsize=8, ha=side)
    if reach:
        ax.set_xlim(-reach, reach)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(xlabel)


def name_lines(ax: Any, ends: Mapping[str, tuple[float, str]], *, fontsize: float = 8.5) -> None:
    """Write the names of lines beside their right ends, so far apart that none covers another, instead of a legend.

    `ends` has by name the line's last value and its colour. To be called when the axis's limits are final.

    >>> ax = plt.subplots()[1]
    >>> name_lines(ax, {"one": (0.5, "k"), "two": (0.5, "r")})
    >>> one, two = (text.xy[1] for text in ax.texts)
    >>> bool(two - one > 0.03)
    True
    """
    line = 1.2 * fontsize / 72 / (ax.get_position().height * ax.figure.get_figheight())
    size = {name: line * len(name.splitlines()) for name in ends}
    shown = {name: value for name, (value, _) in ends.items() if np.isfinite(value)}
    where = ax.transData.transform([(0, value) for value in shown.values()] or np.empty((0, 2)))
    height = dict(zip(shown, ax.transAxes.inverted().transform(where)[:, 1], strict=True))
    order = sorted(height, key=height.get)  # type: ignore[arg-type]  # every name has a height
    for _ in range(200):  # neighbours that are too close move apart
        for below, above in pairwise(order):
            if (near := (size[below] + size[above]) / 2 - (height[above] - height[below])) > 0:
                height[below], height[above] = height[below] - near / 2, height[above] + near / 2
    for name in order:
        ax.annotate(name, (1.01, height[name]), xycoords="axes fraction", color=ends[name][1], fontsize=fontsize,
                    va="center", annotation_clip=False)  # fmt: skip


def _show(label: str, begin: str, inside: str) -> None:
    from IPython.display import HTML, display

    if not re.fullmatch(r"[\w-]+", label):
        raise ValueError(f"`label` should be letters, digits and hyphens, for links to it. Found {label!r}.")
    display(HTML(f"{begin}{inside}</figure>"))


def _caption(title: str, caption: str) -> str:
    said = f"<strong>{html.escape(title)}</strong> " if title else ""
    joined = re.sub(r"(?<=×) (?=\d)| (?=%)", "\N{NO-BREAK SPACE}", f"{said}{html.escape(caption)}")
    return f"<figcaption>{joined}</figcaption>"


def figure(fig: Any, label: str, *, caption: str, alt: str, title: str = "") -> None:
    """Display a matplotlib figure as SVG with a caption and a written alternative, and close it.

    `label`, of letters, digits and hyphens, becomes the id `fig-<label>` that text refers to. `title` says what the
    figure shows, with numbers from the data. All words are escaped. Raises ValueError for another label, and where
    caption or alternative are empty.

    >>> figure(plt.figure(), "empty", caption="Nothing.", alt="An empty figure.")
    <IPython.core.display.HTML object>
    """
    if not alt.strip() or not caption.strip():
        raise ValueError(f"Figure {label!r} should have a caption and an `alt`. Found {caption!r} and {alt!r}.")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(fig)
    image = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    shown = f'<img alt="{html.escape(alt)}" src="{image}">{_caption(title, caption)}'
    _show(label, f'<figure id="fig-{label}">', shown)


def table(
    frame: pd.DataFrame, label: str, *, caption: str, title: str = "", formats: Mapping[str, str] | None = None
) -> None:
    """Display a table with a caption; `formats` gives a format string a column, like "{:.3f}". Text is escaped.

    >>> table(pd.DataFrame({"p": [0.0312]}), "p", caption="One p value.", formats={"p": "{:.2f}"})
    <IPython.core.display.HTML object>
    """
    shown = frame.rename_axis(columns=None)  # pandas would print the axis's name as one more column
    for column, pattern in (formats or {}).items():
        shown[column] = [pattern.format(value) if pd.notna(value) else "–" for value in frame[column]]
    body = f'<div class="scroll">{shown.to_html(index=False, border=0, escape=True, na_rep="–")}</div>'
    _show(label, f'<figure id="tbl-{label}" class="table">', f"{_caption(title, caption)}{body}")
