"""Build the report: run a profile's notebooks in order, then render them as one HTML file that opens offline.

    python report/build.py                             the study itself (profile `full`): report/sgsc.html
    python report/build.py --profile smoke             another profile: report/sgsc-smoke.html
    python report/build.py --profile smoke --only 03   one notebook; the page too, if the others are up to date
    python report/build.py --list                      profiles, notebooks and their parameters

A profile is report/profiles/NAME.yaml, lines of `notebook: {parameter: value}` in the order to run, checked before
anything runs; {results} in a value is the profile's own folder of results. Executed notebooks go to
report/executed/NAME/, raw results to report/results/NAME/, where manifest.json says what was run, with what, how long
it took, and each result's SHA-256. The page comes last and in one step: a build that fails or is killed leaves the
previous one, and the next build reads from the cache what was trained by then.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # where PYTHONSAFEPATH is set, Python does not
import instructions  # before NumPy

# isort: split
import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import manifest
import nbformat
import papermill
from filelock import FileLock, Timeout
from findings import findings, update_readme
from manifest import BuildError, minutes, sha256
from page import render
from papermill.exceptions import PapermillExecutionError
from plan import Place, list_all, parameters_of, read_profile
from traitlets.config import Config

from sgsc_study.cache import ROOT
from sgsc_study.results import result_problem, write_text

SHARED = {"bank.csv", "claims.csv"}  # the files to which several notebooks add


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Hold the profile's lock, which ends with this process however it ends; BuildError names a build that has it."""
    place.results.mkdir(parents=True, exist_ok=True)
    lock = place.results / ".lock"
    try:
        with FileLock(lock, blocking=False):
            lock.write_text(f"process {os.getpid()}, started {manifest.now()}")
            for left in place.results.glob(".*.part"):  # by a build that was killed while it wrote
                left.unlink()
            yield
    except Timeout:
        raise BuildError(f"another build of {place.profile} is running: {lock.read_text()}. Wait, or end it.") from None


def fingerprint(place: Place, stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what a notebook's results depend on: one that ran with another fingerprint is out of date."""
    return {"parameters": parameters, "sha256": sha256(place.notebook(stem)), "code_sha256": manifest.code_sha256()}


def run_notebook(place: Place, stem: str, parameters: dict[str, Any]) -> None:
    """Run one notebook with this interpreter's kernel; BuildError names the cell that failed."""
    executed = place.executed(stem)
    output = executed.with_name(f".{stem}.part.ipynb")  # papermill writes after each cell
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            place.notebook(stem), output, parameters, kernel_name="python3", progress_bar=False,
            start_timeout=600, cwd=place.root, stdout_file=sys.stdout, stderr_file=sys.stderr,
            # no other user of the machine can listen in
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
            # a kernel that is told to end calls that an ERROR; modules beside README.md are not those it asks for
            extra_arguments=["--log-level=CRITICAL", "--IPKernelApp.ignore_cwd=True"],
        )  # fmt: skip
    except (PapermillExecutionError, RuntimeError) as error:
        if type(error) is RuntimeError:  # what Jupyter says of a kernel that does not start
            raise BuildError(f"{stem}: {error}. Start the build again.") from None
        cells = nbformat.read(output, as_version=4).cells
        ran = [cell for cell in cells if cell.metadata.get("papermill", {}).get("start_time")]  # the last one failed
        number = sum("injected-parameters" not in cell.metadata.get("tags", []) for cell in ran)
        what = "the kernel died (out of memory, or a crash in compiled code)."
        if isinstance(error, PapermillExecutionError):
            print(error, file=sys.stderr)  # the traceback
            what = f"{error.ename}: {error.evalue}"
        raise BuildError(f"{stem}, cell {number}: {what}\nThe notebook as far as it came: {output}") from None
    output.replace(executed)


def build(profile: str, only: str | None = None, root: Path = ROOT) -> Path | None:
    """Run a profile's notebooks (or the `only` one) and write its page; None: a notebook is still out of date."""
    place = Place(profile, root)
    plan = read_profile(place)
    todo = [stem for stem in plan if stem.startswith(only or "")]
    if only and len(todo) != 1:
        raise BuildError(f"--only should be the start of one of {', '.join(plan)}. Found {only!r}.")
    with locked(place), instructions.without_settings():
        run(place, plan, todo)
        return write_page(place, plan)


