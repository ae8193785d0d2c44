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
import ast
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from filelock import FileLock, Timeout
from manifest import (
    LIBRARY,
    ROOT,
    BuildError,
    cached_stacks,
    check_environment,
    check_results,
    command,
    environment,
    now,
    raw_results,
    read_manifest,
    restore,
    results_of,
    sha256,
    write_manifest,
)
from nbclient.exceptions import DeadKernelError
from page import render
from papermill.exceptions import PapermillExecutionError
from summary import findings, replica_of, update_readme
from traitlets.config import Config

from sgsc_lib import duration, parameter_problems, result_problem, write_text

KERNEL = Config({"KernelManager": {"transport_encryption": "auto"}})  # no other user of the machine can listen in


@dataclass(frozen=True)
class Place:
    """Where a profile's files are, below the root of a repository."""

    profile: str
    root: Path = ROOT

    def __post_init__(self):
        if self.profile not in profiles(self.root):
            raise BuildError(f"There is no profile {self.profile!r}. There are: {', '.join(profiles(self.root))}.")

    def notebook(self, stem: str) -> Path:
        return self.root / "notebooks" / f"{stem}.ipynb"

    def executed(self, stem: str) -> Path:
        return self.root / "report/executed" / self.profile / f"{stem}.ipynb"

    @property
    def results(self) -> Path:
        return self.root / "report/results" / self.profile

    @property
    def page(self) -> Path:
        return self.root / "report" / ("sgsc.html" if self.profile == "full" else f"sgsc-{self.profile}.html")


def profiles(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "report/profiles").glob("*.yaml"))


def notebooks(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))


# ---------------------------------------------------------------------------------------------------------------------
# The profile, checked before anything runs
# ---------------------------------------------------------------------------------------------------------------------


