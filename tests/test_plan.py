"""report/plan.py: what a profile may say, checked by the parameters cells before anything runs."""

import build
import pytest
from conftest import parameters, write_notebook, write_profile
from manifest import BuildError
from plan import Place, read_profile

PARAMETERS = parameters("""results: str = "elsewhere"  # folder for the raw results
n_seeds: int = 3  # how many, at least 3
samples: list[int] = [10]  # sizes, each a multiple of 10
lr: float = 0.1
rates: list[float] = [0.1]
arm: str = "adam"
storage: str = ""  # may be empty
shuffle: bool = True""")


@pytest.fixture
def read(tmp_path):
    """Read the profile `toy`, given as text or bytes, of a repository with one notebook."""
    write_notebook(tmp_path / "notebooks/01_one.ipynb", "# One", PARAMETERS)

    def read(text: str | bytes, name: str = "toy"):
        write_profile(tmp_path, text, name)
        return read_profile(Place(name, tmp_path))

    return read


@pytest.mark.parametrize("given", [
    "n_seed: 3", "n_seeds: many", "n_seeds: 3.0", "n_seeds: true", "n_seeds:", "n_seeds: 2", "samples: 10",
    "samples: [10, 15]", "lr: .nan", "lr: [0.1]", "lr: -0.1", "rates: 0.1", "rates: [0.1, fast]", "arm: ''",
    "arm: 3", "arm: 2026-11-01", "shuffle: 1", "results: here", "results:", "3: 4",
])  # fmt: skip
def test_a_wrong_parameter_is_refused_by_name(read, given):
    with pytest.raises(BuildError, match=rf"toy\.yaml, 01_one: `{given.partition(':')[0]}`") as refused:
        read(f"01_one: {{storage: '', {given}}}")
    assert "`storage`" not in str(refused.value)


def test_values_arrive_as_their_declared_types_and_a_copied_profile_reads_its_own_results(read):
    values = {"n_seeds": 3, "lr": 0.001, "rates": [1.0, 0.01, 0.5], "storage": "", "shuffle": False}
    for name in ("toy", "mine"):
        given = "{n_seeds: 3, lr: 1e-3, rates: [1, 1e-2, 0.5], storage: '', shuffle: no, arm: '{results}/tuned.csv'}"
        plan, folder = read(f"01_one: {given}", name)["01_one"], f"report/results/{name}"
        assert plan == values | {"arm": f"{folder}/tuned.csv", "results": folder} and type(plan["rates"][0]) is float


def test_all_that_is_wrong_is_told_at_once_and_nothing_runs(read, tmp_path, capsys):
    with pytest.raises(BuildError):
        read("01_one: {n_seeds: many, arm: 1}\n02_two: {n: 1}\n3: 4")
    assert build.main(["--profile", "toy"], tmp_path) == 1 and not (tmp_path / "report/executed").exists()
    error = capsys.readouterr().err
    assert all(name in error for name in ("`n_seeds`", "`arm`", "02_two", "notebook 3", "01_one"))
    assert build.main(["--profile", "ful"], tmp_path) == 1 and "'ful'" in capsys.readouterr().err


@pytest.mark.parametrize("text", [
    b"", b"- 01_one", b"01_one: 3", b"01_one: {n_seeds: ", b"01_one:\n01_one:", b"? [1, 2]\n: 3",
    b"01_one: {lr: 0.1, n_seeds: 3, lr: 0.2}", b"01_one: {n_seeds: 010}", b"01_one: {n_seeds: 0x10}",
    b"01_one: {n_seeds: 1:30}", b"01_one: {lr: 1:30.5}", b"01_one: {arm: 2026-13-45}", b"01_one: {n_seeds: 08}",
    b"01_one: " + b"[" * 3000, b"01_one: {arm: a\0b}", b"01_one:\n\tn_seeds: 3", b"--- \n01_one:\n---\n01_one:",
    "01_one: {arm: Müller}".encode("latin-1"), "01_one:".encode("utf-16"),
])  # fmt: skip
def test_a_profile_that_yaml_would_misread_is_refused_by_name_the_others_listed(read, tmp_path, capsys, text):
    read("01_one: {n_seeds: 9}", "good")
    with pytest.raises(BuildError, match=r"report/profiles/toy\.yaml"):
        read(text)
    assert build.main(["--list"], tmp_path) == 0
    said = capsys.readouterr().out
    assert "report/profiles/toy.yaml" in said and "good: 9" in said


def test_a_profile_that_is_a_folder_is_refused_by_name_and_one_by_a_windows_editor_is_read(read, tmp_path, capsys):
    assert read("\ufeff01_one: {n_seeds: 9}\r\n", "notepad")["01_one"]["n_seeds"] == 9
    (tmp_path / "report/profiles/folder.yaml").mkdir()
    assert build.main(["--list"], tmp_path) == 0 and "folder.yaml" in (said := capsys.readouterr().out)
    assert "notepad: 9" in said


def test_a_damaged_notebook_is_refused_by_name(read, tmp_path, capsys):
    path = tmp_path / "notebooks/01_one.ipynb"
    write_notebook(tmp_path / "notebooks/02_two.ipynb", "# Two", PARAMETERS)
    for damaged in (b"", b"[]", path.read_bytes()[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(BuildError, match=r"01_one\.ipynb"):
            read("01_one:")
        assert build.main(["--list"], tmp_path) == 0
        assert "01_one.ipynb" in (said := capsys.readouterr().out) and "02_two\n    results: str" in said


def test_list_shows_each_parameter_and_what_every_profile_gives(read, tmp_path, capsys):
    read("01_one: {n_seeds: 9}", "full")
    read("01_one: {n_seeds: 4}")
    assert build.main(["--list"], tmp_path) == 0
    assert "n_seeds: int = 3  # how many, at least 3\n        full: 9\n        toy: 4\n" in capsys.readouterr().out
