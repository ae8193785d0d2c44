"""Turn the benchmark's tables into two plots and a page of markdown, for docs/benchmark.md and in short the README.

python summary.py             results/*.svg, docs/benchmark.md and the README, by the tables in results
python summary.py --quick     the same from results/quick, to results/quick/benchmark.md
"""

import argparse
from pathlib import Path

import pandas as pd
from methods import FLOOR, HOOKS, OURS, SCALED
from plots import bars, lines
from timing import RESULTS

from sgsc_study.results import write_text

ROOT = Path(__file__).resolve().parents[1]
# The most that SGSC's time may be over a plain pass, and the least that the fastest peer's may be over SGSC's.
AIMS = {
    "40-128-128-10": (1.7, 5),
    "784-1024-1024-10": (1.45, 40),
    "MNIST-1D CNN": (1.6, 1),
    "CNN with GroupNorm": (1.4, 1.5),
    "Linear on sequences": (1.25, 1),
    "small GPT": (1.5, 1),
    "resnet18 with GroupNorm": (3, 5),
}
MEMORY = 1.2  # the most that the process's peak memory may be over that of a plain pass
EXTRA_MEMORY = {"Linear on sequences": 0.2}  # the most of the fastest peer's memory beyond a plain pass
RUN, RUNS = "vmap, one run at a time", {2: 18, 1: 12}  # by cores: the least, over the stacked run
PAGE = ROOT / "docs" / "benchmark.md"
MARKS = "<!-- {0}: written by benchmarks/{1} from benchmarks/results -->\n", "<!-- /{0} -->"
IMAGE = '<img src="../benchmarks/results/{}.svg" alt="{}">\n\n'
BARS = IMAGE.format(
    "benchmark",
    "Bar charts: the time of a pass over that of a plain one, for SGSC and its peers on each model; the time of a "
    "training run over that of the stacked one. The tables below hold every number.",
)
LINES = IMAGE.format(
    "scaling",
    "Three panels with logarithmic axes: the time of a pass with SGSC and of one with vmap over that of a plain one, "
    "against the batch size, the width and the number of positions, with intervals.",
)


def peers_of(table: pd.DataFrame) -> pd.DataFrame:
    """The rows, by method, of the other ways to c that were timed."""
    return table[table.ratio.notna()].drop(index=[FLOOR, HOOKS, OURS, SCALED], errors="ignore")


def on(cores: int) -> str:
    return f"{cores} core{'s' if cores > 1 else ''}"


def interval(row: pd.Series, column: str) -> str:
    return f"{row[column]:.2f} ({row[f'{column}_low']:.2f} to {row[f'{column}_high']:.2f})"


def aim(model: str, text: str, limit: float, found: dict[int, tuple[float, str]], *, at_most: bool) -> dict:
    """A row of the table of aims; `found` has by cores a value and how it is shown."""
    reached = {cores: value <= limit if at_most else value >= limit for cores, (value, _) in found.items()}
    missed = " and ".join(str(cores) for cores, yes in reached.items() if not yes)
    shown = {on(cores): found.get(cores, (0, "–"))[1] for cores in (2, 1)}
    told = "no" if not any(reached.values()) else f"not on {missed}" if missed else "yes"
    return {"model": model, "aim": f"{text} {'≤' if at_most else '≥'} {limit:g}", **shown, "reached": told}


