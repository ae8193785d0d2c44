"""What the repository promises: clean notebooks, a lock that agrees, examples that run."""

import doctest
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from unittest.mock import patch

import instructions
import nbformat
import papermill
import pytest
import torch
import yaml
from asserts import assert_consistency, measured
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import sgsc_lib
import sgsc_study
from sgsc_study import GATES, load_mnist1d
from sgsc_study.parameters import declarations

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
MODULES = ["sgsc_lib", *(f"{path.parent.name}.{path.stem}" for path in sorted(ROOT.glob("sgsc_[cs]*/[a-z]*.py")))]


def text_of(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def lines_of(path: Path | str) -> list[str]:
    return text_of(path).splitlines()


PROJECT = tomllib.loads(text_of("pyproject.toml"))["project"]


def snippets(path: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(path), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_and_small_and_every_parameter_has_a_type_a_default_and_help(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "run `nbstripout` on it"
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ") and "**Question.**" in cells[0].source
    shown = re.search(r"\]\(\.\./report/sgsc\.html#(\S+?)\)", cells[1].source)
    assert shown[1] == ("explorer" if path.stem == "playground" else f"nb-{path.stem}"), "its section of the page"
    for text in ("What this shows, and what it does not", "**Try this.**"):
        assert text in cells[-1].source, f"the last cell of {path.name} should hold {text!r}"
    assert sum("begin(globals())" in cell.source for cell in code) == 1, "it sets one thread and checks the parameters"
    for lines in (cell.source.splitlines() for cell in code):
        assert len(lines) <= 35, f"a cell should have at most 35 lines. {lines[0]!r} has {len(lines)}: cut it in two"
        found = re.search(r"sys\.path|os\.chdir|^[!%]", "\n".join(lines), re.MULTILINE)
        assert not found, f"{found[0]!r} changes what other cells mean; relative paths start at the project's root"
    (tagged,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    told = papermill.inspect_notebook(path)
    assert len(told) == len(tagged.splitlines()), "a parameter should take one line, and a line hold one"
    assert {name: (p["inferred_type_name"], p["help"]) for name, p in told.items()} == declarations(tagged)
    assert "results" in told or path.stem == "playground", "`results` should be a parameter: build.py gives the folder"
    for name, parameter in told.items():
        known = parameter["inferred_type_name"] in {"int", "float", "str", "bool", "list[int]", "list[float]"}
        assert known and parameter["help"] and parameter["default"], f"`{name}` should be name: type = default  # help"


def test_the_lock_satisfies_what_is_declared_and_there_is_one_python_one_version_one_licence():
    *pins, last = lines_of("requirements.txt")
    assert last == "-e ." and not any("://" in line for line in pins)
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in pins)}
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["study"] + extras["test"]:
        need = Requirement(text)
        if need.name != "sgsc":
            found = locked.get(canonicalize_name(need.name))
            assert found and need.specifier.contains(found), f"{text} is not in requirements.txt: run `make lock`"
    for lock in ("requirements.txt", "architectures.txt"):
        for name, version in (line.split("==") for line in lines_of(f"benchmarks/{lock}")):
            assert locked.get(name, version) == version, f"benchmarks/{lock} has another {name} than the study uses"
    python = re.search(r"PYTHON\s+\?= python(\S+)", text_of("Makefile"))[1]
    for name, version in locked.items():  # systems have early releases of it: Debian 12 the third
        own = importlib.metadata.metadata(name)
        if own["Version"].partition("+")[0] == version and own.get("Requires-Python"):
            fits = SpecifierSet(own["Requires-Python"]).contains(f"{python}.0")
            assert fits, f"{name} {version} needs Python {own['Requires-Python']}"
    environment, citation = (yaml.safe_load(text_of(path)) for path in ("environment.yml", "CITATION.cff"))
    assert environment["dependencies"] == [f"python={python}", "pip", {"pip": ["-r requirements.txt"]}]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_files_are_of_a_size_that_one_reads_and_the_order_of_imports_leaves_no_module_out():
    assert len(lines_of("sgsc_lib.py")) <= 700 and len(lines_of("README.md")) <= 180
    for path in (each for folder in ("sgsc_core", "sgsc_study", "report") for each in ROOT.glob(f"{folder}/*.py")):
        assert len(lines_of(path)) <= 300, f"{path.name}: one idea a file"
    study, core = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = {part for layer in core["layers"] for part in layer.split(" | ")}
    layers |= {f"sgsc_study.{layer}" for layer in study["layers"]}
    assert layers - {"sgsc_study"} == set(MODULES) - {"sgsc_lib"}


@pytest.mark.parametrize("name", MODULES)
def test_every_name_that_is_offered_has_an_example_and_they_run(name):
    module = importlib.import_module(name)
    offered = {key: getattr(sgsc_lib, key) for key in sgsc_lib.__all__} | vars(sgsc_study)
    own = {key: value for key, value in offered.items() if getattr(value, "__module__", "") == name}
    methods = {f"{n}.{m}": f for n, v in own.items() if inspect.isclass(v) for m, f in vars(v).items() if callable(f)}
    public = {key: value for key, value in (own | methods).items() if not re.search(r"(^|\.)_", key)}
    assert {key for key, value in public.items() if ">>>" not in (value.__doc__ or "")} <= {"Dataset"}
    assert not doctest.testmod(module).failed


@pytest.mark.slow
def test_the_wheel_holds_all_modules_and_sgsc_needs_torch_alone(tmp_path):
    source = tmp_path / "source"
    for folder in ("sgsc_core", "sgsc_study"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "sgsc_lib.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, tmp_path, source], check=True)
    with zipfile.ZipFile(*tmp_path.glob("*.whl")) as wheel:
        assert {f"{name.replace('.', '/')}.py" for name in MODULES} <= set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    script = """
import sys
sys.modules.update(numpy=None, pandas=None)  # so that neither can be imported
import torch, sgsc_lib
model = sgsc_lib.mlp(seed=0)
sgsc = sgsc_lib.SGSC(model, gamma=0.25)
model(torch.randn(8, 40)).sum().backward()
sgsc.scale_gradients_()
print(sgsc_lib.__file__)
"""
    command = [sys.executable, "-P", "-W", "ignore", "-c", script]
    installed = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    ran = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()) == tmp_path / "installed" / "sgsc_lib.py"


def test_make_help_lists_every_target_and_the_pages_name_no_other():
    command = ["make", "--no-print-directory", "help"]  # `make test` is itself a make, and would say where it is
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.+)$", text_of("Makefile"), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in listed.splitlines()] == targets
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE))
        assert named <= set(targets), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"""\]\((?!https?:|#)([^)#]+)|src="([^"]+)""", text_of(page)):
        assert (page.parent / "".join(target)).exists(), "".join(target)


