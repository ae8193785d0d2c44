"""Turn the benchmark's two tables into a plot and a page of markdown, for docs/benchmark.md and in short the README.

The aims were set before anything was measured.

    python summary.py             results/benchmark.svg, and the tables in docs/benchmark.md and the README
    python summary.py --quick     the same from results/quick, to results/quick/benchmark.md
"""

import argparse
import io
from pathlib import Path

import matplotlib
import pandas as pd
from timing import RESULTS

from sgsc_study.results import write_text

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FLOOR, OURS, SCALED = "plain backward", "SGSC, statistic", "SGSC, scale_gradients_"
PARTS = ("hooks that do nothing", "hooks and sign products")  # no methods: they show where SGSC's time goes
WIDE, SMALL = "784-1024-1024-10", "40-128-128-10"
PAGE = ROOT / "docs" / "benchmark.md"
MARKS = "<!-- {0}: written by benchmarks/{1} from benchmarks/results -->\n", "<!-- /{0} -->"
PICTURE = (
    '<img src="../benchmarks/results/benchmark.svg" alt="Bar charts: the time of a pass over that of a plain one, for '
    "SGSC and its peers on three models; the time of a training run over that of the stacked one. The tables below "
    'hold every number.">\n\n'
)


def aims(statistic: pd.DataFrame, training: pd.DataFrame) -> pd.DataFrame:
    """What was aimed at, and what came out."""
    rows = []

    def add(what: str, limit: float, value: float, low: float, high: float, *, at_most: bool) -> None:
        reached = value <= limit if at_most else value >= limit
        aim = f"{what} {'≤' if at_most else '≥'} {limit:g}"
        spread = "" if pd.isna(low) else f"{low:.2f} to {high:.2f}"
        rows.append({"aim": aim, "measured": f"{value:.2f}", "interval": spread, "reached": "yes" if reached else "no"})

    for model, limits, faster in ((WIDE, (1.5, 1.6), 70), (SMALL, (1.7, 2.0), 5)):
        table = statistic[statistic.model == model].set_index("method")
        if table.empty:
            continue
        for method, limit in zip((OURS, SCALED), limits, strict=True):
            row = table.loc[method]
            add(f"{model}: {method}, time / plain", limit, row.ratio, row.ratio_low, row.ratio_high, at_most=True)
            if model == WIDE and "peak_ratio" in row:
                add(
                    f"{model}: {method}, peak memory of the process / plain",
                    1.1,
                    row.peak_ratio,
                    pd.NA,
                    pd.NA,
                    at_most=True,
                )
        peers = table.drop(index=[FLOOR, OURS, SCALED, *PARTS])
        best = peers.loc[peers.times_sgsc.idxmin()]
        add(
            f"{model}: fastest peer ({best.name}), time / {OURS}",
            faster,
            best.times_sgsc,
            best.times_sgsc_low,
            best.times_sgsc_high,
            at_most=False,
        )
    for cores, table in training.groupby("cores"):
        for start, limit in (("vmap", 20), ("JAX", 5)):
            rivals = table[table.method.str.startswith(start)]
            best = rivals.loc[rivals.ratio.idxmin()]
            add(
                f"a training run on {cores} core{'s' if cores > 1 else ''}: {best.method}, time / stacked",
                limit,
                best.ratio,
                best.ratio_low,
                best.ratio_high,
                at_most=False,
            )
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "".join(
        "| " + " | ".join("–" if str(cell) in ("nan", "<NA>") else str(cell) for cell in line) + " |\n"
        for line in lines
    )


def interval(row: pd.Series, column: str) -> str:
    if pd.isna(row.get(column)):
        return "c differs: not timed"
    return f"{row[column]:.2f} ({row[f'{column}_low']:.2f} to {row[f'{column}_high']:.2f})"


def page(statistic: pd.DataFrame, training: pd.DataFrame) -> str:
    passes = pd.DataFrame(
        {
            "model": statistic.model,
            "method": statistic.method
            + statistic.apply(lambda row: "" if row.package in ("torch", "sgsc") else f" {row.version}", axis=1),
            "milliseconds": statistic.milliseconds.map("{:.3g}".format),
            "time / plain": statistic.apply(interval, axis=1, column="ratio"),
            "time / SGSC": statistic.apply(interval, axis=1, column="times_sgsc"),
            "rounds": statistic.rounds.astype("Int64").astype(str),
            "entries that differ": statistic.differing,
        }
    )
    if "peak_ratio" in statistic:
        passes["peak memory / plain"] = statistic.peak_ratio.map("{:.2f}".format)
        passes["of the pass alone"] = statistic.pass_ratio.map("{:.1f}".format)
    runs = pd.DataFrame(
        {
            "cores": training.cores,
            "way": training.method,
            "seconds a run": training.seconds_a_run.map("{:.3g}".format),
            "time / stacked": training.apply(interval, axis=1, column="ratio"),
            "rounds": training.rounds,
            "training loss": training.train_loss.map("{:.4f}".format),
        }
    )
    epochs = int(training.epochs_timed.iloc[0])
    return (
        "## Aims\n\nEach aim is a ratio within one run of the benchmark, set before anything was measured. Beside the "
        "median of the rounds stands its 95 % interval; with fewer than 6 rounds, the smallest and the largest value."
        f"\n\n{markdown(aims(statistic, training))}\n"
        "## A pass\n\nOne forward and backward pass with the sign consistency of every parameter, on "
        f"{statistic.threads.iloc[0]} threads ({statistic.machine.iloc[0]}).\n\n{markdown(passes)}\n"
        f"## A training run\n\nA run of 50 epochs on MNIST-1D, scaled from {epochs} timed "
        f"epoch{'s' if epochs > 1 else ''} (JAX {training.jax.iloc[0]}, compilation not counted).\n\n{markdown(runs)}"
    )


