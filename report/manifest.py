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

import torch

from sgsc_study.cache import CACHE, code_version
from sgsc_study.data import DATA_SHA256
from sgsc_study.results import build_command, result_problem, write_text
from sgsc_study.workers import arithmetic


class BuildError(Exception):
    """A build that cannot go on, worded for the person who can mend it."""


EMPTY: dict[str, Any] = {"notebooks": {}, "results": {}}  # of a folder in which nothing has run


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def code_sha256() -> str:
    return code_version("sgsc_study")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """What differs once a CSV or JSON file in a folder, the manifest aside, is written again: its time and its inode.

    A clock that is set back may repeat a time.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".json"))
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in paths if p.name != "manifest.json"}


def cached_stacks() -> int:
    return len(list(CACHE.rglob("output.pkl")))


def environment() -> dict[str, Any]:
    """Return what all results of a build are made with: data, versions, machine."""
    lines = instructions.CPUINFO.read_text() if instructions.CPUINFO.exists() else ""
    cpuinfo = dict(re.findall(r"^(.+?)\s*: (.+)", lines, re.MULTILINE))
    cpu = [cpuinfo.get("model name", platform.processor())]
    cpu += [f"{key} {cpuinfo[key]}" for key in ("cpu family", "model") if key in cpuinfo]
    needs = [need for need in importlib.metadata.requires("sgsc") or [] if not re.search("extra == .(?!study)", need)]
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
            **{k: os.environ.get(k, "not set") for k in ("OMP_NUM_THREADS", "SGSC_DEVICE", *instructions.VARIABLES)},
        },
    }


def write(folder: Path, profile: str, ran: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of what the notebooks `ran` have left in the folder by now, and return it."""
    names = sorted({name for entry in ran.values() for name in entry["results"]})
    manifest = {
        "profile": profile,
        "started": min(entry["started"] for entry in ran.values()),
        "finished": now(),
        "seconds": round(sum(entry["seconds"] for entry in ran.values()), 1),
        "code_sha256": code_sha256(),
        **environment(),
        "notebooks": ran,
        "results": {name: sha256(folder / name) for name in names},
    }
    write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", folder / "manifest.json")
    return manifest


def read(folder: Path) -> dict[str, Any]:
    """Return the folder's manifest, an empty one where there is none yet; BuildError if it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return EMPTY
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["notebooks"], manifest["results"]
        return manifest
    except (ValueError, KeyError, TypeError) as error:  # not JSON, not UTF-8, not a manifest
        raise BuildError(f"{path} is damaged: {error!r}. Rebuild it: {command(folder.name)}") from None


def command(profile: str, *only: str) -> str:
    return build_command(profile) + (f" --only {only[0]}" if len(only) == 1 else "")


def restore(profile: str) -> str:
    return "`git restore report README.md` brings back what is committed." if profile == "full" else ""


def check_results(folder: Path, manifest: dict[str, Any], rerun: str | None = None) -> None:
    """Raise BuildError naming each result that is not what the manifest says, except what only `rerun` writes."""
    problems, makers = [], set()
    for name, digest in manifest["results"].items():
        made_by = {stem for stem, entry in manifest["notebooks"].items() if name in entry.get("results", ())}
        if made_by != {rerun} and (problem := result_problem(folder / name, digest)):
            problems.append(problem)
            makers |= made_by
    if problems:
        raise BuildError("\n".join([*problems, f"Rebuild it: {command(folder.name, *makers)}"]))


def check_environment(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise BuildError where the folder's results were made with other data, versions or arithmetic than this."""

    def flat(made: dict[str, Any]) -> dict[str, Any]:
        own = {name: made["machine"].get(name) for name in ("system", "arithmetic")}
        return {"data": made["data_sha256"], "Python": made["python"], **own, **made["packages"]}

    then, today = flat(manifest), flat(environment())
    differ = [f"{k} {then.get(k)} (now {today.get(k)})" for k in then | today if then.get(k) != today.get(k)]
    if differ:
        told = f"the results in {folder} were made with {', '.join(differ)}. --only would mix the two."
        raise BuildError(f"{told} Rebuild all of them: {command(folder.name)}")
