"""report/build.py on toy notebooks: what a build writes, what --only mixes never, what a failure leaves as it was."""

import json
import sys

import build
import manifest
import pytest
from conftest import SECOND, code, parameters, write_notebook, write_profile
from plan import Place, read_profile


def build_toy(root, *options: str, exit_code: int = 0):
    """Build the profile `toy`; a page stays as it was where the exit code is not 0."""
    page = root / "report" / "sgsc-toy.html"
    before = page.read_bytes() if page.exists() else None
    assert build.main(["--profile", "toy", *options], root) == exit_code
    assert exit_code == 0 or (page.read_bytes() if page.exists() else None) == before
    assert not [path for path in page.parent.glob("*sgsc*") if path != page]


def test_a_build_writes_page_executed_notebooks_results_and_manifest(built):
    report = built / "report"
    written = sorted(path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file())
    results = ["claims.csv", "interpreter.json", "manifest.json", "raw.csv", "stale.csv"]
    executed = ["executed/toy/01_first.ipynb", "executed/toy/02_second.ipynb", "profiles/toy.yaml"]
    assert [path for path in written if "/." not in path] == [
        *executed,
        *(f"results/toy/{name}" for name in results),
        "sgsc-toy.html",
    ]
    assert (report / "results/toy/claims.csv").read_text() == "id\none\ntwo\n"
    made = manifest.read(report / "results/toy")
    assert made["notebooks"]["01_first"]["parameters"] == {"note": "</code><script>", "results": "report/results/toy"}
    assert "stale.csv" not in made["results"] and made["seeds"] == {"raw.csv": [3]}
    assert {name: run["results"] for name, run in made["notebooks"].items()} == {
        "01_first": ["claims.csv", "interpreter.json", "raw.csv"],
        "02_second": ["claims.csv"],
    }


def test_the_kernel_is_this_interpreter_without_a_users_settings(built):
    assert json.loads((built / "report/results/toy/interpreter.json").read_text()) == sys.executable
    assert '"execute_result"' not in (built / "report/executed/toy/01_first.ipynb").read_text()


def test_only_runs_one_notebook_and_makes_the_page_when_all_are_up_to_date(toy, capsys):
    plan, first = read_profile(Place("toy", toy)), toy / "notebooks" / "01_first.ipynb"
    build_toy(toy, "--only", "02")
    out = capsys.readouterr().out
    assert "02_second" in out and "01_first" not in out and "sgsc-toy.html" in out
    source = first.read_text()
    first.write_text(source.replace("# First", "# First, changed"))
    assert build.write_page(Place("toy", toy), plan) is None and "01_first" in capsys.readouterr().out
    first.write_text(source)
    write_profile(toy, "01_first: {note: other}\n02_second:\n")
    assert build.write_page(Place("toy", toy), read_profile(Place("toy", toy))) is None
    assert build.write_page(Place("toy", toy), plan).exists()
    for only in ("0", "03"):
        build_toy(toy, "--only", only, exit_code=1)
        error = capsys.readouterr().err
        assert all(name in error for name in (repr(only), "01_first", "02_second"))


def test_what_other_code_made_is_out_of_date(toy, monkeypatch):
    monkeypatch.setattr(manifest, "code_sha256", lambda: "other")
    assert build.write_page(Place("toy", toy), read_profile(Place("toy", toy))) is None


def test_a_notebook_edited_while_it_runs_is_out_of_date(toy, monkeypatch, capsys):
    run_it, edited = build.run_notebook, SECOND[0] + ", edited"

    def edit(*given):
        run_it(*given)
        write_notebook(toy / "notebooks" / "02_second.ipynb", edited, *SECOND[1:])

    monkeypatch.setattr(build, "run_notebook", edit)
    build_toy(toy, "--only", "02")
    assert "02_second has to run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "name"), [("1 / 0", "ZeroDivisionError"), ("import os; os.kill(os.getpid(), 9)", "kernel died")]
)
def test_a_failing_cell_is_named_and_the_page_left(toy, capsys, source, name):
    write_profile(toy, "03_bad: {n: 2}")
    cells = parameters("n: int = 1"), code("x = 1"), code(source), code("y = 1")
    write_notebook(toy / "notebooks" / "03_bad.ipynb", "# Bad", *cells)
    build_toy(toy, exit_code=1)
    assert f"03_bad, cell 4: {name}" in capsys.readouterr().err.replace("the kernel", "kernel")


@pytest.mark.parametrize(("failure", "exit_code"), [(KeyboardInterrupt(), 130), (OSError(28, "full", "disk"), 1)])
def test_an_interrupt_or_a_full_disk_leaves_page_and_executed_notebooks(toy, monkeypatch, capsys, failure, exit_code):
    executed = toy / "report/executed/toy/02_second.ipynb"
    before, run_it = executed.read_bytes(), build.papermill.execute_notebook

    def fail(*given, **options):
        run_it(*given, **options)
        raise failure

    monkeypatch.setattr(build.papermill, "execute_notebook", fail)
    build_toy(toy, "--only", "02", exit_code=exit_code)
    assert executed.read_bytes() == before and "build.py: " in capsys.readouterr().err


def test_an_executed_notebook_that_was_altered_never_becomes_the_page(toy, capsys):
    place = Place("toy", toy)
    executed = place.executed("01_first")
    executed.write_bytes(executed.read_bytes().replace(b'"cell_type": "code"', b'"cell_type": "raw"', 1))
    with pytest.raises(build.BuildError, match=r"01_first\.ipynb.*--only 01_first"):
        build.write_page(place, read_profile(place))


def test_a_notebook_that_writes_anothers_result_is_refused_and_so_is_the_result(toy, capsys):
    cell = code("from pathlib import Path\n(Path(results) / 'raw.csv').write_text('mine\\n')")
    write_notebook(toy / "notebooks" / "02_second.ipynb", *SECOND[:2], cell)
    for _ in range(2):  # as it is written, then as it is read
        build_toy(toy, "--only", "02", exit_code=1)
        error = capsys.readouterr().err
        assert "raw.csv" in error and "--only 01_first" in error
