"""Check a profile's results: its files against manifest.json, and a sample of its runs by training them again.

    python report/verify.py                     the committed study (profile `full`), a minute or two
    python report/verify.py --profile smoke

Nothing is read from the cache. A run gives the same numbers alone as in any stack, so with the arithmetic and the
versions that manifest.json names the sample is reproduced to the last bit. Elsewhere sums are taken in another order,
which a run of 50 epochs amplifies until only its statistics agree. Hence the tolerances below, beyond which the exit
code is 1.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # where PYTHONSAFEPATH is set, Python does not
import instructions  # before NumPy

# isort: split
import argparse
import ast
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from manifest import BuildError, check_results, code_sha256, command, environment, read, restore
from plan import Place

from sgsc_study.bank import CELL
from sgsc_study.cache import ROOT
from sgsc_study.data import draw_mnist1d, load_mnist1d
from sgsc_study.runs import Run
from sgsc_study.training import train

# With other instructions for the same sums (MKL_CBWR=COMPATIBLE, ATEN_CPU_CAPABILITY=default) the committed study's
# final accuracies moved by 3.5 points at most, 1 on average.
ONE_RUN, ON_AVERAGE = 0.06, 0.02
ACCURACIES = ["test_accuracy", "valid_accuracy", "fresh_accuracy"]


def verify_runs(place: Place, manifest: dict[str, Any]) -> bool:
    """Train the first seed of each arm of evaluation.csv again, and say how its numbers compare."""
    if "03_evaluation" not in manifest["notebooks"]:
        raise BuildError(f"03_evaluation has not run in {place.results}. Run it: {command(place.profile)}")
    ran = manifest["notebooks"]["03_evaluation"]
    settings = {name: ast.literal_eval(text) for name, text in ran["defaults"].items()} | ran["parameters"]
    table = pd.read_csv(place.results / "evaluation.csv")
    table = table.groupby("arm", sort=False).head(1).reset_index(drop=True)
    fields = ["seed", *CELL]
    runs = [Run(*row) for row in table[fields].itertuples(index=False)]
    kept = {name: settings[name] for name in ("epochs", "batch_size", "widths", "probe_size")}
    fresh = draw_mnist1d(settings["fresh_samples"], seed=43)
    found = train(runs, load_mnist1d(), fresh=fresh, stack_size=4, **kept).final()
    numbers = [name for name in found if name in table and name not in fields]
    for name in found.filter(like="probe_"):  # some arms were trained without losses by step
        found[name] = found[name].where(table[name].notna())
    same = [np.array_equal(found[n], table[n].astype(found[n].dtype), equal_nan=True) for n in numbers]
    what = f"{len(found)} whole runs (the first seed of each arm of evaluation.csv), {len(numbers)} numbers each:"
    if all(same):
        print(f"{what} equal to the last bit.")
        return True
    away = (found[ACCURACIES].astype(np.float64) - table[ACCURACIES]).abs().to_numpy()
    good = bool(away.max() <= ONE_RUN and away.mean() <= ON_AVERAGE)  # a NaN is neither
    print(
        f"{what} not the same bits. Accuracies differ by {away.max():.4f} at most (tolerance {ONE_RUN}) and "
        f"{away.mean():.4f} on average (tolerance {ON_AVERAGE}): "
        f"{'as on another machine' if good else 'NOT REPRODUCED'}."
    )
    return good


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0 reproduced, 1 not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="full", help="whose results to check (default: full)")
    start = time.monotonic()
    profile = parser.parse_args(argv).profile
    try:
        place = Place(profile, root)
        manifest = read(place.results)
        if not manifest["results"]:
            raise BuildError(f"there are no results in {place.results} yet. Make them: {command(place.profile)}")
        check_results(place.results, manifest)
        print(f"{len(manifest['results'])} files in {place.results} are what manifest.json says.")
        if manifest.get("code_sha256") != code_sha256():
            print("They were made by another version of the code than the one here.")
        made, here = manifest["machine"], environment()["machine"]
        if made.get("arithmetic") != here["arithmetic"]:
            differ = {k: made.get(k, "unknown") for k in ("cpu", *instructions.VARIABLES) if made.get(k) != here[k]}
            told = ", ".join(f"{key} {value} (here {here[key]})" for key, value in differ.items())
            print(f"They were made with another arithmetic: {told or 'other versions'}.")
        good = verify_runs(place, manifest)
    except (BuildError, OSError) as error:
        print(f"verify.py: {error}\n{restore(profile)}".rstrip(), file=sys.stderr)
        return 1
    print(f"{'Reproduced' if good else 'Not reproduced'}, in {time.monotonic() - start:.0f} s.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