def test_the_readmes_map_names_what_is_there():
    (table,) = re.findall(r"^\| to change \|.*?\n\n", text_of("README.md"), re.DOTALL | re.MULTILINE)
    places = re.findall(r"`([\w./]+\.\w+)`(?:: ((?:`\w+`(?:, )?)+))?", table)
    assert len(places) >= 12
    for path, names in places:
        assert (ROOT / path).exists(), path
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(def|class) {name}\b", text_of(path), re.MULTILINE), (path, name)


def test_the_readmes_example_trains_a_model():
    (source,) = snippets("README.md")
    data = load_mnist1d()
    loader = [(data.x_train[i : i + 128], data.y_train[i : i + 128]) for i in range(0, 1280, 128)]
    model, loss_fn = sgsc_lib.mlp(seed=0), torch.nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = loss_fn(model(data.x_train), data.y_train).item()
    exec(source, {"model": model, "loader": loader, "loss_fn": loss_fn, "optimizer": optimizer})
    with torch.no_grad():
        assert loss_fn(model(data.x_train), data.y_train).item() < before - 0.1


@patch.dict(sgsc_lib.SGSC.rules)
def test_the_layer_of_the_docs_is_served_without_a_rule_and_by_one_of_its_own():
    layer, rule, _ = snippets("docs/extending.md")
    exec(layer, made := {})
    model = torch.nn.Sequential(torch.nn.Linear(40, 8), made["Scale"](8), torch.nn.Linear(8, 10))
    x, y = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    for more in ("", rule):
        exec(more, made)
        assert_consistency(measured(model, x, y), sgsc_lib.per_sample_gradients(model, x, y))


@patch.dict(GATES)
def test_the_gate_of_the_docs_trains():
    exec(snippets("docs/extending.md")[2], made := {})
    assert made["curves"].test_accuracy[:, -1].min() > 0.15  # chance is 0.1


def test_the_workers_of_a_build_are_given_the_builds_variables():
    exported = " ".join(f"{name}={value}" for name, value in instructions.VARIABLES.items())
    assert f"export {exported}" in lines_of("docs/scaling.md")


@pytest.mark.slow
def test_the_benchmarks_pages_are_those_of_the_committed_tables(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns(".*"))
    for path in ("docs/architectures.md", "docs/benchmark.md", "README.md", "report/sgsc.mplstyle"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for command in (["summary.py"], ["architectures.py", "--page"]):
        subprocess.run([sys.executable, *command], cwd=tmp_path / "benchmarks", check=True)
    figures = [f"benchmarks/results/{name}.svg" for name in ("benchmark", "scaling")]
    for path in ("docs/architectures.md", "docs/benchmark.md", "README.md", *figures):
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), f"{path}: see benchmarks/README.md"
