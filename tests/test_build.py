"""report/build.py on toy notebooks: what a build writes, what --only never mixes, what a failure leaves as it was."""

import json
import sys
from unittest.mock import Mock

import build
import manifest
import pytest
from conftest import SECOND, code, parameters, write_notebook, write_profile
from plan import Place, read_profile


def build_toy(root, *options: str, exit_code: int = 0):
    """Build the profile `toy`; its page stays as it was where that should fail."""
    page = root / "report/sgsc-toy.html"
    before = page.read_bytes()
    assert build.main(["--profile", "toy", *options], root) == exit_code
    assert exit_code == 0 or page.read_bytes() == before
    assert list((root / "report").glob("*sgsc*")) == [page]


def write_page(root):
    return build.write_page(Place("toy", root), read_profile(Place("toy", root)))


def test_a_build_writes_page_executed_notebooks_results_and_manifest(built):
    results = built / "report/results/toy"
    assert (results / "claims.csv").read_text() == "id\none\ntwo\n" and (built / "report/sgsc-toy.html").exists()
    made = manifest.read(results)
    first, second = made["notebooks"].values()
    assert first["parameters"] == {"note": "</code><script>", "results": "report/results/toy"} and not first["defaults"]
    assert {*first["results"]} == {*made["results"]} == {"claims.csv", "interpreter.json", "raw.csv"}
    assert second["results"] == ["claims.csv"]
    assert json.loads((results / "interpreter.json").read_text()) == sys.executable  # the kernel's, in spite of a decoy
    assert '"execute_result"' not in (built / "report/executed/toy/01_first.ipynb").read_text()  # no user's settings


def test_only_runs_one_notebook_and_makes_no_page_where_another_is_out_of_date(toy, monkeypatch, capsys):
    build_toy(toy, "--only", "02")
    out = capsys.readouterr().out
    assert "02_second" in out and "01_first" not in out and "sgsc-toy.html" in out and write_page(toy)
    monkeypatch.setattr(manifest, "code_sha256", lambda: "other code")
    assert write_page(toy) is None
    monkeypatch.undo()
    write_profile(toy, "01_first: {note: other}\n02_second:\n")
    assert write_page(toy) is None and "01_first" in capsys.readouterr().out
    for only in ("0", "03"):
        build_toy(toy, "--only", only, exit_code=1)
        assert repr(only) in capsys.readouterr().err


def test_the_time_to_train_counts_the_tries_that_failed_after_they_had_trained(toy, monkeypatch):
    path, stacks = toy / "notebooks/02_second.ipynb", iter([0, 5, 5, 7, 7, 7])
    monkeypatch.setattr(manifest, "cached_stacks", lambda: next(stacks))
    good = path.read_text()
    write_notebook(path, "# Second", parameters('results: str = "."'), code("raise ValueError"))
    build_toy(toy, "--only", "02", exit_code=1)
    path.write_text(good)
    build_toy(toy, "--only", "02")
    made = manifest.read(toy / "report/results/toy")["notebooks"]["02_second"]
    training = made["training"]
    assert training["stacks"] == 7 and training["seconds"] > made["seconds"]
    build_toy(toy, "--only", "02")  # from the cache
    assert manifest.read(toy / "report/results/toy")["notebooks"]["02_second"]["training"] == training


@pytest.mark.parametrize(("source", "why"), [
    ("raise IndexError", "IndexError"), ("import os; os.kill(os.getpid(), 9)", "the kernel died"),
])  # fmt: skip
def test_a_cell_that_fails_or_kills_its_kernel_is_named(toy, capsys, source, why):
    write_profile(toy, "03_bad: {n: 2}")
    cells = parameters("n: int = 1"), code("x = 1"), code(source), code("y = 1")
    write_notebook(toy / "notebooks/03_bad.ipynb", "# Bad", *cells)
    build_toy(toy, exit_code=1)
    assert f"03_bad, cell 4: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(("failure", "exit_code"), [
    (KeyboardInterrupt(), 130), (OSError(28, "full", "disk"), 1), (RuntimeError("Kernel didn't respond"), 1),
])  # fmt: skip
def test_what_stops_a_build_leaves_page_and_executed_notebooks(toy, monkeypatch, capsys, failure, exit_code):
    executed = toy / "report/executed/toy/02_second.ipynb"
    before = executed.read_bytes()
    monkeypatch.setattr(build.papermill, "execute_notebook", Mock(side_effect=failure))
    build_toy(toy, "--only", "02", exit_code=exit_code)
    assert executed.read_bytes() == before and "Traceback" not in capsys.readouterr().err


def test_an_executed_notebook_that_was_altered_never_becomes_the_page(toy):
    executed = toy / "report/executed/toy/01_first.ipynb"
    executed.write_text(executed.read_text().replace('"cell_type": "code"', '"cell_type": "raw"', 1))
    with pytest.raises(build.BuildError, match=r"01_first\.ipynb.*--only 01_first"):
        write_page(toy)


def test_a_notebook_that_writes_anothers_result_is_refused_and_so_is_the_result(toy, capsys):
    cell = code("from pathlib import Path\n(Path(results) / 'raw.csv').write_text('mine\\n')")
    write_notebook(toy / "notebooks/02_second.ipynb", *SECOND[:2], cell)
    for _ in range(2):  # as it is written, then as it is read
        build_toy(toy, "--only", "02", exit_code=1)
        error = capsys.readouterr().err
        assert "raw.csv" in error and "--only 01_first" in error


def test_a_notebook_edited_while_it_runs_is_out_of_date(toy, monkeypatch, capsys):
    def run_and_edit(*given, run_it=build.run_notebook):
        run_it(*given)
        write_notebook(toy / "notebooks/02_second.ipynb", "# Second, edited", *SECOND[1:])

    monkeypatch.setattr(build, "run_notebook", run_and_edit)
    build_toy(toy, "--only", "02")
    assert write_page(toy) is None and "02_second" in capsys.readouterr().out
