"""report/manifest.py: results are what it says, or refused by name; what was made otherwise is not mixed with them."""

import os
from contextlib import nullcontext

import build
import manifest
import pytest
from conftest import damaged
from manifest import BuildError

from sgsc_study.data import DATA_SHA256
from sgsc_study.results import read_table, write_text

MADE = {"01_first": ["a.csv", "claims.csv"], "02_second": ["b.csv", "claims.csv"]}


@pytest.fixture
def folder(tmp_path):
    """Results of two notebooks, and their manifest."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name in ("a.csv", "b.csv", "claims.csv"):
        (folder / name).write_text("seed,x\n2,0.5\n1,0.25\n")
    ran = {stem: {"started": manifest.now(), "seconds": 1.5, "results": names} for stem, names in MADE.items()}
    manifest.write(folder, "toy", ran)
    return folder


def test_it_says_what_made_the_results(folder):
    made = manifest.read(folder)
    assert made["results"] == {name: manifest.sha256(folder / name) for name in ("a.csv", "b.csv", "claims.csv")}
    assert made["profile"] == "toy" and made["seconds"] == 3.0 and made["data_sha256"] == DATA_SHA256
    assert {"torch", "numpy", "optuna"} <= set(made["packages"]) and "pytest" not in made["packages"]
    manifest.check_results(folder, made)
    manifest.check_environment(folder, made)


@pytest.mark.parametrize(("name", "only"), [("a.csv", "01_first"), ("b.csv", "02_second"), ("claims.csv", None)])
def test_a_damaged_result_is_refused_by_name_with_the_command_that_makes_it_anew(folder, name, only):
    made, path = manifest.read(folder), folder / name
    refused = pytest.raises(BuildError, match=rf"(?s){name}.*--profile toy{f' --only {only}' if only else ''}$")
    for bytes_ in damaged(path.read_bytes(), flips=8):
        path.write_bytes(bytes_)
        with refused:
            manifest.check_results(folder, made)
        with pytest.raises(ValueError, match=name):
            read_table(path, made_by="01_first")
    path.unlink()
    with refused:
        manifest.check_results(folder, made)
    for rerun in MADE:
        with nullcontext() if rerun == only else refused:  # it is about to be written anew
            manifest.check_results(folder, made, rerun=rerun)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"notebooks": {}', b'{"notebooks": {}, "results": \xff}'])
def test_a_damaged_manifest_is_refused_by_name(folder, text):
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(BuildError, match=r"manifest\.json.*--profile toy"):
        manifest.read(folder)


@pytest.mark.parametrize("key", ["python", "data_sha256", "packages torch", "machine arithmetic", "machine system"])
def test_what_was_made_otherwise_is_not_mixed(folder, key):
    made = manifest.read(folder)
    *outer, name = key.split()
    (made[outer[0]] if outer else made)[name] = "other"
    with pytest.raises(BuildError, match=rf"(?i){name.partition('_')[0]} other .*--profile toy"):
        manifest.check_environment(folder, made)


def test_a_build_refuses_damage_and_other_versions_before_anything_runs_and_a_whole_one_mends_it(toy, capsys):
    results, page = toy / "report/results/toy", toy / "report/sgsc-toy.html"
    before = page.read_bytes()
    for file, part, name in ("raw.csv", "3", "raw.csv"), ("manifest.json", '"torch": "', "torch 0."):
        (results / file).write_text((results / file).read_text().replace(part, f"{part}0."))
        assert build.main(["--profile", "toy", "--only", "02"], toy) == 1
        assert name in capsys.readouterr().err and page.read_bytes() == before
    assert build.main(["--profile", "toy"], toy) == 0
    manifest.check_results(results, manifest.read(results))
    assert (results / "claims.csv").read_text() == "id\none\ntwo\n"


def test_training_is_told_of_the_build_that_trained_most(toy, monkeypatch):
    stacks = iter([0, 12, 12, 12])  # before and after each notebook
    monkeypatch.setattr(manifest, "cached_stacks", lambda: next(stacks))
    monkeypatch.setattr(build, "run_notebook", lambda *_: None)
    for _ in range(2):
        assert build.main(["--profile", "toy", "--only", "02"], toy) == 0
        assert manifest.read(toy / "report/results/toy")["notebooks"]["02_second"]["training"]["stacks"] == 12


def test_setting_the_clock_back_damages_no_file_and_training_is_told_of_the_build_that_trained_most(toy, monkeypatch):
    years, stacks, results = iter(range(2020, 1900, -1)), iter([0, 12, 12, 12, 12, 12]), toy / "report/results/toy"
    monkeypatch.setattr(manifest, "now", lambda: f"{next(years)}-01-01T00:00:00+00:00")
    monkeypatch.setattr(manifest, "cached_stacks", lambda: next(stacks))  # before and after each notebook

    def run(*_):
        write_text(f"id\n{next(years)}\n", results / "claims.csv")
        os.utime(results / "claims.csv", (0, 0))

    monkeypatch.setattr(build, "run_notebook", run)
    for only in ("02", "01", "02"):
        assert build.main(["--profile", "toy", "--only", only], toy) == 0
        made = manifest.read(results)
        manifest.check_results(results, made)
        first, second = made["notebooks"].values()
        assert all("claims.csv" in entry["results"] for entry in (first, second))
        assert second["training"]["stacks"] == 12 and " cores" in second["training"]["machine"]
    assert first["started"] > second["started"] > made["finished"]
