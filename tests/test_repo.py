"""What the repository promises: clean notebooks, a lock that agrees, examples that run, numbers that recompute."""

import doctest
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import instructions
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import summary
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from statsmodels.stats.weightstats import DescrStatsW

import sgsc_lib

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FULL = ROOT / "report" / "results" / "full"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_clean_and_small(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "run `nbstripout` on it"
    head = cells[0].source if cells[0].cell_type == "markdown" else ""
    assert head.startswith("# "), f"{path.name} should begin with a title"
    assert "**Question.**" in head, f"{path.name} should have **Question.** below its title"
    for text in ("What this shows, and what it does not", "**Try this.**"):
        assert text in cells[-1].source, f"the last cell of {path.name} should hold {text!r}, as README.md says"
    for cell in code:
        lines = cell.source.splitlines()
        assert len(lines) <= 35, f"a cell should have at most 35 lines. {lines[0]!r} has {len(lines)}: cut it in two"
        found = re.search(r"sys\.path|os\.chdir|^[!%]", cell.source, re.MULTILINE)
        assert not found, f"{found[0]!r} changes what other cells mean; relative paths start at the project's root"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_a_default_and_help(path):
    source = nbformat.read(path, as_version=4)
    tagged = [cell.source for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, (
        f"one cell of {path.name}, the second, should have the tag `parameters`. {len(tagged)} have"
    )
    declared = papermill.inspect_notebook(path)
    assert len(declared) == len(tagged[0].splitlines()), "a parameter should take one line, and a line hold one"
    assert "results" in declared or path.stem == "playground", (
        "`results` should be a parameter: the folder that build.py gives"
    )
    for name, parameter in declared.items():
        known = parameter["inferred_type_name"] in {"int", "float", "str", "bool", "list[int]", "list[float]"}
        assert known and parameter["help"] and parameter["default"], (
            f"`{name}` should read name: type = default  # help"
        )
    checked = re.search(r"check_parameters\(globals\(\), (.*)\)", "\n".join(cell.source for cell in source.cells))
    for name, least in re.findall(r"(\w+)=\(?(\d+)", checked[1] if checked else ""):
        assert name in declared, f"check_parameters has a bound for {name!r}, which is no parameter"
        said = re.search(rf"(at least|a multiple of) {least}\b", declared[name]["help"])
        assert int(least) < 2 or said, f"the help of `{name}` should say 'at least {least}', as check_parameters does"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_that_trains_by_itself_does_so_on_one_thread(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    trains = any(".backward()" in source for source in code)
    one_thread = any("torch.set_num_threads(1)" in source for source in code)
    assert not trains or one_thread, "where it calls backward() add torch.set_num_threads(1): more sum in another order"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_lock_satisfies_the_declared_dependencies_and_the_environment_uses_it():
    text = (ROOT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ." and not any("://" in line for line in lines)
    locked = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines[:-1]}
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        need = Requirement(text)
        assert canonicalize_name(need.name) in locked, f"{text} is not in requirements.txt: run `make lock`"
        version = str(locked[canonicalize_name(need.name)].specifier)
        assert version.startswith("==") and need.specifier.contains(version[2:]), text
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]


def test_one_python_one_version_one_licence():
    python = re.search(r"PYTHON\s+\?= python(\S+)", (ROOT / "Makefile").read_text())[1]
    assert f"python={python}" in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]  # `make test` is itself a make, and would say where it is
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in listed.splitlines()] == targets


def test_every_public_name_has_an_example_and_they_run():
    own = {name: v for name, v in vars(sgsc_lib).items() if getattr(v, "__module__", "") == "sgsc_lib"}
    methods = {f"{n}.{m}": f for n, v in own.items() if inspect.isclass(v) for m, f in vars(v).items() if callable(f)}
    public = {name: v for name, v in (own | methods).items() if not re.search(r"(^|\.)_", name)}
    assert {name for name, v in public.items() if ">>>" not in (v.__doc__ or "")} <= {"Dataset"}
    found = doctest.testmod(sgsc_lib)
    assert found.attempted > len(public) > 40 and found.failed == 0