def aims(statistic: pd.DataFrame, training: pd.DataFrame) -> pd.DataFrame:
    """What was aimed at, and what came out, on two cores and on one."""
    rows = []
    for model, (limit, faster) in AIMS.items():
        tables = {cores: table.set_index("method")
                  for cores, table in statistic[statistic.model == model].groupby("cores")}  # fmt: skip
        for method in (OURS, SCALED):
            found = {c: (table.ratio[method], interval(table.loc[method], "ratio")) for c, table in tables.items()}
            rows.append(aim(model, f"{method}, time / plain", limit, found, at_most=True))
        best = {cores: peers.loc[peers.ratio.idxmin()] for cores, table in tables.items()
                if len(peers := peers_of(table))}  # fmt: skip
        found = {c: (p.times_sgsc, f"{interval(p, 'times_sgsc')}, {p.name}") for c, p in best.items()}
        rows.append(aim(model, "fastest peer, time / SGSC", faster, found, at_most=False))
        table = tables[max(tables)]
        if "peak_ratio" in table:
            value = table.peak_ratio[[OURS, SCALED]].max()
            found = {max(tables): (value, f"{value:.2f}")}
            rows.append(aim(model, "peak memory of the process / plain", MEMORY, found, at_most=True))
            if model in EXTRA_MEMORY:
                extra = table.peak_mib - table.peak_mib[FLOOR]
                value = extra[OURS] / extra[best[max(tables)].name]
                found = {max(tables): (value, f"{value:.2f}")}
                text = "memory beyond a plain pass / the fastest peer's"
                rows.append(aim(model, text, EXTRA_MEMORY[model], found, at_most=True))
    for cores, limit in RUNS.items():
        row = training[(training.cores == cores) & (training.method == RUN)].iloc[0]
        found = {cores: (row.ratio, interval(row, "ratio"))}
        rows.append(aim("a training run", f"{RUN}, time / stacked", limit, found, at_most=False))
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "".join(
        "| " + " | ".join("–" if str(cell) in ("nan", "<NA>") else str(cell) for cell in line) + " |\n"
        for line in lines
    )


def expected(statistic: pd.DataFrame) -> list[str]:
    """What to expect, in three sentences."""
    table = statistic[statistic.cores == statistic.cores.max()].set_index("method")
    passes, peers = table.loc[[SCALED]], peers_of(table)
    worst, least = passes.loc[passes.ratio == passes.ratio.max()].iloc[0], passes.ratio.min()
    best = peers.groupby("model").times_sgsc.min()
    first = (
        f"A pass with SGSC takes {least:.1f} to {worst.ratio:.1f} times as long as a plain one, longest on "
        f"{worst.model}, on two cores."
    )
    second = (
        f"The fastest other way to the same numbers takes {best.min():.1f} to {best.max():.0f} times as long as SGSC: "
        f"least on {best.idxmin()}, most on {best.idxmax()}."
    )
    if "peak_ratio" not in table:
        return [first, second]
    most = peers.loc[peers.groupby("model").ratio.transform("min") == peers.ratio].peak_ratio.max()
    return [first, second, f"The process needs at most {passes.peak_ratio.max():.2f} times the memory of a plain one; "
            f"with the fastest other way, at most {most:.1f} times."]  # fmt: skip


