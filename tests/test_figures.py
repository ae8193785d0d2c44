"""Figures and tables as a reader sees them."""

import base64

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from sgsc_study import COLOURS, compare_paired, figure, forest, in_halves, in_words, name_lines, table


def test_figures_and_tables_are_shown_with_escaped_words(monkeypatch):
    shown, frame = [], pd.DataFrame({"p": [0.0312, None], "name": ["<i>", None]}).rename_axis(columns="axis")
    monkeypatch.setattr("IPython.display.display", lambda html: shown.append(BeautifulSoup(html.data, "html.parser")))
    figure(fig := plt.figure(), "a-b", caption="<b>Two</b> & more.", alt='A "line".')
    table(frame, "p", title="2 < 3.", caption="Some <p>.", formats={"p": "{:.2f}"})
    image, made = (soup.figure for soup in shown)
    assert (image["id"], image.figcaption.text, image.img["alt"]) == ("fig-a-b", "<b>Two</b> & more.", 'A "line".')
    kind, _, data = image.img["src"].partition(";base64,")
    assert kind == "data:image/svg+xml" and b"</svg>" in base64.b64decode(data) and not plt.fignum_exists(fig.number)
    cells = [[cell.text for cell in row.select("th, td")] for row in made.select("tr")]
    assert cells == [["p", "name"], ["0.03", "<i>"], ["–", "–"]] and frame.loc[0, "p"] == 0.0312
    assert (made["id"], made["class"], made.figcaption.text) == ("tbl-p", ["table"], "2 < 3. Some <p>.")
    assert made.figcaption.strong.text == "2 < 3." and not image.figcaption.strong


@pytest.mark.parametrize("label", ["loss curves", "", 'x" onload="'])
def test_labels_that_no_link_could_name_and_figures_without_words_are_refused(label):
    with pytest.raises(ValueError, match="`label`"):
        table(pd.DataFrame({"p": [1]}), label, caption="A table.")
    for words, name in (({"alt": "Empty."}, "`label`"), ({"alt": " "}, "`alt`")):
        with pytest.raises(ValueError, match=name):
            figure(plt.figure(), label, caption="A figure.", **words)
    plt.close("all")


@pytest.mark.parametrize(("measure", "said"), [
    ("fresh accuracy", "+10.00 [-5.00, +20.00] better"),
    ("log roughness", "× 1.11 [0.95, 1.22] rougher"),
    ("total rise", "+0.100 [-0.050, +0.200] rougher"),
])  # fmt: skip
def test_a_comparison_is_shown_in_the_unit_and_the_words_of_its_measure(measure, said):
    numbers = pd.Series({"mean_difference": 0.1, "ci_low": -0.05, "ci_high": 0.2})
    assert in_words(pd.concat([numbers, pd.Series({"verdict": "better"})]), measure) == said
    assert in_words(pd.concat([numbers, pd.Series({"verdict": "equivalent"})]), measure).endswith(" equivalent")


def test_a_forest_has_a_row_for_each_comparison_with_its_intervals_in_the_unit_that_is_read():
    found = in_halves(compare_paired, [0.71, 0.69, 0.73, 0.72], [0.66, 0.65, 0.67, 0.68], margin=0.01)
    ax = plt.subplots()[1]
    forest(ax, {"one": found, "two": found}, xlabel="points", margin=0.02)
    lines = [line.get_xydata() for line in ax.get_lines() if len(line.get_xdata()) == 2][1:]  # the first is at 0
    assert len(lines) == 6 and [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert lines[3][:, 0] == pytest.approx([100 * found[0].ci_low, 100 * found[0].ci_high])
    assert lines[3][0, 1] == 1 and ax.patches[0].get_width() == pytest.approx(4) and ax.yaxis.get_inverted()


def test_what_lies_beyond_the_reach_of_a_forest_is_written_at_its_end():
    far, near = (in_halves(compare_paired, [0.7, 0.7, 0.7, x], [0.5, 0.5, 0.5, x], margin=0.01) for x in (0.5, 0.49))
    ax = plt.subplots()[1]
    forest(ax, {"far": far, "near": [each._replace(mean_difference=-0.02) for each in near]}, xlabel="points", reach=5)
    (text,) = ax.texts
    assert ax.get_xlim() == (-5, 5) and (text.get_text().strip(), text.get_position()[0]) == ("+15", 5)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_stand_beside_their_lines_in_order_and_none_covers_another(scale):
    fig, ax = plt.subplots()
    ax.set(ylim=(0.01, 1), yscale=scale)
    heights = {"top": 0.9, "one": 0.5, "gone": float("nan"), "two\nlines": 0.5, "low": 0.02}
    ends = {name: (height, "k") for name, height in heights.items()}
    name_lines(ax, ends)
    fig.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert list(boxes) == ["low", "one", "two\nlines", "top"]
    edges = [edge for box in boxes.values() for edge in (box.y0, box.y1)]
    assert edges == sorted(edges) and min(box.x0 for box in boxes.values()) > ax.bbox.x1
    assert boxes["low"].y0 < ax.transData.transform((0, 0.02))[1] < boxes["low"].y1


def test_no_two_arms_have_one_colour():
    assert len({*COLOURS.values()}) == len(COLOURS)