class OneOfEachKey(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the second would win in silence."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(sorted(twice))} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def code_cells(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def lower_bounds(notebook: Path) -> dict[str, float]:
    """Return what the notebook gives `check_parameters` as the least value of a parameter, {name: number}."""
    source = next((text for text in code_cells(notebook) if "check_parameters(globals()" in text), "")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    mine = [call for call in calls if getattr(call.func, "id", "") == "check_parameters"]
    return {word.arg: ast.literal_eval(word.value) for call in mine for word in call.keywords if word.arg}


def names_given(notebook: Path) -> set[str]:
    """Return what the notebook's source calls its tables' files and the labels of its figures and tables."""
    names = set()
    for source in code_cells(notebook):
        with suppress(SyntaxError):  # IPython's own commands, which name nothing
            for node in ast.walk(ast.parse(source)):
                if not isinstance(node, ast.Call) or len(node.args) < 2:
                    continue
                kind = getattr(node.func, "id", "").replace("write_table", "file")
                name = getattr(node.args[1], "right", node.args[1])  # of folder / "name.csv"
                if kind in ("figure", "table", "file") and isinstance(name, ast.Constant):
                    names.add(f"{kind} {name.value!r}")  # a computed one is looked at once it is written
    return names


def read_profile(place: Place) -> dict[str, dict[str, Any]]:
    """Return `{notebook: {parameter: value}}` in the order to run; BuildError lists all that is wrong with it."""
    path = f"report/profiles/{place.profile}.yaml"
    try:
        profile = yaml.load((place.root / path).read_text(encoding="utf-8"), Loader=OneOfEachKey)
    except yaml.YAMLError as error:
        raise BuildError(f"{path} is not YAML: {error}") from None
    if not isinstance(profile, dict):
        raise BuildError(f"{path} should be lines of `notebook: {{parameter: value}}`. Found {profile!r}.")
    plan, problems, named, folder = {}, [], {}, place.results.relative_to(place.root).as_posix()
    for stem, given in profile.items():
        if stem not in notebooks(place.root):
            problems.append(f"{path}: there is no notebook {stem!r}. There are: {', '.join(notebooks(place.root))}.")
            continue
        if not isinstance(given, dict | None):
            problems.append(f"{path}: {stem} should have lines of `parameter: value`. Found {given!r}.")
            continue
        declared, found = papermill.inspect_notebook(place.notebook(stem)), []
        values = {n: v.replace("{results}", folder) if isinstance(v, str) else v for n, v in (given or {}).items()}
        for name, value in values.items():
            if isinstance(value, str) and "{" in value:
                found.append(f"`{name}` may hold {{results}} and nothing else in braces. Found {value!r}.")
            if name == "results":
                found.append("`results` is set by build.py. Leave it out.")
            elif name not in declared:
                found.append(f"`{name}` is not a parameter of this notebook. It has: {', '.join(declared)}.")
        if not declared:
            found = ["it should have a cell with the tag `parameters`, lines of `name: type = default`. Found none."]
        kinds = {name: declared[name]["inferred_type_name"] for name in values if name in declared}
        found += parameter_problems(kinds, values, lower_bounds(place.notebook(stem)))
        for name in sorted(names_given(place.notebook(stem))):
            if (other := named.setdefault(name, stem)) != stem:
                found.append(f"{name} is of {other} already. Give it a name of its own.")
        problems += [f"{path}, {stem}: {problem}" for problem in found]
        plan[stem] = values
        if "results" in declared:
            plan[stem]["results"] = folder
    if problems:
        raise BuildError("\n".join(problems))
    return plan


def defaults(place: Place, stem: str) -> dict[str, str]:
    """Return the notebook's parameters with their defaults, as they are written in it."""
    declared = papermill.inspect_notebook(place.notebook(stem))
    return {name: parameter["default"] for name, parameter in declared.items()}


def list_all(root: Path) -> str:
    """Return the text of --list: the profiles, and each notebook's parameters with what every profile gives them."""
    plans = {name: read_profile(Place(name, root)) for name in profiles(root)}
    lines = [f"profiles: {', '.join(plans)}"]
    for stem in notebooks(root):
        lines += ["", stem]
        for name, declared in papermill.inspect_notebook(root / "notebooks" / f"{stem}.ipynb").items():
            lines.append(f"    {name}: {declared['inferred_type_name']} = {declared['default']}  # {declared['help']}")
            given = {profile: plan[stem][name] for profile, plan in plans.items() if name in plan.get(stem, {})}
            lines += [f"        {profile}: {value}" for profile, value in given.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Running, and the manifest that says what was run
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Hold the profile's lock, which ends with this process however it ends; BuildError names a build that has it."""
    place.results.mkdir(parents=True, exist_ok=True)
    holder = place.results / ".lock.holder"
    try:
        with FileLock(place.results / ".lock", blocking=False):
            write_text(f"process {os.getpid()}, started {now()}", holder)
            for left in place.results.glob(".*.part"):  # by a build that was killed while it wrote
                left.unlink()
            yield
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "started just now"
        raise BuildError(f"another build of {place.profile} is running: {who}. Wait for it, or end it.") from None


def fingerprint(place: Place, stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what a notebook's results depend on: one that ran with another fingerprint is out of date."""
    return {"parameters": parameters, "sha256": sha256(place.notebook(stem)), "library_sha256": sha256(LIBRARY)}


def run_notebook(place: Place, stem: str, parameters: dict[str, Any]) -> None:
    """Run one notebook with this interpreter's kernel; BuildError names the cell that failed."""
    executed = place.executed(stem)
    output = executed.with_name(f".{stem}.part.ipynb")  # papermill writes after each cell
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            place.notebook(stem), output, parameters, kernel_name="python3", progress_bar=False,
            cwd=place.root, stdout_file=sys.stdout, stderr_file=sys.stderr, config=KERNEL,
            extra_arguments=["--log-level=CRITICAL"],  # a kernel that is told to end calls that an ERROR
        )  # fmt: skip
    except (PapermillExecutionError, DeadKernelError) as error:
        cells = [cell for cell in nbformat.read(output, as_version=4).cells if "papermill" in cell.metadata]
        ran = [cell for cell in cells if cell.metadata.papermill.get("start_time")]  # the last of them failed
        number = sum("injected-parameters" not in cell.metadata.get("tags", []) for cell in ran)
        if isinstance(error, DeadKernelError):
            what = "the kernel died (out of memory, or a crash in compiled code)."
        else:
            what = f"{error.ename}: {error.evalue}"
            if "check_parameters(" not in ran[-1].source:  # such a cell says what is wrong in words
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
        ran = run(place, plan, todo)
        return write_page(place, plan, ran)


def run(place: Place, plan: dict[str, dict[str, Any]], todo: list[str]) -> dict[str, Any]:
    """Run the notebooks `todo` of the plan; return the manifest's entries of all that are run by now."""
    whole = todo == list(plan)
    try:
        manifest = read_manifest(place.results)
    except BuildError:
        if not whole:
            raise
        manifest = {"notebooks": {}}
    previous = manifest["notebooks"]
    ran = {stem: entry for stem, entry in previous.items() if not whole and stem in plan}
    if whole:
        (place.results / "claims.csv").unlink(missing_ok=True)  # the one file to which notebooks add
    elif set(ran) - set(todo):
        check_environment(place.results, manifest)
    machine = "{cores} cores ({cpu})".format(**environment()["machine"])
    begin = time.monotonic()
    for k, stem in enumerate(todo, 1):
        left = ""
        if all(later in previous for later in todo[k - 1 :]):
            ran_before = [previous[later].get("training", previous[later]) for later in todo[k - 1 :]]
            expected = sum(entry["seconds"] for entry in ran_before)
            left = f", about {duration(expected)} left, less for what the cache holds"
        print(f"[{k}/{len(todo)}] {stem}: {duration(time.monotonic() - begin)} so far{left}", flush=True)
        check_results(place.results, results_of(ran), ran, rerun=stem)
        before = {path: path.stat().st_mtime_ns for path in raw_results(place.results)}
        cached = cached_stacks()
        started, start, of_what = now(), time.monotonic(), fingerprint(place, stem, plan[stem])
        run_notebook(place, stem, plan[stem])
        wrote = [path for path in raw_results(place.results) if path.stat().st_mtime_ns != before.get(path)]
        for path in wrote:
            others = [name for name in plan if name != stem and path.name in ran.get(name, {}).get("results", {})]
            if others and path.name != "claims.csv":
                place.executed(stem).unlink()  # no page is to be made of it
                raise BuildError(
                    f"{stem} wrote {path.name}, which is a result of {others[0]}. Give it a name of its own, and make "
                    f"the other anew: {command(place.profile, others[0])}"
                )
        this = {
            "stacks": cached_stacks() - cached,
            "seconds": round(time.monotonic() - start, 1),
            "machine": machine,
        }
        before_this = previous.get(stem, {})
        same = "training" in before_this and before_this["parameters"] == plan[stem]
        ran[stem] = {
            **of_what,
            "defaults": {name: text for name, text in defaults(place, stem).items() if name not in plan[stem]},
            "started": started,
            "seconds": this["seconds"],
            "stacks_trained": this["stacks"],
            # of the build that trained most of it: others read the cache
            "training": max([this, *([before_this["training"]] if same else [])], key=lambda run: run["stacks"]),
            "executed_sha256": sha256(place.executed(stem)),
            "results": {path.name: sha256(path) for path in wrote},
        }
        write_manifest(place.results, place.profile, {name: ran[name] for name in plan if name in ran})
        print(f"[{k}/{len(todo)}] {stem}: done in {duration(ran[stem]['seconds'])}", flush=True)
    return ran


def write_page(place: Place, plan: dict[str, dict[str, Any]], ran: dict[str, Any]) -> Path | None:
    """Render the executed notebooks and the results as the profile's page; None: a notebook is out of date."""
    for stem in plan:
        current = fingerprint(place, stem, plan[stem])
        if {key: ran.get(stem, {}).get(key) for key in current} != current or not place.executed(stem).exists():
            print(f"No page yet: {stem} has to run with its present source, parameters and sgsc_lib.py first.")
            return None
        if problem := result_problem(place.executed(stem), ran[stem]["executed_sha256"]):
            raise BuildError(f"{problem} Make it anew: {command(place.profile, stem)}")
    manifest = read_manifest(place.results)
    check_results(place.results, manifest["results"], ran)
    for path in raw_results(place.results):
        if path.name not in manifest["results"]:
            print(f"{path} is older than this run: no notebook writes it, and the page leaves it out.", file=sys.stderr)
    data = [place.results / name for name in [*manifest["results"], "manifest.json"]]
    said = findings(place.results / "claims.csv", replica_of(place.results))
    html = render({stem: place.executed(stem) for stem in plan}, manifest, data, said)
    if place.profile == "full" and (place.root / "README.md").exists():
        update_readme(place.root, place.results, said)
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
    try:
        if options.list:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` ends in silence
            print(list_all(root))
        else:
            build(options.profile, options.only, root)
    except BuildError as error:
        kept = "" if options.list else f"\nThe previous page is left as it was. {restore(options.profile)}"
        print(f"build.py: {error}{kept}".rstrip(), file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        where = f": {error.filename}" if error.filename else ""
        print(f"build.py: {error.strerror}{where}\nThe previous page is left as it was.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the interrupted cell's own traceback tells nothing
        print(
            "\nbuild.py: interrupted. The previous page is left as it was; of the results beside it some may be "
            f"missing or new. The same command goes on. {restore(options.profile)}",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the kernel too, as Ctrl-C does
    sys.exit(main())
