"""Figures and tables as a reader sees them: captioned, described in words, escaped."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd


def with_interval(pattern: str, mean: float, low: float, high: float) -> str:
    """A number and its interval, each by the format `pattern`.

    >>> with_interval("{:+.2f}", 1.4, 0.47, 2.32)
    '+1.40 [+0.47, +2.32]'
    """
    return "{} [{}, {}]".format(*(pattern.format(value) for value in (mean, low, high)))


def _check_label(label: str) -> str:
    if not re.fullmatch(r"[\w-]+", label):
        raise ValueError(f"`label` should be letters, digits and hyphens, for links to it. Found {label!r}.")
    return label


def figure(fig: Any, label: str, *, caption: str, alt: str) -> None:
    """Display a matplotlib figure as SVG with a caption and a written alternative, and close it.

    `label`, of letters, digits and hyphens, becomes the id `fig-<label>` that text refers to. Caption and alternative
    are escaped. Raises ValueError for another label, and where caption or alternative are empty.

    >>> import matplotlib.pyplot as plt
    >>> figure(plt.figure(), "empty", caption="Nothing.", alt="An empty figure.")
    <IPython.core.display.HTML object>
    """
    import matplotlib.pyplot as plt
    from IPython.display import HTML, display

    if not alt.strip() or not caption.strip():
        raise ValueError(
            f"Figure {label!r} should have a caption and an alternative text. Found {caption!r} and {alt!r}."
        )
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(fig)
    source = base64.b64encode(buffer.getvalue()).decode()
    display(
        HTML(
            f'<figure id="fig-{_check_label(label)}"><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,'
            f'{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    )


def table(frame: pd.DataFrame, label: str, *, caption: str, formats: Mapping[str, str] | None = None) -> None:
    """Display a table with a caption; `formats` gives a format string a column, like "{:.3f}". Text is escaped.

    >>> table(pd.DataFrame({"p": [0.0312]}), "p", caption="One p value.", formats={"p": "{:.2f}"})
    <IPython.core.display.HTML object>
    """
    from IPython.display import HTML, display

    shown = frame.rename_axis(columns=None)  # pandas would print the axis's name as one more column
    for column, pattern in (formats or {}).items():
        shown[column] = [pattern.format(value) if pd.notna(value) else "–" for value in frame[column]]
    body = shown.to_html(index=False, border=0, escape=True, na_rep="–")
    display(
        HTML(
            f'<figure id="tbl-{_check_label(label)}" class="table"><figcaption>{html.escape(caption)}</figcaption>'
            f'<div class="scroll">{body}</div></figure>'
        )
    )
