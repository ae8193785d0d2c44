"""report/verify.py: it trains again what the results say, and notices a number that nothing trained."""

import json
import shutil

import manifest
import pandas as pd
import pytest
import verify
from conftest import write_profile

from sgsc_study import Run, draw_mnist1d, load_mnist1d, train, write_table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A repository whose profile `toy` has an evaluation of two short runs."""
    root = tmp_path_factory.mktemp("trained")
    write_profile(root, "")
    folder = root / "report" / "results" / "toy"
    folder.mkdir(parents=True)
    settings = {"epochs": 4, "batch_size": 500, "widths": [40, 8, 10], "probe_size": 4}
    runs = [Run(0, 0.01), Run(0, 0.02, 0.5), Run(1, 0.02, 0.5)]
    curves = train(runs, load_mnist1d(), fresh=draw_mnist1d(100, seed=43), stack_size=1, n_jobs=1, **settings)
    write_table(curves.final().assign(arm=["Adam", "SGSC", "SGSC"]), folder / "evaluation.csv")
    given = {name: settings.pop(name) for name in ("epochs", "batch_size")}
    written = {name: repr(value) for name, value in (settings | {"fresh_samples": 100}).items()}
    entry = {"started": manifest.now(), "seconds": 1, "results": ["evaluation.csv"]}
    manifest.write(folder, "toy", {"03_evaluation": entry | {"parameters": given, "defaults": written}})
    return root


@pytest.fixture
def results(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy") / "report" / "results" / "toy"


def verified(results, profile: str = "toy") -> int:
    return verify.main(["--profile", profile], results.parents[2])


def test_what_was_trained_is_reproduced_to_the_last_bit(results, capsys):
    assert verified(results) == 0
    said = capsys.readouterr().out
    assert "2 whole runs" in said and "last bit" in said and "another" not in said


@pytest.mark.parametrize(("by", "exit_code"), [(0.2, 1), (float("nan"), 1), (1e-6, 0)])
def test_a_number_that_nothing_trained_is_noticed_even_where_the_manifest_lists_it(results, capsys, by, exit_code):
    table = pd.read_csv(results / "evaluation.csv")
    table.loc[0, "final_test_accuracy"] += by
    table.to_csv(results / "evaluation.csv", index=False)
    assert verified(results) == 1 and "evaluation.csv" in capsys.readouterr().err
    forged = manifest.read(results)
    forged["results"]["evaluation.csv"] = manifest.sha256(results / "evaluation.csv")
    forged["machine"] |= {"cpu": "Z80", "arithmetic": "8 bits"}
    forged["code_sha256"] = "other"
    (results / "manifest.json").write_text(json.dumps(forged))
    assert verified(results) == exit_code
    said = capsys.readouterr().out
    assert "Z80" in said and "another version of the code" in said and "last bit" not in said


def test_without_results_it_names_the_command_that_makes_them(results, capsys):
    forged = manifest.read(results)
    (results / "manifest.json").write_text(json.dumps(forged | {"notebooks": {}}))
    assert verified(results) == 1 and "03_evaluation" in capsys.readouterr().err
    shutil.rmtree(results)
    assert verified(results) == 1
    assert "report/build.py --profile toy" in capsys.readouterr().err
    assert verified(results, "ful") == 1 and "toy" in capsys.readouterr().err


def test_the_smoke_profile_is_reproduced(smoke, capsys):
    assert verify.main(["--profile", "smoke"], smoke) == 0
    assert "last bit" in capsys.readouterr().out
