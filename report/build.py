"""Build the report: run a profile's notebooks in order, then render them as one HTML file that opens offline.

    python report/build.py                             the study itself (profile `full`): report/sgsc.html
    python report/build.py --profile smoke             another profile: report/sgsc-smoke.html
    python report/build.py --profile smoke --only 03   one notebook; the page too, if the others are up to date
    python report/build.py --list                      profiles, notebooks and their parameters

A profile is report/profiles/NAME.yaml, lines of `notebook: {parameter: value}` in the order to run. Names, types and
bounds are checked before anything runs, and what depends on the data or on earlier results in a notebook's first cell.
In a value, {results} is the profile's own folder of results. papermill writes the executed notebooks to
report/executed/NAME/; they write their raw results to report/results/NAME/, where manifest.json says what was run, with
what, how long it took, and each result's SHA-256. The page comes last and in one step: a build that fails or is killed
leaves the previous page as it was, and the next one reads from the cache what was trained by then. Results that are not
what the manifest says are refused, never mixed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
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
from nbclient.exceptions import DeadKernelError
from page import render
from papermill.exceptions import PapermillExecutionError
from plan import Place, list_all, parameters_of, read_profile
from traitlets.config import Config

from sgsc_study.cache import ROOT
from sgsc_study.results import result_problem, write_text

KERNEL = Config({"KernelManager": {"transport_encryption": "auto"}})  # no other user of the machine can listen in


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Hold the profile's lock, which ends with this process however it ends; BuildError names a build that has it."""
    place.results.mkdir(parents=True, exist_ok=True)
    holder = place.results / ".lock.holder"
    try:
        with FileLock(place.results / ".lock", blocking=False):
            write_text(f"process {os.getpid()}, started {manifest.now()}", holder)
            for left in place.results.glob(".*.part"):  # by a build that was killed while it wrote
                left.unlink()
            yield
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "started just now"
        raise BuildError(f"another build of {place.profile} is running: {who}. Wait for it, or end it.") from None


def fingerprint(place: Place, stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what a notebook's results depend on: one that ran with another fingerprint is out of date."""
    return {"parameters": parameters, "sha256": sha256(place.notebook(stem)), "code_sha256": manifest.code_sha256()}


def run_notebook(place: Place, stem: str, parameters: dict[str, Any]) -> None:
    """Run one notebook with this interpreter's kernel; BuildError names the cell that failed."""
    executed = place.executed(stem)
    output = executed.with_name(f".{stem}.part.ipynb")  # papermill writes after each cell
    settings = executed.with_name(".ipython")  # empty, so that no user's own settings print more on the page
    settings.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            place.notebook(stem), output, parameters, kernel_name="python3", progress_bar=False,
            cwd=place.root, stdout_file=sys.stdout, stderr_file=sys.stderr, config=KERNEL,
            # a kernel that is told to end calls that an ERROR
            extra_arguments=["--log-level=CRITICAL", f"--ipython-dir={settings}"],
        )  # fmt: skip
    except (PapermillExecutionError, DeadKernelError) as error:
        cells = [cell for cell in nbformat.read(output, as_version=4).cells if "papermill" in cell.metadata]
        ran = [cell for cell in cells if cell.metadata.papermill.get("start_time")]  # the last of them failed
        number = sum("injected-parameters" not in cell.metadata.get("tags", []) for cell in ran)
        if isinstance(error, DeadKernelError):
            what = "the kernel died (out of memory, or a crash in compiled code)."
        else:
            what = f"{error.ename}: {error.evalue}"
            if "begin(globals())" not in ran[-1].source:  # such a cell says what is wrong in words
                print(error, file=sys.stderr)  # the traceback
        raise BuildError(f"{stem}, cell {number}: {what}\nThe notebook as far as it came: {output}") from None
    output.replace(executed)


