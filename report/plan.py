"""A profile: where its files are, and the plan that it makes of the notebooks, checked before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import papermill
import yaml
from manifest import BuildError

from sgsc_study.cache import ROOT
from sgsc_study.parameters import parameter_problems


class Place:
    """Where a profile's files are, below the root of a repository."""

    def __init__(self, profile: str, root: Path = ROOT):
        if profile not in profiles(root):
            raise BuildError(f"There is no profile {profile!r}. There are: {', '.join(profiles(root))}.")
        self.profile, self.root = profile, root
        self.results = root / "report/results" / profile
        self.page = root / "report" / ("sgsc.html" if profile == "full" else f"sgsc-{profile}.html")

    def notebook(self, stem: str) -> Path:
        return self.root / "notebooks" / f"{stem}.ipynb"

    def executed(self, stem: str) -> Path:
        return self.root / "report/executed" / self.profile / f"{stem}.ipynb"


def profiles(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "report/profiles").glob("*.yaml"))


def notebooks(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))


class PlainYAML(yaml.SafeLoader):
    """YAML without its traps: a key that stands twice, where the second would win; 010, which would be 8; 1:30, 90."""

    def construct_mapping(self, node, deep=False):
        names = [str(key.value) for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(sorted(twice))} twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        if not re.fullmatch(r"[-+]?(0|[1-9][\d_]*)", node.value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is no plain number", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node):
        if ":" in node.value:  # 1:30.5 would be 90.5
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is no plain number", node.start_mark)
        return super().construct_yaml_float(node)


PlainYAML.add_constructor("tag:yaml.org,2002:int", PlainYAML.construct_yaml_int)
PlainYAML.add_constructor("tag:yaml.org,2002:float", PlainYAML.construct_yaml_float)


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Return what papermill finds declared in a notebook, by name: type, default and help, as they are written."""
    try:
        return papermill.inspect_notebook(notebook)
    except Exception as error:  # each damage of the file ends in another one
        raise BuildError(f"{notebook} is not a notebook: {error!r}") from None


def read_profile(place: Place) -> dict[str, dict[str, Any]]:
    """Return `{notebook: {parameter: value}}` in the order to run; BuildError lists all that is wrong with it."""
    path = f"report/profiles/{place.profile}.yaml"
    try:
        profile = yaml.load((place.root / path).read_text(encoding="utf-8"), Loader=PlainYAML)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: no UTF-8, or 2026-13-45
        raise BuildError(f"{path} should be YAML in UTF-8, with plain numbers and dates. Found: {error}") from None
    if not isinstance(profile, dict):
        raise BuildError(f"{path} should be lines of `notebook: {{parameter: value}}`. Found {profile!r}.")
    plan, problems, folder = {}, [], place.results.relative_to(place.root).as_posix()
    for stem, given in profile.items():
        if stem not in notebooks(place.root):
            problems.append(f"{path}: there is no notebook {stem!r}. There are: {', '.join(notebooks(place.root))}.")
        elif not isinstance(given, dict | None):
            problems.append(f"{path}: {stem} should have lines of `parameter: value`. Found {given!r}.")
        else:
            declared = parameters_of(place.notebook(stem))
            kinds = {name: (p["inferred_type_name"], p["help"]) for name, p in declared.items() if name != "results"}
            values = {n: v.replace("{results}", folder) if isinstance(v, str) else v for n, v in (given or {}).items()}
            problems += [f"{path}, {stem}: {problem}" for problem in parameter_problems(kinds, values)]
            plan[stem] = values | ({"results": folder} if "results" in declared else {})
    if problems:
        raise BuildError("\n".join(problems))
    return plan


def list_all(root: Path) -> str:
    """Return the text of --list: the profiles, and each notebook's parameters with what every profile gives them."""
    plans, lines = {}, [f"profiles: {', '.join(profiles(root))}"]
    for name in profiles(root):
        try:
            plans[name] = read_profile(Place(name, root))
        except BuildError as error:  # the others are listed all the same
            lines.append(f"profile {name} cannot be read: {error}")
    for stem in notebooks(root):
        lines += ["", stem]
        try:
            parameters = parameters_of(root / "notebooks" / f"{stem}.ipynb")
        except BuildError as error:
            lines.append(f"    {error}")
            continue
        for name, declared in parameters.items():
            lines.append(f"    {name}: {declared['inferred_type_name']} = {declared['default']}  # {declared['help']}")
            having = {profile: plan[stem] for profile, plan in plans.items() if name in plan.get(stem, {})}
            lines += [f"        {profile}: {given[name]}" for profile, given in having.items()]
    return "\n".join(lines)
