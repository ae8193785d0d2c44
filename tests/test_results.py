"""Result files and claims."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from sgsc_study import claim, compare_paired, read_table, write_claims, write_table
from sgsc_study.cache import ROOT
from sgsc_study.results import CLAIM_COLUMNS, build_command, result_problem, results_folder, write_text


def test_tables_come_back_with_every_digit(tmp_path):
    frame = pd.DataFrame({"x": [0.1 + 0.2, 1e-300, np.nan, *np.random.default_rng(0).lognormal(0, 9, 99)]})
    write_table(frame, tmp_path / "t.csv")
    np.testing.assert_array_equal(read_table(tmp_path / "t.csv", made_by="02")["x"], frame["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text("before", tmp_path / "t")
    for broken in ("write_text", "replace"):
        with monkeypatch.context() as patch:
            owner = "pathlib.Path.write_text" if broken == "write_text" else "os.replace"
            patch.setattr(owner, lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
            with pytest.raises(OSError, match="No space"):
                write_text("after", tmp_path / "t")
        assert [path.name for path in tmp_path.iterdir()] == ["t"] and (tmp_path / "t").read_text() == "before"


def test_a_missing_table_names_its_maker(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"02_tuning.*{ROOT}"):
        read_table(tmp_path / "none.csv", made_by="02_tuning")
    with pytest.raises(FileNotFoundError, match=r"report/build\.py --profile smoke"):
        read_table("report/results/smoke/none.csv", made_by="02_tuning")


def test_a_table_is_read_as_the_manifest_beside_it_lists_it(tmp_path):
    table, manifest = tmp_path / "t.csv", tmp_path / "manifest.json"
    write_table(pd.DataFrame({"x": [1, 2]}), table)
    listed = {"t.csv": hashlib.sha256(table.read_bytes()).hexdigest()}

    def read(results: dict, notebooks: tuple = ("02_tuning",)):
        manifest.write_text(json.dumps({"notebooks": dict.fromkeys(notebooks, {}), "results": results}))
        return read_table(table, made_by="02_tuning")

    assert read(listed)["x"].tolist() == [1, 2] and result_problem(table, listed["t.csv"]) == ""
    with pytest.raises(ValueError, match=r"t\.csv.*--only 02_tuning$"):
        read({})
    with pytest.raises(ValueError, match=r"build\.py --profile [^ ]+$"):  # which made no such notebook
        read({}, notebooks=())
    table.write_text("x\n1\n3\n")
    with pytest.raises(ValueError, match=r"t\.csv.*--only 02_tuning"):
        read(listed)
    assert "t.csv" in result_problem(table, listed["t.csv"])
    for damaged in ("", "[]", "{}", '{"notebooks": 1, "results": 2}', manifest.read_text()[:-20]):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_table(table, made_by="02_tuning")


@pytest.mark.parametrize("content", [b"", b'a,b\n"1,2\n', b"\xff\xfe\x00"], ids=["empty", "cut", "bytes"])
def test_what_is_no_table_is_refused_by_its_path(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.csv"):
        read_table(tmp_path / "t.csv", made_by="02")


def test_claims_are_replaced_by_notebook(tmp_path):
    row = dict.fromkeys(set(CLAIM_COLUMNS) - {"notebook"}, "x")
    for notebook, ids in (("02", "ab"), ("03", "c"), ("02", "d")):
        own = write_claims([{**row, "id": i} for i in ids], tmp_path, notebook=notebook)
        assert list(own["id"]) == list(ids) and set(own["notebook"]) == {notebook}
    written = pd.read_csv(tmp_path / "claims.csv", dtype=str)
    assert tuple(written.columns) == CLAIM_COLUMNS and list(written["id"]) == ["c", "d"]
    with pytest.raises(ValueError, match="columns"):
        write_claims([{"id": "a"}], tmp_path, notebook="02")
    (tmp_path / "claims.csv").write_text("id\na\n")
    with pytest.raises(ValueError, match=r"claims\.csv"):
        write_claims([row], tmp_path, notebook="02")


ABOUT = {"source": "card", "setting": "tuned", "measure": "difference", "figure": "arms"}


@pytest.mark.parametrize(
    ("agrees", "verdicts"),
    [
        ("better", ["confirmed", "contradicted", "equivalent", "inconclusive"]),
        ("worse", ["contradicted", "confirmed", "equivalent", "inconclusive"]),
        ("", ["better", "worse", "equivalent", "inconclusive"]),
    ],
)
def test_a_claim_carries_its_comparison_and_a_card_is_confirmed_or_contradicted(agrees, verdicts):
    found = compare_paired([3.0, 4.0, 5.0], [1.0, 2.0, 3.5], margin=0.1)
    comparisons = [found._replace(verdict=verdict) for verdict in ("better", "worse", "equivalent", "inconclusive")]
    rows = [claim("1", "a claim", comparison, agrees=agrees, **ABOUT) for comparison in comparisons]
    assert [row["verdict"] for row in rows] == verdicts
    assert set(rows[0]) == set(CLAIM_COLUMNS) - {"notebook"} and rows[0].items() >= ABOUT.items()
    assert rows[0]["estimate"] == found.mean_difference and (rows[0]["n"], rows[0]["p"]) == (3, found.p)
    assert claim("1", "a claim", found._asdict(), agrees=agrees, **ABOUT) == rows[0]


def test_folders_start_at_the_projects_root(tmp_path):
    assert results_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    assert results_folder("report/results/full") == ROOT / "report" / "results" / "full"
    with pytest.raises(TypeError, match="`results`"):
        results_folder(3)
    assert build_command("quick").endswith("report/build.py --profile quick")