def costs(statistic: pd.DataFrame) -> str:
    """The README's table: a pass with SGSC over a plain one, and over the fastest other way to the same numbers."""
    rows = []
    for model, table in statistic.groupby("model", sort=False):
        table = table.set_index("method")
        others = table.drop(index=[FLOOR, OURS, SCALED, *PARTS], errors="ignore")
        best = others.loc[others.times_sgsc.idxmin()]
        others = f"{best.name}: {best.times_sgsc:.1f} × SGSC's time"
        row = {"model": model, "a pass with SGSC": f"{table.ratio[SCALED]:.1f} × a plain one"}
        rows.append(row | {"the fastest other way": others})
    return markdown(pd.DataFrame(rows))


def put(name: str, text: str, path: Path, script: str = "summary.py") -> None:
    """Put a text between the marks of this name in a file."""
    begin, end = (mark.format(name, script) for mark in MARKS)
    before, begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(end)
    if not end:
        marks = " and ".join(MARKS).format(name, script)
        raise SystemExit(f"{path} should have the lines {marks}, between which text goes.")
    write_text(f"{before}{begin}{text}{end}{after}", path)


def plot(statistic: pd.DataFrame, training: pd.DataFrame) -> str:
    """The plot as SVG text: a panel a model, and one for training runs."""
    style = ROOT / "report" / "sgsc.mplstyle"
    if style.exists():
        plt.style.use(style)
    fig = plt.figure(figsize=(7.6, 5.6), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=(3, 2))
    models = list(dict.fromkeys(statistic.model))
    panels, shared = [], upper.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, model in zip(shared, models, strict=True):
        table = statistic[statistic.model == model]
        panels.append((ax, f"{model}\nB = {table.batch_size.iloc[0]}", "a pass, time / plain", table))
    most = training[training.cores == training.cores.max()]
    title = f"A training run on {most.cores.iloc[0]} cores"
    panels.append((lower.subplots(), title, "a run, time / stacked", most))
    for ax, title, label, table in panels:
        table = table.iloc[::-1]
        errors = [table.ratio - table.ratio_low, table.ratio_high - table.ratio]
        colours = ["C0" if own else "C1" for own in table.method.str.contains("SGSC|stacked")]
        colours = ["0.6" if method in PARTS else own for method, own in zip(table.method, colours, strict=True)]
        ax.barh(table.method, table.ratio - 0.7, left=0.7, color=colours, xerr=errors, ecolor="0.3", height=0.65)
        for y, (value, high) in enumerate(zip(table.ratio, table.ratio_high, strict=True)):
            ax.annotate(
                "not timed" if pd.isna(value) else f" {value:.3g}",
                (high if high == high else 0.7, y),
                va="center",
                fontsize=8,
            )
        ax.set(xscale="log", xlabel=label, title=title, xlim=(0.7, table.ratio_high.max() * 6))
        ax.tick_params(axis="y", labelsize=8)
        ax.grid(visible=False, axis="y")
    buffer = io.StringIO()
    # White behind it, as a dark page shows it too.
    fig.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white", transparent=False)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="from and to results/quick, and not to docs/benchmark.md")
    quick = parser.parse_args().quick
    folder = RESULTS / "quick" if quick else RESULTS
    tables = []
    for name, script in (("statistic.csv", "bench_statistic.py"), ("training.csv", "bench_training.py")):
        if not (folder / name).exists():
            parser.error(f"{folder / name} is not there yet. Run {script}{' --quick' if quick else ''} first.")
        tables.append(pd.read_csv(folder / name))
    text = page(*tables)
    write_text(plot(*tables), folder / "benchmark.svg")
    if quick:
        write_text(text, folder / "benchmark.md")
        return
    put("benchmark", f"{PICTURE}{text}", PAGE)
    put("cost", costs(tables[0]), ROOT / "README.md")


if __name__ == "__main__":
    main()
