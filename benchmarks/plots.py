"""The benchmark's two figures, as SVG text: what a pass and a training run cost, and how the cost of a pass grows."""

import io
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

STYLE = Path(__file__).resolve().parents[1] / "report" / "sgsc.mplstyle"
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # 10 and not 10¹


def as_svg(fig: Figure) -> str:
    buffer = io.StringIO()
    # White behind it, as a dark page shows it too.
    fig.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white", transparent=False)
    plt.close(fig)
    return buffer.getvalue()


def styled() -> None:
    if STYLE.exists():
        plt.style.use(STYLE)


def bars(statistic: pd.DataFrame, training: pd.DataFrame) -> str:
    """A panel a model and one for training runs, of the rows on most cores."""
    styled()
    statistic = statistic[(statistic.cores == statistic.cores.max()) & statistic.ratio.notna()]
    most = training[training.cores == training.cores.max()]
    panels = [
        (f"{model}, B = {table.batch_size.iloc[0]}", "a pass, time / plain", table)
        for model, table in statistic.groupby("model", sort=False)
    ]
    panels.append((f"A training run on {most.cores.iloc[0]} cores", "a run, time / stacked", most))
    rows = -(-len(panels) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(7.6, 2.35 * rows), squeeze=False)
    for ax, (title, label, table) in zip(axes.flat, panels, strict=False):
        table = table.iloc[::-1]
        errors = [table.ratio - table.ratio_low, table.ratio_high - table.ratio]
        colours = ["C0" if own else "C1" for own in table.method.str.contains("SGSC|stacked")]
        colours = [
            "0.6" if method.startswith(("plain", "hooks")) else own
            for method, own in zip(table.method, colours, strict=True)
        ]
        ax.barh(table.method, table.ratio - 0.7, left=0.7, color=colours, xerr=errors, ecolor="0.3", height=0.65)
        for y, (value, high) in enumerate(zip(table.ratio, table.ratio_high, strict=True)):
            ax.annotate(f" {value:.3g}", (high, y), va="center", fontsize=8)
        ax.set(xscale="log", xlabel=label, xlim=(0.7, table.ratio_high.max() * 4))
        ax.set_title(title, fontsize=8.8)
        ax.xaxis.set_major_formatter(PLAIN)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_size(8.5)
        ax.grid(visible=False, axis="y")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    return as_svg(fig)


def lines(scaling: pd.DataFrame) -> str:
    """A panel each for the batch size, the width and the number of positions; SGSC and vmap over a plain pass."""
    styled()
    titles = {
        "batch size": "40-128-128-10",
        "width": "40-width-width-10, B = 128",
        "positions": "Linear on sequences, B = 32",
    }
    fig, axes = plt.subplots(1, 3, figsize=(7.6, 2.9), sharey=True)
    scaling = scaling[scaling.method != "plain backward"]
    for ax, (panel, title) in zip(axes, titles.items(), strict=True):
        here = scaling[scaling.panel == panel]
        for colour, marker, (method, table) in zip(
            ("C0", "C1"), "os", here.groupby("method", sort=False), strict=False
        ):
            errors = [table.ratio - table.ratio_low, table.ratio_high - table.ratio]
            ax.errorbar(table["size"], table.ratio, errors, color=colour, marker=marker, capsize=2, label=method)
        ax.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
        sizes = sorted(here["size"].unique())
        ax.set(xscale="log", yscale="log", xlabel=panel)
        ax.set_xticks(sizes, [f"{size}" for size in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(PLAIN)
        ax.tick_params(labelsize=8.5)
        ax.set_title(title, fontsize=9)
        ax.xaxis.label.set_size(9.5)
    axes[0].set_ylabel("a pass, time / plain", fontsize=9.5)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return as_svg(fig)
