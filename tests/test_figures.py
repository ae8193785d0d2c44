"""Figures and tables as a reader sees them."""

import base64

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from sgsc_study import figure, table, with_interval


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, parsed."""
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    return lambda: BeautifulSoup(displayed.pop().data, "html.parser").figure


def test_a_figure_is_an_svg_with_escaped_words_and_is_closed(shown):
    fig, axes = plt.subplots()
    axes.plot([1, 2])
    figure(fig, "two-lines", caption="<b>Two</b> & more.", alt='A "line".')
    made = shown()
    assert (
        made["id"] == "fig-two-lines"
        and made.figcaption.text == "<b>Two</b> & more."
        and made.img["alt"] == 'A "line".'
    )
    kind, _, data = made.img["src"].partition(";base64,")
    assert kind == "data:image/svg+xml" and b"</svg>" in base64.b64decode(data)
    assert not plt.fignum_exists(fig.number)


def test_a_table_is_formatted_and_escaped_and_leaves_its_frame_alone(shown):
    frame = pd.DataFrame({"p": [0.0312, None], "name": ["<i>", None]}).rename_axis(columns="axis")
    before = frame.copy()
    table(frame, "p", caption="Some <p>.", formats={"p": "{:.2f}"})
    made = shown()
    assert made["id"] == "tbl-p" and made["class"] == ["table"] and made.figcaption.text == "Some <p>."
    cells = [[cell.text for cell in row.select("th, td")] for row in made.select("tr")]
    assert cells == [["p", "name"], ["0.03", "<i>"], ["–", "–"]]
    pd.testing.assert_frame_equal(frame, before)


def test_a_number_and_its_interval():
    assert with_interval("{:+.1f}", 1.24, -0.5, 3.0) == "+1.2 [-0.5, +3.0]"


@pytest.mark.parametrize("label", ["loss curves", "", 'x" onload="'])
def test_labels_that_no_link_could_name_are_refused(label):
    with pytest.raises(ValueError, match="`label`"):
        table(pd.DataFrame({"p": [1]}), label, caption="A table.")
    with pytest.raises(ValueError, match="`label`"):
        figure(plt.figure(), label, caption="A figure.", alt="Empty.")


@pytest.mark.parametrize("words", [{"caption": " ", "alt": "Empty."}, {"caption": "A figure.", "alt": ""}], ids=str)
def test_a_figure_without_words_is_refused(words):
    with pytest.raises(ValueError, match="alt"):
        figure(plt.figure(), "empty", **words)
    plt.close("all")