def build(profile: str, only: str | None = None, root: Path = ROOT) -> Path | None:
    """Run a profile's notebooks (or the `only` one) and write its page; None: a notebook is still out of date."""
    os.environ["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter"  # so that `python3` is this interpreter's kernel
    place = Place(profile, root)
    plan = read_profile(place)
    todo = [stem for stem in plan if stem.startswith(only or "")]
    if only and len(todo) != 1:
        found = f"Found {only!r}, which fits {len(todo)}."
        raise BuildError(f"--only should be the start of one notebook's name: {', '.join(plan)}. {found}")
    with locked(place):
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
        (place.results / "claims.csv").unlink(missing_ok=True)  # the one file to which notebooks add
        made = manifest.EMPTY
    elif set(previous) - set(todo):
        manifest.check_environment(place.results, made)
    ran = {stem: entry for stem, entry in made["notebooks"].items() if stem in plan}
    machine = "{cores} cores ({cpu})".format(**manifest.environment()["machine"])
    for k, stem in enumerate(todo, 1):
        earlier = previous.get(stem, {})
        takes = f" (with an empty cache about {minutes(earlier['training']['seconds'])})" if earlier else ""
        print(f"[{k}/{len(todo)}] {stem}{takes}", flush=True)
        manifest.check_results(place.results, made, rerun=stem)
        before = {path: path.stat().st_mtime_ns for path in manifest.raw_results(place.results)}
        cached, started, start = manifest.cached_stacks(), manifest.now(), time.monotonic()
        of_what = fingerprint(place, stem, plan[stem])
        run_notebook(place, stem, plan[stem])
        results = manifest.raw_results(place.results)
        wrote = [path.name for path in results if path.stat().st_mtime_ns != before.get(path)]
        for name in set(wrote) - {"claims.csv"}:
            if others := [other for other, entry in ran.items() if other != stem and name in entry["results"]]:
                place.executed(stem).unlink()  # no page is to be made of it
                again = manifest.command(place.profile, *others)
                raise BuildError(f"{stem} wrote {name}, a result of {others[0]}. Rename it, and rebuild that: {again}")
        seconds, stacks = round(time.monotonic() - start, 1), manifest.cached_stacks() - cached
        this = {"stacks": stacks, "seconds": seconds, "machine": machine}
        same = earlier.get("parameters") == plan[stem]
        given = {name: parameter["default"] for name, parameter in parameters_of(place.notebook(stem)).items()}
        ran[stem] = {
            **of_what,
            "defaults": {name: text for name, text in given.items() if name not in plan[stem]},
            "started": started,
            "seconds": seconds,
            # of the build that trained most of it: others read the cache
            "training": max([this, earlier["training"]] if same else [this], key=lambda run: run["stacks"]),
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
        if {key: ran.get(key) for key in current} != current or not place.executed(stem).exists():
            print(f"No page yet: {stem} has to run with its present source and parameters and the present code first.")
            return None
        if problem := result_problem(place.executed(stem), ran["executed_sha256"]):
            raise BuildError(f"{problem} Rebuild it: {manifest.command(place.profile, stem)}")
    manifest.check_results(place.results, made)
    for path in manifest.raw_results(place.results):
        if path.name not in made["results"]:
            print(f"{path} is older than this run: no notebook writes it, and the page leaves it out.", file=sys.stderr)
    data = [place.results / name for name in [*made["results"], "manifest.json"]]
    said = findings(place.results) if place.profile == "full" else ""
    html = render({stem: place.executed(stem) for stem in plan}, made, data, said)
    if place.profile == "full" and (place.root / "README.md").exists():
        update_readme(place.root, made, said, html)
    write_text(html, place.page)
    print(f"{place.page}: {len(html.encode()) / 1e6:.2f} MB")
    return place.page


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 130 interrupted."""
    summary, details = __doc__.split("\n\n", 1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=raw)
    parser.add_argument("--profile", default="full", help="which report/profiles/NAME.yaml to build (default: full)")
    parser.add_argument("--only", metavar="NOTEBOOK", help="run only this notebook, given by the start of its name")
    parser.add_argument("--list", action="store_true", help="list profiles, notebooks and their parameters, and stop")
    options = parser.parse_args(argv)
    kept = "" if options.list else "The previous page is left as it was."
    try:
        if options.list:
            print(list_all(root))
        else:
            build(options.profile, options.only, root)
    except (BuildError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"build.py: {error}\n{kept} {manifest.restore(options.profile)}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the interrupted cell's own traceback tells nothing
        some = "Of the results beside it some may be missing or new. The same command goes on."
        print(f"\nbuild.py: interrupted. {kept} {some} {manifest.restore(options.profile)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the kernel too, as Ctrl-C does
    if "--list" in sys.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` ends quietly
    sys.exit(main())
