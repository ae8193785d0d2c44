"""manifest.json: what made the results that lie beside it, and whether they still are what it says."""

from __future__ import annotations

import instructions  # before NumPy

# isort: split
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sgsc_lib import CACHE, DATA_SHA256, arithmetic, build_command, result_problem, write_text

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "sgsc_lib.py"


class BuildError(Exception):
    """A build that cannot go on, worded for the person who can mend it."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def raw_results(folder: Path) -> list[Path]:
    """Return the CSV and JSON files in a folder of results, but for the manifest."""
    return sorted(path for path in [*folder.glob("*.csv"), *folder.glob("*.json")] if path.name != "manifest.json")


def cached_stacks() -> int:
    """Return how many stacks of runs the cache holds."""
    return sum(1 for _ in CACHE.rglob("output.pkl"))


def environment() -> dict[str, Any]:
    """Return what all results of a build are made with: data, versions, machine."""
    lines = instructions.CPUINFO.read_text() if instructions.CPUINFO.exists() else ""
    cpuinfo = dict(re.findall(r"^(.+?)\s*: (.+)", lines, re.MULTILINE))
    cpu = [cpuinfo.get("model name", platform.processor())]
    cpu += [f"{key} {cpuinfo[key]}" for key in ("cpu family", "model") if key in cpuinfo]
    needs = [need for need in importlib.metadata.requires("sgsc") or [] if "extra ==" not in need]
    packages = sorted(re.split(r"[^\w.-]", need)[0] for need in needs)
    return {
        "data_sha256": DATA_SHA256,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": ", ".join(cpu),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "arithmetic": arithmetic(),
            **{name: os.environ.get(name, "not set") for name in ("OMP_NUM_THREADS", *instructions.VARIABLES)},
        },
    }


def results_of(ran: dict[str, Any]) -> dict[str, str]:
    """Return {file name: SHA-256} of all that the notebooks wrote; for a file of several, as the last left it."""
    results = {}
    for entry in sorted(ran.values(), key=lambda entry: entry["started"]):
        results |= entry.get("results", {})
    return dict(sorted(results.items()))


def write_manifest(folder: Path, profile: str, ran: dict[str, Any]) -> None:
    """Write the manifest of what the notebooks `ran` left in the folder."""
    results = results_of(ran)
    tables = {name: pd.read_csv(folder / name) for name in results if name.endswith(".csv")}
    manifest = {
        "profile": profile,
        "started": min(entry["started"] for entry in ran.values()),
        "finished": now(),
        "seconds": round(sum(entry["seconds"] for entry in ran.values()), 1),
        "library_sha256": sha256(LIBRARY),
        **environment(),
        "notebooks": ran,
        "seeds": {name: sorted(map(int, t["seed"].unique())) for name, t in tables.items() if "seed" in t},
        "results": results,
    }
    write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", folder / "manifest.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the folder's manifest, an empty one where there is none yet; BuildError if it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"notebooks": {}, "results": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["notebooks"], manifest["results"]
        return manifest
    except (ValueError, KeyError, TypeError) as error:  # not JSON, not UTF-8, not a manifest
        raise BuildError(f"{path} is damaged: {error!r}. Make it anew: {command(folder.name)}") from None


def command(profile: str, *only: str) -> str:
    return build_command(profile) + (f" --only {only[0]}" if len(only) == 1 else "")


def restore(profile: str) -> str:
    """How to bring back what is committed; empty for a profile of which nothing is."""
    return "`git restore report README.md` brings back what is committed." if profile == "full" else ""


def check_results(folder: Path, results: dict[str, str], ran: dict[str, Any], rerun: str | None = None) -> None:
    """Raise BuildError naming each of the `results` that is not what it was, but for those that only `rerun` writes."""
    problems, makers = [], set()
    for name, digest in results.items():
        made_by = {stem for stem, entry in ran.items() if name in entry.get("results", {})}
        if made_by != {rerun} and (problem := result_problem(folder / name, digest)):
            problems.append(problem)
            makers |= made_by
    if problems:
        raise BuildError("\n".join([*problems, f"Make it anew: {command(folder.name, *makers)}"]))


def check_environment(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise BuildError where the folder's results were made with other data, versions or arithmetic than this."""

    def flat(made: dict[str, Any]) -> dict[str, Any]:
        own = {name: made["machine"].get(name) for name in ("system", "arithmetic")}
        return {"data": made["data_sha256"], "Python": made["python"], **own, **made["packages"]}

    then, today = flat(manifest), flat(environment())
    differ = {key: (then.get(key), today.get(key)) for key in then | today if then.get(key) != today.get(key)}
    if differ:
        raise BuildError(
            f"the results in {folder} were made with "
            + ", ".join(f"{key} {old} (now {new})" for key, (old, new) in differ.items())
            + f". --only would mix the two. Make all of them anew: {command(folder.name)}"
        )
