"""Result files: written whole or not at all, read against the manifest beside them; the table of claims."""

import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sgsc_lib import check
from sgsc_study.cache import ROOT


def results_folder(results: str) -> Path:
    """The folder for a notebook's results, made if need be; a relative path counts from the project's root.

    >>> results_folder("report/results/full").relative_to(ROOT).as_posix()
    'report/results/full'
    """
    folder = ROOT / check("results", results, str)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all: beside its place, then moved into it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text("whole", Path(folder) / "note.txt")
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['note.txt']
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV whole or not at all. Floats keep every digit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(pd.DataFrame({"loss": [0.1 + 0.2]}), Path(folder) / "loss.csv")
    ...     (Path(folder) / "loss.csv").read_text()
    'loss\\n0.30000000000000004\\n'
    """
    write_text(frame.to_csv(index=False), path)


def write_rows(frame: pd.DataFrame, path: Path, *, notebook: str) -> None:
    """Put a notebook's rows into a CSV that several notebooks write, in place of the rows that it put there before.

    A column `notebook` at the end says whose a row is; the others' rows keep every character. Raises ValueError for a
    file without it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for by, loss in (("02", 0.5), ("05", 0.1), ("02", 0.25)):
    ...         write_rows(pd.DataFrame({"loss": [loss]}), Path(folder) / "bank.csv", notebook=by)
    ...     (Path(folder) / "bank.csv").read_text()
    'loss,notebook\\n0.25,02\\n0.1,05\\n'
    """
    # as text, so that a number is written in the same way whether others' rows stand beside it or not
    text = io.StringIO(frame.assign(notebook=notebook).to_csv(index=False))
    own = pd.read_csv(text, dtype=str, keep_default_na=False)
    if path.exists():
        others = _read_csv(path, dtype=str, keep_default_na=False)
        if "notebook" not in others:
            raise ValueError(f"{path} should have a column `notebook`. Found {[*others]}: delete it.")
        own = pd.concat([others[others["notebook"] != notebook], own])
    own = own.sort_values("notebook", kind="stable")
    write_table(own[[*own.columns.drop("notebook"), "notebook"]], path)


# fmt: off
CLAIM_COLUMNS = (
    "id", "claim", "source", "setting", "measure", "n", "estimate", "ci_low", "ci_high", "p", "verdict", "half_a",
    "half_b", "figure", "notebook",
)
# fmt: on


def claim(
    identity: str,
    text: str,
    found: Sequence[Any],
    *,
    source: str,
    setting: str,
    measure: str,
    figure: str,
    agrees: str = "",
) -> dict[str, Any]:
    """A row of claims.csv from what a comparison `found` on all seeds and on either half of them, as `in_halves` gives.

    The row has the first one's n, mean difference, interval, p and verdict, and the verdicts of the halves. Of a claim
    that can be right or wrong, `agrees` is the verdict, "better" or "worse", that confirms it; the other contradicts.

    >>> from sgsc_study.measures import compare_paired, in_halves
    >>> found = in_halves(compare_paired, [3.0, 4.0, 5.0, 4.5], [1.0, 2.0, 3.5, 2.5], margin=0.1)
    >>> about = {"source": "card", "setting": "tuned", "measure": "difference", "figure": "arms"}
    >>> row = claim("1", "SGSC is lower", found, agrees="worse", **about)
    >>> row["verdict"], row["half_a"]
    ('contradicted', 'inconclusive')
    """
    card = {"better": "contradicted", "worse": "contradicted", agrees: "confirmed"} if agrees else {}
    rows = [row._asdict() if hasattr(row, "_asdict") else row for row in found]
    about = {"id": identity, "claim": text, "source": source, "setting": setting, "measure": measure, "figure": figure}
    shown = {name: rows[0][name] for name in ("n", "ci_low", "ci_high", "p")} | {"estimate": rows[0]["mean_difference"]}
    verdicts = [card.get(row["verdict"], row["verdict"]) for row in rows]
    return about | shown | dict(zip(("verdict", "half_a", "half_b"), verdicts, strict=True))


def write_claims(rows: Sequence[Mapping[str, Any]], folder: Path, *, notebook: str) -> pd.DataFrame:
    """Put a notebook's rows into the folder's `claims.csv`, in place of the rows it put there before, and return them.

    Each row gives all `CLAIM_COLUMNS` but `notebook`. Raises ValueError for another set of columns.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_claims([{"id": "C1", "claim": "no other columns"}], Path(folder), notebook="03")
    Traceback (most recent call last):
    ValueError: claims should have the columns ('id', 'claim', 'source', 'setting', 'measure', 'n', 'estimate', \
'ci_low', 'ci_high', 'p', 'verdict', 'half_a', 'half_b', 'figure', 'notebook'). Found ('id', 'claim').
    """
    own = pd.DataFrame(rows)
    if {*own.columns, "notebook"} != set(CLAIM_COLUMNS):
        raise ValueError(f"claims should have the columns {CLAIM_COLUMNS}. Found {tuple(own.columns)}.")
    own = own[[name for name in CLAIM_COLUMNS if name != "notebook"]].sort_values("id", kind="stable")
    write_rows(own, folder / "claims.csv", notebook=notebook)
    return own


def build_command(profile: str) -> str:
    """The command that builds a profile, by the Python that runs this, if it is the project's own.

    >>> build_command("smoke").endswith("python report/build.py --profile smoke")
    True
    """
    python = Path(sys.executable)
    own = python.relative_to(ROOT) if python.is_relative_to(ROOT) else "python"
    return f"{own} report/build.py --profile {profile}"


def read_table(path: str | os.PathLike, *, made_by: str) -> pd.DataFrame:
    """Read a CSV that another notebook made; errors name the command that makes it.

    Raises FileNotFoundError where it is missing, and ValueError where it is no table, or where a `manifest.json` beside
    it says otherwise or does not list it.

    >>> read_table("report/results/full/claims.csv", made_by="03_evaluation").columns[:2].tolist()
    ['id', 'claim']
    """
    path = ROOT / path
    manifest, command = path.with_name("manifest.json"), build_command(path.parent.name)
    if manifest.exists():
        try:
            listed = json.loads(manifest.read_text(encoding="utf-8"))
            made, digest = made_by in listed["notebooks"], listed["results"].get(path.name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{manifest} is not a manifest ({error!r}). Rebuild it: {command}") from error
        command += f" --only {made_by}" * made
        if digest is None and path.exists():
            raise ValueError(f"{path} is of an earlier build: manifest.json does not list it. Rebuild it: {command}")
        if digest and (problem := result_problem(path, digest)):
            raise ValueError(f"{problem} Rebuild it: {command}")
    if not path.exists():
        profile = ROOT / "report" / "profiles" / f"{path.parent.name}.yaml"
        how = f"Run {command} with {made_by} in {profile}." if profile.exists() else f"Paths start at {ROOT}."
        raise FileNotFoundError(f"{path} is not there yet: notebook {made_by} makes it. {how}")
    return _read_csv(path)


def result_problem(path: Path, sha256: str) -> str:
    """What is wrong with a result file of which manifest.json gives this SHA-256; empty where nothing is.

    >>> result_problem(ROOT / "none.csv", "0" * 64).removeprefix(str(ROOT))
    '/none.csv is missing.'
    """
    if not path.exists():
        return f"{path} is missing."
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        return f"{path} is not what manifest.json says: truncated, edited or damaged."
    return ""


def _read_csv(path: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:  # an empty file's, a parser's and a decoder's error are among them
        raise ValueError(f"{path} is not a table ({error}). Delete it and rebuild it.") from error
