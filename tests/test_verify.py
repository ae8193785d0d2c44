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
    """A repository whose profile `toy` has an evaluation of three short runs."""
    root = tmp_path_factory.mktemp("trained")
    write_profile(root, "")
    folder = root / "report/results/toy"
    folder.mkdir(parents=True)
    given, defaults = {"epochs": 4, "batch_size": 500}, {"widths": [40, 8, 10], "probe_size": 4}
    runs, fresh = [Run(0, 0.01, 0.25), Run(0, 0.02, 0.5), Run(1, 0.02, 0.5)], draw_mnist1d(100, seed=43)
    curves = train(runs, load_mnist1d(), fresh=fresh, stack_size=1, n_jobs=1, **given, **defaults)
    write_table(curves.final().assign(arm=["low", "high", "high"]), folder / "evaluation.csv")
    settings = {name: repr(value) for name, value in (defaults | {"fresh_samples": 100}).items()}
    entry = {"started": manifest.now(), "seconds": 1, "parameters": given, "defaults": settings}
    manifest.write(folder, "toy", {"03_evaluation": entry | {"results": ["evaluation.csv"]}})
    return root


@pytest.fixture
def verified(trained, tmp_path, capsys):
    """A copy's results, and a function that verifies them: the exit code, and what was said."""
    root = shutil.copytree(trained, tmp_path / "copy")

    def verified(profile: str = "toy"):
        return verify.main(["--profile", profile], root), "".join(capsys.readouterr())

    return root / "report/results/toy", verified


def test_what_was_trained_is_reproduced_to_the_last_bit(verified):
    exit_code, said = verified[1]()
    assert exit_code == 0 and "2 whole runs" in said and "last bit" in said and "another" not in said


@pytest.mark.parametrize(("by", "exit_code"), [(0.2, 1), (float("nan"), 1), (1e-6, 0)])
def test_a_number_that_nothing_trained_is_noticed_even_where_the_manifest_lists_it(verified, by, exit_code):
    results, verified = verified
    table = pd.read_csv(results / "evaluation.csv")
    table.loc[0, "test_accuracy"] += by
    table.to_csv(results / "evaluation.csv", index=False)
    found, said = verified()
    assert found == 1 and "evaluation.csv" in said
    forged = manifest.read(results) | {"code_sha256": "other"}
    forged["results"]["evaluation.csv"] = manifest.sha256(results / "evaluation.csv")
    forged["machine"] |= {"cpu": "Z80", "arithmetic": "8 bits"}
    (results / "manifest.json").write_text(json.dumps(forged))
    found, said = verified()
    assert found == exit_code and "Z80" in said and "another version of the code" in said and "last bit" not in said


def test_without_results_it_names_the_command_that_makes_them(verified):
    results, verified = verified
    (results / "manifest.json").write_text(json.dumps(manifest.read(results) | {"notebooks": {}}))
    for name, profile in ("03_evaluation", "toy"), ("toy", "ful"):
        exit_code, said = verified(profile)
        assert exit_code == 1 and name in said
    shutil.rmtree(results)
    assert "report/build.py --profile toy" in verified()[1]


def test_the_smoke_profile_is_reproduced(smoke, capsys):
    assert verify.main(["--profile", "smoke"], smoke[0]) == 0 and "last bit" in capsys.readouterr().out