def test_the_readmes_example_trains_a_model():
    source = re.search(r"```python\n(from sgsc_lib import SGSC.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    data = sgsc_lib.load_mnist1d()
    loader = [(data.x_train[i : i + 128], data.y_train[i : i + 128]) for i in range(0, 1280, 128)]
    model, loss_fn = sgsc_lib.mlp(seed=0), torch.nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.no_grad():
        before = loss_fn(model(data.x_train), data.y_train).item()
    exec(source, {"model": model, "loader": loader, "loss_fn": loss_fn, "optimizer": optimizer})
    with torch.no_grad():
        assert loss_fn(model(data.x_train), data.y_train).item() < before - 0.1


def test_the_readmes_layer_and_gate_work():
    layer, gate = (
        re.search(rf"```python\n([^`]*{name}[^`]*)```", (ROOT / "README.md").read_text())[1]
        for name in (r"SGSC\.rules\[Scale\]", r"GATES\[\"majority\"\]")
    )
    made: dict = {}
    try:
        exec(layer, made)
        model = torch.nn.Sequential(torch.nn.Linear(40, 8), made["Scale"](8), torch.nn.Linear(8, 10))
        x, y = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
        with sgsc_lib.SGSC(model, gamma=0.5) as sgsc:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            expected = sgsc_lib.sign_consistency(sgsc_lib.per_sample_gradients(model, x, y))["1.scale"]
            assert torch.equal(sgsc.consistency()["1.scale"], expected)
        exec(gate, made)
        accuracy = made["curves"].test_accuracy
        assert accuracy.shape == (4, 5) and accuracy[:, -1].min() > 0.15  # chance is 0.1
    finally:
        sgsc_lib.SGSC.rules.pop(made.get("Scale"), None)
        sgsc_lib.GATES.pop("majority", None)


def test_the_readme_gives_the_workers_of_a_build_the_builds_variables():
    exported = " ".join(f"{name}={value}" for name, value in instructions.VARIABLES.items())
    assert f"`export {exported}`" in (ROOT / "README.md").read_text().replace("\n", " ")


def test_the_readmes_findings_and_figure_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    said = summary.findings(FULL / "claims.csv", summary.replica_of(FULL))
    assert summary.readme(text, FULL, said) == (text, (ROOT / summary.FIGURE).read_text())


def test_the_readmes_benchmark_is_that_of_the_committed_tables(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns(".*"))
    for path in ("README.md", "report/sgsc.mplstyle"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    command = [sys.executable, tmp_path / "benchmarks" / "summary.py"]
    subprocess.run(command, cwd=tmp_path / "benchmarks", check=True)
    for path in ("README.md", "benchmarks/results/benchmark.md", "benchmarks/results/benchmark.svg"):
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), f"{path}: run benchmarks/summary.py"


# -- the committed results, recomputed by another route (statsmodels) --------------------------------------------------


@pytest.fixture(scope="module")
def evaluation() -> pd.DataFrame:
    return pd.read_csv(FULL / "evaluation.csv")


def verdict_of(difference: np.ndarray, margin: float) -> str:
    """The four-way rule from statsmodels' intervals."""
    stats = DescrStatsW(difference)
    low90, high90 = stats.tconfint_mean(alpha=0.10)
    low95, high95 = stats.tconfint_mean(alpha=0.05)
    if -margin < low90 and high90 < margin:
        return "equivalent"
    return "better" if low95 > 0 else "worse" if high95 < 0 else "inconclusive"


def values(frame: pd.DataFrame, measure: str) -> np.ndarray:
    frame = frame.sort_values("seed")
    if measure == "test accuracy":
        return frame["final_test_accuracy"].to_numpy()
    if measure == "fresh accuracy":
        return frame["fresh_accuracy"].to_numpy()
    return (-frame["epoch_total_rise"] if "rise" in measure else -0.5 * np.log(frame["epoch_roughness"])).to_numpy()


MARGINS = {"test accuracy": 0.01, "fresh accuracy": 0.01, "smoothness (-log roughness)": np.log(1.1)}
MARGINS["smoothness (-total rise)"] = 0.05


def test_every_paired_comparison_recomputes(evaluation):
    comparisons = pd.read_csv(FULL / "comparisons.csv")
    matched = pd.read_csv(FULL / "matched.csv")
    searches = pd.read_csv(FULL / "searches.csv")
    counted = comparisons["setting"].str.startswith("every search")
    assert len(comparisons) >= 40 and comparisons[~counted]["n"].min() >= 32 and set(comparisons[counted]["n"]) == {6}
    for row in comparisons.itertuples():
        if "every search" in row.setting:
            a, b = (
                np.array(
                    [values(part, row.measure).mean() for _, part in searches[searches["arm"] == arm].groupby("study")]
                )
                for arm in (row.a, row.b)
            )
            difference = a - b
        elif "matched" in row.setting:
            part = matched[(matched["setting"] == row.setting) & (matched["measure"] == row.measure)]
            difference = (part["a"] - part["b"]).to_numpy()
        else:
            a, b = (values(evaluation[evaluation["arm"] == arm], row.measure) for arm in (row.a, row.b))
            difference = a - b
        low, high = DescrStatsW(difference).tconfint_mean()
        np.testing.assert_allclose(
            [row.mean_difference, row.ci_low, row.ci_high], [difference.mean(), low, high], rtol=1e-6, atol=1e-9
        )
        assert row.verdict == verdict_of(difference, MARGINS[row.measure]), (row.setting, row.measure)


def test_every_claim_about_a_pair_of_arms_carries_its_comparisons_verdict():
    claims, comparisons = pd.read_csv(FULL / "claims.csv"), pd.read_csv(FULL / "comparisons.csv")
    assert tuple(claims.columns) == sgsc_lib.CLAIM_COLUMNS and claims["id"].is_unique
    assert {"1", "2", "3", "4", "5"} <= {identity[0] for identity in claims["id"]}
    card = {"confirmed", "contradicted", "equivalent", "inconclusive"}
    assert set(claims.loc[claims["source"] == "card", "verdict"]) <= card
    agreeing = {"test accuracy": "worse", "fresh accuracy": "worse"}
    for row in comparisons.itertuples():
        same = (claims["setting"] == row.setting) & (claims["measure"] == f"difference in {row.measure}")
        (verdict,) = claims.loc[same & (claims["notebook"] == "03_evaluation"), "verdict"]
        if row.verdict in ("better", "worse"):
            agrees = row.verdict == agreeing.get(row.measure, "better")
            assert verdict == ("confirmed" if agrees else "contradicted")
        else:
            assert verdict == row.verdict


def test_the_attribution_recomputes_and_its_parts_add_up(evaluation):
    attribution = pd.read_csv(FULL / "attribution.csv")
    rho = {arm: -values(frame, "smoothness (-log roughness)") for arm, frame in evaluation.groupby("arm")}
    corners = {
        "card's values": ("card's Adam", "card's SGSC", "card's Adam at SGSC's rate", "card's SGSC at Adam's rate")
    }
    for place in ("before", "after"):
        corners[f"tuned, {place}"] = (
            "Adam",
            f"SGSC {place}",
            f"Adam at {place}'s rate",
            f"SGSC {place} at Adam's rate",
        )
    for contrast, (adam, sgsc, slow, fast) in corners.items():
        part = attribution[attribution["contrast"] == contrast].set_index("part")
        total, rate, gate = (rho[arm] - rho[adam] for arm in (sgsc, slow, fast))
        by_hand = {"total": total, "learning rate": rate, "γ": gate, "interaction": total - rate - gate}
        for name, difference in by_hand.items():
            low, high = DescrStatsW(difference).tconfint_mean()
            row = part.loc[name]
            np.testing.assert_allclose(
                [row["estimate"], row["ci_low"], row["ci_high"]], [difference.mean(), low, high], rtol=1e-6, atol=1e-9
            )
        assert part.loc["total", "estimate"] == pytest.approx(
            part.loc[["learning rate", "γ", "interaction"], "estimate"].sum()
        )