def run(place: Place, plan: dict[str, dict[str, Any]], todo: list[str]) -> None:
    """Run the notebooks `todo` of the plan, and write after each the manifest of all that are run by now."""
    whole, made = todo == list(plan), manifest.EMPTY
    try:
        made = manifest.read(place.results)
    except BuildError:
        if not whole:
            raise
    previous = made["notebooks"]
    if whole:
        for name in SHARED:
            (place.results / name).unlink(missing_ok=True)
        made = manifest.EMPTY
    elif set(previous) - set(todo):
        manifest.check_environment(place.results, made)
    ran = {stem: entry for stem, entry in made["notebooks"].items() if stem in plan}
    for k, stem in enumerate(todo, 1):
        earlier = previous.get(stem, {})
        takes = f" (with an empty cache about {minutes(earlier['training']['seconds'])})" if earlier else ""
        print(f"[{k}/{len(todo)}] {stem}{takes}", flush=True)
        manifest.check_results(place.results, made, rerun=stem)
        before, cached = manifest.written(place.results), manifest.cached_stacks()
        of_what, started, start = fingerprint(place, stem, plan[stem]), manifest.now(), time.monotonic()
        tries = place.executed(stem).with_name(f".{stem}.tries.json")  # what earlier ones, that failed, have trained
        took: dict[str, Any] = {"parameters": plan[stem], "stacks": 0, "seconds": 0.0}
        if tries.exists() and (before_that := json.loads(tries.read_text()))["parameters"] == plan[stem]:
            took = before_that
        try:
            run_notebook(place, stem, plan[stem])
        except BaseException:
            if stacks := manifest.cached_stacks() - cached:
                took |= {"stacks": took["stacks"] + stacks, "seconds": took["seconds"] + time.monotonic() - start}
                write_text(json.dumps(took), tries)
            raise
        tries.unlink(missing_ok=True)
        seconds = round(time.monotonic() - start, 1)
        wrote = [name for name, when in manifest.written(place.results).items() if when != before.get(name)]
        for other, entry in ran.items():
            if other != stem and (taken := {*wrote} & {*entry["results"]} - SHARED):
                place.executed(stem).unlink()  # no page is to be made of it
                again = manifest.command(place.profile, other)
                raise BuildError(f"{stem} wrote {', '.join(taken)} of {other}. Rename it, and rebuild that: {again}")
        machine = "{cores} cores ({cpu})".format(**manifest.environment()["machine"])
        training: dict[str, Any] = {
            "stacks": manifest.cached_stacks() - cached + took["stacks"],
            "seconds": round(seconds + took["seconds"], 1),
            "machine": machine,
        }
        if earlier.get("parameters") == plan[stem]:  # that of the build that trained most of it: others read the cache
            training = max(training, earlier["training"], key=lambda run: run["stacks"])
        declared = parameters_of(place.notebook(stem))
        ran[stem] = {
            **of_what,
            "defaults": {name: p["default"] for name, p in declared.items() if name not in plan[stem]},
            "started": started,
            "seconds": seconds,
            "training": training,
            "executed_sha256": sha256(place.executed(stem)),
            "results": wrote,
        }
        made = manifest.write(place.results, place.profile, {name: ran[name] for name in plan if name in ran})
        print(f"[{k}/{len(todo)}] {stem}: done in {minutes(seconds)}", flush=True)


def write_page(place: Place, plan: dict[str, dict[str, Any]]) -> Path | None:
    """Render the executed notebooks and the results as the profile's page; None: a notebook is out of date."""
    made = manifest.read(place.results)
    for stem in plan:
        current, ran = fingerprint(place, stem, plan[stem]), made["notebooks"].get(stem, {})
        if not current.items() <= ran.items() or not place.executed(stem).exists():
            print(f"No page yet: {stem} has to run with its present source and parameters and the present code first.")
            return None
        if problem := result_problem(place.executed(stem), ran["executed_sha256"]):
            raise BuildError(f"{problem} Rebuild it: {manifest.command(place.profile, stem)}")
    manifest.check_results(place.results, made)
    data = [place.results / name for name in [*made["results"], "manifest.json"]]
    said = findings(place.results) if place.profile == "full" else {}
    html = render({stem: place.executed(stem) for stem in plan}, made, data, said)
    if place.profile == "full":
        update_readme(place.root, made, said, html)
    write_text(html, place.page)
    print(f"{place.page}: {len(html.encode()) / 1e6:.2f} MB")
    return place.page


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="full", help="which report/profiles/NAME.yaml to build (default: full)")
    parser.add_argument("--only", metavar="NOTEBOOK", help="run only this notebook, given by the start of its name")
    parser.add_argument("--list", action="store_true", help="list profiles, notebooks and their parameters, and stop")
    options = parser.parse_args(argv)
    left = f"The previous page is left as it was. {manifest.restore(options.profile)}".rstrip()
    try:
        if options.list:
            print(list_all(root))
        else:
            build(options.profile, options.only, root)
    except (BuildError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"build.py: {error}\n{'' if options.list else left}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the interrupted cell's own traceback tells nothing
        print(f"\nbuild.py: interrupted; the same command goes on. {left}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter stops no build
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the kernel too, as Ctrl-C does
    sys.exit(main())
