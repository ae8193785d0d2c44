"""Check a profile's results: its files against manifest.json, and a sample of its runs by training them again.

    python report/verify.py                     the committed study (profile `full`), a minute or two
    python report/verify.py --profile smoke

Nothing is read from the cache. A run gives the same numbers alone as in any stack, so with the arithmetic and the
versions that manifest.json names the sample is reproduced to the last bit. Elsewhere sums are taken in another order,
which a run of 50 epochs amplifies until only its statistics agree; the first epoch stays close. Hence the tolerances
below, one for each, beyond which the exit code is 1.
"""

from __future__ import annotations

import instructions  # before NumPy

# isort: split
import argparse
import ast
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from build import Place
from manifest import LIBRARY, ROOT, BuildError, check_results, command, environment, read_manifest, restore, sha256

from sgsc_lib import Run, draw_mnist1d, load_mnist1d, train

# With other instructions for the same sums (MKL_CBWR=COMPATIBLE, ATEN_CPU_CAPABILITY=default) the committed study's
# cells moved by 0.2 % of their loss at most in the first epoch, final accuracies by 3.5 points at most, 1 on average.
FIRST_EPOCH, ONE_RUN, ON_AVERAGE = 0.01, 0.06, 0.02
ACCURACIES = ["final_test_accuracy", "final_valid_accuracy", "fresh_accuracy"]


def settings_of(place: Place, stem: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return all parameters with which the notebook ran; BuildError where the results lack it."""
    if stem not in manifest["notebooks"]:
        raise BuildError(f"{stem} has not run in {place.results}. Make it: {command(place.profile)}")
    ran = manifest["notebooks"][stem]
    return {name: ast.literal_eval(text) for name, text in ran["defaults"].items()} | ran["parameters"]


def runs_of(table: pd.DataFrame) -> list[Run]:
    return [Run(*fields) for fields in table[["seed", "lr", "gamma", "placement"]].to_numpy().tolist()]


def verify_whole_runs(place: Place, manifest: dict[str, Any]) -> bool:
    """Train the first seed of each arm of evaluation.csv again, and say how its numbers compare."""
    settings = settings_of(place, "03_evaluation", manifest)
    table = pd.read_csv(place.results / "evaluation.csv")
    table = table.groupby("arm", sort=False).head(1).reset_index(drop=True)
    kept = {name: settings[name] for name in ("epochs", "batch_size", "widths", "probe_size")}
    fresh = draw_mnist1d(settings["fresh_samples"], seed=43)
    found = train(runs_of(table), load_mnist1d(), fresh=fresh, stack_size=4, **kept).final()
    numbers = [name for name in found if name in table and name not in ("seed", "lr", "gamma", "placement")]
    same = [np.array_equal(found[n], table[n].astype(found[n].dtype), equal_nan=True) for n in numbers]
    print(
        f"{len(found)} whole runs (the first seed of each arm of evaluation.csv), {len(numbers)} numbers each:", end=" "
    )
    if all(same):
        print("equal to the last bit.")
        return True
    away = (found[ACCURACIES].astype(np.float64) - table[ACCURACIES]).abs().to_numpy()
    good = away.max() <= ONE_RUN and away.mean() <= ON_AVERAGE  # a NaN is neither
    print(
        f"not the same bits. Accuracies differ by {away.max():.4f} at most (tolerance {ONE_RUN}) and {away.mean():.4f} "
        f"on average (tolerance {ON_AVERAGE}): {'as on another machine' if good else 'NOT REPRODUCED'}."
    )
    return bool(good)


def verify_first_epochs(place: Place, manifest: dict[str, Any]) -> bool:
    """Train the first epoch of every run of the factorial again, and compare the mean loss of each cell."""
    settings = settings_of(place, "04_gamma_and_smoothness", manifest)
    cell = ["placement", "gamma", "lr"]
    runs = runs_of(pd.read_csv(place.results / "factorial.csv"))
    kept = {name: settings[name] for name in ("batch_size", "widths")}
    found = train(runs, load_mnist1d(), epochs=1, **kept).frame().groupby(cell)["train_loss"].mean()
    curves = pd.read_csv(place.results / "factorial_curves.csv")
    wanted = curves[curves["epoch"] == 1].set_index(cell)["train_loss_mean"]
    away = (found.astype(np.float64) / wanted - 1).abs()  # aligned by cell: one that either lacks is NaN
    good = len(away) > 0 and bool((away <= FIRST_EPOCH).all())
    print(
        f"The first epoch of {len(runs)} runs, {len(away)} cells of factorial_curves.csv: mean losses differ by "
        f"{away.max(skipna=False):.1e} of their value at most (float32 holds 6e-08; tolerance {FIRST_EPOCH})"
        f"{'' if good else ': NOT REPRODUCED'}."
    )
    return good


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0 reproduced, 1 not."""
    raw = argparse.RawDescriptionHelpFormatter
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=raw)
    parser.add_argument("--profile", default="full", help="whose results to check (default: full)")
    start = time.monotonic()
    try:
        profile = parser.parse_args(argv).profile
        place = Place(profile, root)
        manifest = read_manifest(place.results)
        if not manifest["results"]:
            raise BuildError(f"there are no results in {place.results} yet. Make them: {command(place.profile)}")
        check_results(place.results, manifest["results"], manifest["notebooks"])
        print(f"{len(manifest['results'])} files in {place.results} are what manifest.json says.")
        if manifest["library_sha256"] != sha256(LIBRARY):
            print("They were made by another version of sgsc_lib.py than the one here.")
        made, here = manifest["machine"], environment()["machine"]
        if made.get("arithmetic") != here["arithmetic"]:
            differ = {k: made.get(k, "unknown") for k in ("cpu", *instructions.VARIABLES) if made.get(k) != here[k]}
            told = ", ".join(f"{key} {value} (here {here[key]})" for key, value in differ.items())
            print(f"They were made with another arithmetic: {told or 'other versions'}.")
        good = [check(place, manifest) for check in (verify_whole_runs, verify_first_epochs)]
    except (BuildError, OSError) as error:
        print(f"verify.py: {error}\n{restore(profile)}".rstrip(), file=sys.stderr)
        return 1
    print(f"{'Reproduced' if all(good) else 'Not reproduced'}, in {time.monotonic() - start:.0f} s.")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
