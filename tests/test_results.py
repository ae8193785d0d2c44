"""Result files and claims."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from sgsc_study import claim, compare_paired, read_table, write_claims, write_rows, write_table
from sgsc_study.results import CLAIM_COLUMNS


def test_tables_come_back_with_every_digit(tmp_path):
    frame = pd.DataFrame({"x": [0.1 + 0.2, 1e-300, np.nan, *np.random.default_rng(0).lognormal(0, 9, 99)]})
    write_table(frame, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv", made_by="02"), frame, check_exact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_is_read_as_the_manifest_beside_it_lists_it_and_the_error_names_its_maker(tmp_path):
    table, manifest = tmp_path / "t.csv", tmp_path / "manifest.json"
    with pytest.raises(FileNotFoundError, match="02_tuning"):
        read_table(table, made_by="02_tuning")
    write_table(pd.DataFrame({"x": [1, 2]}), table)
    right = {"notebooks": {"02_tuning": {}}, "results": {table.name: hashlib.sha256(table.read_bytes()).hexdigest()}}
    manifest.write_text(json.dumps(right))
    assert read_table(table, made_by="02_tuning")["x"].tolist() == [1, 2]
    for wrong in (right | {"results": {}}, right | {"results": {table.name: "0" * 64}}):
        manifest.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"t\.csv.*--only 02_tuning"):
            read_table(table, made_by="02_tuning")
    for damaged in ("", "[]", "{}", json.dumps(right)[:-20]):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_table(table, made_by="02_tuning")
    manifest.unlink()
    for damaged in (b"", b'a,b\n"1,2\n', b"\xff\xfe\x00"):
        table.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.csv"):
            read_table(table, made_by="02_tuning")


def test_claims_are_replaced_by_notebook(tmp_path):
    row = dict.fromkeys(CLAIM_COLUMNS[1:-1], "x")
    for notebook, ids in (("02", "ab"), ("03", "c"), ("02", "d")):
        own = write_claims([{**row, "id": i} for i in ids], tmp_path, notebook=notebook)
        assert list(own["id"]) == list(ids)
    written = pd.read_csv(tmp_path / "claims.csv", dtype=str)
    assert tuple(written.columns) == CLAIM_COLUMNS
    assert written[["id", "notebook"]].values.tolist() == [["d", "02"], ["c", "03"]]
    with pytest.raises(ValueError, match="columns"):
        write_claims([{"id": "a"}], tmp_path, notebook="02")


def test_rows_of_another_notebook_keep_every_character_in_whatever_order_they_are_written(tmp_path):
    first, other = pd.DataFrame({"loss": [0.1 + 0.2, 1e-30]}), pd.DataFrame({"loss": [None, 7.0], "arm": ["a", "b"]})
    texts = set()
    for order in ((first, other), (other, first), (first, other, first, other)):
        for frame in order:
            write_rows(frame, tmp_path / "bank.csv", notebook="02" if frame is first else "05")
        texts.add((tmp_path / "bank.csv").read_text())
        (tmp_path / "bank.csv").unlink()
    assert sorted(map(len, texts))[0] == sorted(map(len, texts))[-1] and "0.30000000000000004" in texts.pop()


@pytest.mark.parametrize(("agrees", "better"), [("better", "confirmed"), ("worse", "contradicted"), ("", "better")])
def test_a_claim_carries_its_comparison_and_a_card_is_confirmed_or_contradicted(agrees, better):
    found = compare_paired([3.0, 4.0, 5.0], [1.0, 2.0, 3.5], margin=0.1)
    equivalent = {"verdict": "equivalent"}
    about = {"source": "card", "setting": "tuned", "measure": "difference", "figure": "arms"}
    row = claim("1", "a claim", [found, found, equivalent], agrees=agrees, **about)
    assert (row["verdict"], row["half_a"], row["half_b"]) == (better, better, "equivalent")
    assert (row["estimate"], row["p"]) == (found.mean_difference, found.p)
    assert row.keys() | {"notebook"} == set(CLAIM_COLUMNS)