def passes_table(statistic: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (model, method), table in statistic[statistic.ratio.notna()].groupby(["model", "method"], sort=False):
        by_cores = table.set_index("cores")
        top = by_cores.loc[by_cores.index.max()]
        version = "" if top.package in ("torch", "sgsc") else f" {top.version}"
        row = {"model": model, "method": f"{method}{version}", "ms, 2 cores": f"{top.milliseconds:.3g}"}
        for column, name in (("ratio", "time / plain"), ("times_sgsc", "time / SGSC")):
            for cores in (2, 1):
                shown = interval(by_cores.loc[cores], column) if cores in by_cores.index else "–"
                row[f"{name}, {on(cores)}"] = shown
        row["rounds"] = " and ".join(str(int(n)) for n in by_cores.rounds)
        of_rounding = f", {top.of_rounding:.0f} of rounding" if top.of_rounding else ""
        row["entries that differ"] = f"{top.differing:.0f}{of_rounding}"
        if "peak_ratio" in top:
            row |= {"peak memory / plain": f"{top.peak_ratio:.2f}", "of the pass alone": f"{top.pass_ratio:.1f}"}
        rows.append(row)
    return pd.DataFrame(rows)


def not_timed(statistic: pd.DataFrame) -> str:
    """The peers that a model is not timed with, and why, as a list."""
    if "why" not in statistic:
        return ""
    rows = statistic[statistic.why.notna()]
    return (
        "Not timed:\n\n" + "".join(f"- {row.method} on {row.model}: `{row.why}`\n" for row in rows.itertuples()) + "\n"
    )


def where(profile: pd.DataFrame, table: pd.DataFrame) -> str:
    """Where the time goes: a table of the profile, and a line for every aim that was not reached."""
    parts = ["own", "products", "elementwise", "rest"]
    names = ["the model's own", "products for c", "elementwise signs, sums, copies", "Python and the rest"]
    models = profile[profile.own.notna()]
    shown = models[["model", "cores"]].copy()
    for part, name in zip(parts, names, strict=True):
        shown[name] = (models[part] / models.own).map("{:.2f}".format)
    shown["together"] = (models.milliseconds / models.own).map("{:.2f}".format)
    text = f"In units of a plain pass:\n\n{markdown(shown)}\n"
    lines = []
    for model in dict.fromkeys(table.model[(table.reached != "yes") & ~table.aim.str.contains("memory")]):
        missed = table.reached[(table.model == model) & ~table.aim.str.contains("memory")]
        row = models[(models.model == model) & (models.cores == (1 if set(missed) <= {"yes", "not on 1"} else 2))]
        if row.empty:
            row = profile[profile.own.isna()].iloc[0]
            shares = [f"{100 * row[part] / row.milliseconds:.0f} % {what}" for part, what in
                      zip(parts[1:], ("products", "elementwise operations", names[3]), strict=True)]  # fmt: skip
            lines.append(f"- a training run: of the stacked one, on 1 core, {', '.join(shares)}.\n")
            continue
        row = row.iloc[0]
        extra = (row.milliseconds - row.own) / row.own
        shares = [f"{row[part] / row.own:.2f} {name}" for part, name in zip(parts[1:], names[1:], strict=True)]
        lines.append(f"- {model}: {extra:.2f} × beyond a plain pass on {on(row.cores)}: {', '.join(shares)}.\n")
    return text + ("Where an aim of time was not reached:\n\n" + "".join(lines) + "\n" if lines else "")


def page(statistic: pd.DataFrame, training: pd.DataFrame, profile: pd.DataFrame) -> str:
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
    epochs, table = int(training.epochs_timed.iloc[0]), aims(statistic, training)
    return (
        f"{' '.join(expected(statistic))}\n\n{BARS}"
        "## Aims\n\nEach aim is a ratio within one run of the benchmark. Beside the median of the rounds stands its "
        "95 % interval; with fewer than 6 rounds, the smallest and the largest value. Memory is measured on 2 cores."
        f"\n\n{markdown(table)}\n"
        f"## Where the time goes\n\n{where(profile, table)}"
        f"## How the cost grows\n\n{LINES}"
        "## A pass\n\nOne forward and backward pass with the sign consistency of every parameter "
        f"({statistic.machine.iloc[0]}).\n\n{markdown(passes_table(statistic))}\n{not_timed(statistic)}"
        f"## A training run\n\nA run of 50 epochs on MNIST-1D, scaled from {epochs} timed "
        f"epoch{'s' if epochs > 1 else ''} (JAX {training.jax.iloc[0]}, compilation not counted).\n\n{markdown(runs)}"
    )


def put(name: str, text: str, path: Path, script: str = "summary.py") -> None:
    """Put a text between the marks of this name in a file."""
    begin, end = (mark.format(name, script) for mark in MARKS)
    before, begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(end)
    if not end:
        marks = " and ".join(MARKS).format(name, script)
        raise SystemExit(f"{path} should have the lines {marks}, between which text goes.")
    write_text(f"{before}{begin}{text}{end}{after}", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="from and to results/quick, and not to docs/benchmark.md")
    quick = parser.parse_args().quick
    folder = RESULTS / "quick" if quick else RESULTS
    tables = {}
    for name in ("statistic", "training", "profile", "scaling"):
        if not (folder / f"{name}.csv").exists():
            told = f"bench_{name}.py{' --quick' if quick else ''}"
            parser.error(f"{folder / name}.csv is not there yet. Run {told} first.")
        tables[name] = pd.read_csv(folder / f"{name}.csv")
    scaling = tables.pop("scaling")
    text = page(**tables)
    write_text(bars(tables["statistic"], tables["training"]), folder / "benchmark.svg")
    write_text(lines(scaling), folder / "scaling.svg")
    if quick:
        write_text(text, folder / "benchmark.md")
        return
    put("benchmark", text, PAGE)
    put("cost", f"{expected(tables['statistic'])[0]}\n", ROOT / "README.md")


if __name__ == "__main__":
    main()
