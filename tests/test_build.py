"""report/build.py and report/page.py on toy notebooks: what is refused, what a failure leaves, what a page has."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from urllib.parse import unquote

import build
import nbformat
import page
import pandas as pd
import pytest
import verify
from bs4 import BeautifulSoup
from conftest import ROOT, code, write_notebook

PARAMETERS = code(
    'results: str = "elsewhere"  # folder for the raw results\n'
    "n_seeds: int = 1  # how many\n"
    "lr: float = 0.1\n"
    "rates: list[float] = [0.1]\n"
    'arm: str = "adam"\n'
    "shuffle: bool = True\n"
    "odd: dict = {}\n",
    tags=("parameters",),
)
SVG = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
FIGURE = f'<figure id="fig-a"><img alt="A dot." src="{SVG}"><figcaption>One.</figcaption></figure>'
TABLE = (
    '<figure id="tbl-t" class="table"><figcaption>Two.</figcaption>'
    '<div class="scroll"><table border="0"><tr><td>1</td></tr></table></div></figure>'
)


@pytest.fixture
def toy(tmp_path):
    """A repository with one notebook and a way to write the smoke profile."""
    write_notebook(tmp_path / "notebooks" / "01_one.ipynb", "# One", PARAMETERS)
    (tmp_path / "report" / "profiles").mkdir(parents=True)

    def profile(text, name="smoke"):
        (tmp_path / "report" / "profiles" / f"{name}.yaml").write_text(text)
        return tmp_path

    return profile


# ---------------------------------------------------------------------------------------------------------------------
# The profile
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("n_seed: 3", "`n_seed` is not a parameter of this notebook. It has: results, n_seeds, "),
        ("n_seeds: many", "`n_seeds` should be an int. Found 'many'."),
        ("n_seeds: 3.0", "`n_seeds` should be an int. Found 3.0."),
        ("n_seeds: '3'", "`n_seeds` should be an int. Found '3'."),
        ("n_seeds: true", "`n_seeds` should be an int. Found True."),
        ("n_seeds:", "`n_seeds` should be an int. Found None."),
        ("lr: .nan", "`lr` should be a finite float. Found nan."),
        ("lr: .inf", "`lr` should be a finite float. Found inf."),
        ("lr: 'nan'", "`lr` should be a finite float. Found 'nan'."),
        ("lr: true", "`lr` should be a finite float. Found True."),
        ("lr: [0.1]", "`lr` should be a finite float. Found [0.1]."),
        ("rates: 0.1", "`rates` should be a non-empty list[float]. Found 0.1."),
        ("rates: []", "`rates` should be a non-empty list[float]. Found []."),
        ("rates: [0.1, fast]", "`rates` should be a finite float. Found 'fast'."),
        ("arm: ''", "`arm` should not be empty. Found ''."),
        ("arm: 3", "`arm` should be a str. Found 3."),
        ("arm: 2026-11-01", "`arm` should be a str. Found datetime.date(2026, 11, 1)."),
        ("shuffle: 1", "`shuffle` should be a bool. Found 1."),
        ("odd: {}", "`odd` should be declared as int, float, str, bool or a list[...] of one. Found dict."),
        ("results: here", "`results` is set by build.py. Leave it out."),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(toy, capsys, given, message):
    root = toy(f"01_one:\n  {given}\n")
    assert build.main(["--profile", "smoke"], root) == 1
    assert f"report/profiles/smoke.yaml, 01_one: {message}" in capsys.readouterr().err
    assert not (root / "report" / "executed").exists()


def test_every_notebook_is_checked_before_any_runs(toy, capsys):
    root = toy("01_one: {n_seeds: many, arm: 1}\n02_two: {n: 1}\n")
    assert build.main(["--profile", "smoke"], root) == 1
    error = capsys.readouterr().err
    assert "`n_seeds`" in error and "`arm`" in error
    assert "there is no notebook '02_two'. There are: 01_one." in error
    assert not (root / "report" / "executed").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should be lines of `notebook: {parameter: value}`"),
        ("- 01_one", "should be lines of `notebook: {parameter: value}`"),
        ("01_one: 3", "01_one should have lines of `parameter: value`. Found 3."),
        ("01_one: [n_seeds]", "01_one should have lines of `parameter: value`. Found ['n_seeds']."),
    ],
)
def test_a_profile_of_another_shape_is_refused(toy, capsys, text, message):
    assert build.main(["--profile", "smoke"], toy(text)) == 1
    assert message in capsys.readouterr().err


def test_a_profile_that_is_not_yaml_is_refused(toy, capsys):
    assert build.main(["--profile", "smoke"], toy("01_one: {n_seeds: ")) == 1
    assert "smoke.yaml is not YAML" in capsys.readouterr().err


def test_a_notebook_without_a_parameters_cell_is_refused(toy, capsys):
    root = toy("01_one:")
    write_notebook(root / "notebooks" / "01_one.ipynb", "# One", code("n: int = 1"))
    assert build.main(["--profile", "smoke"], root) == 1
    assert "01_one: it should have a cell with the tag `parameters`" in capsys.readouterr().err


def test_a_file_or_label_that_another_notebook_has_is_refused_before_any_runs(toy, capsys):
    root = toy("01_one:\n02_two:\n")
    source = "!ls"  # no Python
    for stem, file, label in ("01_one", "a", "b"), ("02_two", "a", "c"):
        made = f'write_table(t, folder / "{file}.csv")\nfigure(fig, "{label}", caption="c", alt="a")\n'
        cell = code(made + 'write_table(t, folder / f"{k}.csv")')
        write_notebook(root / "notebooks" / f"{stem}.ipynb", "# N", PARAMETERS, code(source), cell)
    assert build.main(["--profile", "smoke"], root) == 1
    message = capsys.readouterr().err
    assert "02_two: file 'a.csv' is of 01_one already. Give it a name of its own." in message
    assert message.count("already") == 1 and not (root / "report" / "executed").exists()


def test_a_missing_profile_names_those_there_are(toy, capsys):
    toy("01_one:", name="quick")
    assert build.main(["--profile", "ful"], toy("01_one:")) == 1
    assert "There is no profile 'ful'. There are: quick, smoke." in capsys.readouterr().err


def test_values_arrive_as_their_declared_types(toy):
    root = toy("01_one: {n_seeds: 3, lr: 1e-3, rates: [1, 1e-2, 0.5], arm: sgsc, shuffle: no}\n")
    plan = build.read_profile(build.Place("smoke", root))["01_one"]
    assert plan == {
        "n_seeds": 3, "lr": 0.001, "rates": [1.0, 0.01, 0.5], "arm": "sgsc", "shuffle": False,
        "results": "report/results/smoke",
    }  # fmt: skip
    assert type(plan["rates"][0]) is float


def test_bounds_that_a_notebook_sets_are_checked_before_any_runs_and_a_key_twice_is_refused(toy, capsys):
    check = code("check_parameters(globals(), n_seeds=3, arm=0)")
    root = toy("01_one: {n_seeds: 2, lr: -0.1, arm: ''}")
    write_notebook(root / "notebooks" / "01_one.ipynb", "# One", PARAMETERS, check)
    assert build.main(["--profile", "smoke"], root) == 1
    error = capsys.readouterr().err
    assert "`n_seeds` should be ≥ 3. Found 2." in error and "`lr` should be ≥ 0. Found -0.1." in error
    assert "`arm`" not in error and not (root / "report" / "executed").exists()
    assert build.main(["--profile", "smoke"], toy("01_one: {n_seeds: 3, lr: 0.1, n_seeds: 4}")) == 1
    assert "n_seeds twice" in capsys.readouterr().err


def test_a_copied_profile_reads_its_own_results_and_not_the_first_ones(toy):
    for name in ("smoke", "mine"):
        root = toy("01_one: {arm: '{results}/tuned.csv'}", name)
        plan = build.read_profile(build.Place(name, root))["01_one"]
        assert plan == {"arm": f"report/results/{name}/tuned.csv", "results": f"report/results/{name}"}


def test_list_and_help(toy, capsys):
    toy("01_one: {n_seeds: 9}", name="full")
    assert build.main(["--list"], toy("01_one: {n_seeds: 2}")) == 0
    listed = capsys.readouterr().out
    assert "profiles: full, smoke" in listed
    assert "n_seeds: int = 1  # how many\n        full: 9\n        smoke: 2\n" in listed
    with pytest.raises(SystemExit, match="0"):
        build.main(["--help"])
    assert "--profile smoke" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# A whole build
# ---------------------------------------------------------------------------------------------------------------------

FIRST = (
    "# First\n\n[Figure](#fig-a), [Table](#tbl-t), [Equation](#eq-1.1), [](#fig-b), [the second](#nb-02_second).",
    code('results: str = "."\nnote: str = ""\n', tags=("parameters",)),
    "## Same name\n\n$$ a < b \\tag{1.1} $$\n\nInline $\\frac{1}{2}$ costs \\$5.",
    code(
        "# draw\n"
        "import sys\n"
        "from pathlib import Path\n"
        "from IPython.display import HTML, Markdown, display\n"
        "print('on stdout & <kept>')\n"
        "print('on stderr', file=sys.stderr)\n"
        f"display(HTML({FIGURE!r}))\n"
        f"display(HTML({TABLE!r}))\n"
        "display(HTML('<b>foreign</b>'))\n"
        "display(Markdown('The mean is **$0.5$**.'))\n"
        "Path(results).mkdir(parents=True, exist_ok=True)\n"
        "(Path(results) / 'raw.csv').write_text('name,value\\n\"a, <b> & 100 %\",0.1\\n')\n"
        "(Path(results) / 'interpreter.json').write_text(f'\"{sys.executable}\"')\n"
        "None"
    ),
)
SECOND = (
    "# Second",
    code("n: int = 1", tags=("parameters",)),
    "## Same name\n\nAs in [Figure](#fig-a).",
    code(f"from IPython.display import HTML, display\ndisplay(HTML({FIGURE.replace('fig-a', 'fig-b')!r}))"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with two notebooks, built; its page, parsed. A decoy kernel named python3 lies in wait."""
    root = tmp_path_factory.mktemp("repository")
    write_notebook(root / "notebooks" / "01_first.ipynb", *FIRST)
    write_notebook(root / "notebooks" / "02_second.ipynb", *SECOND)
    (root / "report" / "profiles").mkdir(parents=True)
    (root / "report" / "profiles" / "smoke.yaml").write_text("01_first: {note: </code><script>}\n02_second:\n")
    decoy = root / "kernels" / "python3" / "kernel.json"
    decoy.parent.mkdir(parents=True)
    decoy.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "decoy", "language": "python"}))
    (root / "report" / "results" / "smoke").mkdir(parents=True)
    stale = root / "report" / "results" / "smoke" / "stale.csv"
    stale.write_text("old")
    os.utime(stale, (1e9, 1e9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root))
        assert build.main(["--profile", "smoke"], root) == 0
    return root, BeautifulSoup((root / "report" / "sgsc-smoke.html").read_text(), "html.parser")


def test_figures_tables_and_equations_are_numbered_in_page_order_and_linked(made):
    _, soup = made
    texts = {a["href"]: a.get_text() for a in soup.select("#\\30 1_first-1 a")}  # the first cell
    assert texts["#fig-a"] == "Figure\u00a01" and texts["#fig-b"] == "Figure\u00a02"
    assert texts["#tbl-t"] == "Table\u00a01" and texts["#eq-1.1"] == "Equation\u00a01.1"
    assert texts["#nb-02_second"] == "the second"
    assert [f.get_text() for f in soup.find_all("figcaption")] == [
        "Figure\u00a01. One.", "Table\u00a01. Two.", "Figure\u00a02. One.",
    ]  # fmt: skip
    assert soup.find(id="eq-1.1").get_text().endswith("(1.1)")


def test_ids_are_unique_and_every_anchor_resolves(made):
    _, soup = made
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in soup.select('a[href^="#"]')} <= set(ids)
    assert {"01_first-same-name", "02_second-same-name", "nb-01_first", "nb-02_second"} <= set(ids)


def test_the_reader_sees_what_was_meant_for_the_page_and_nothing_else(made):
    _, soup = made
    outputs = [output.get_text() for output in soup.select("pre.output")]
    assert outputs == ["on stdout & <kept>\n", "<IPython.core.display.HTML object>"]  # the foreign HTML as plain text
    assert not soup.find("b", string="foreign")
    assert soup.select("p strong math")
    text = soup.main.get_text()
    assert "\\frac" not in text and "$$" not in text and "costs $5" in text
    assert "This is the smoke profile" in text


def test_parameters_cannot_put_markup_on_the_page(made):
    _, soup = made
    assert len(soup.find_all("script")) == 1
    assert "note = </code><script>" in soup.find(id="made").get_text()


def test_code_is_folded_under_what_it_does(made):
    _, soup = made
    summaries = [s.get_text() for s in soup.select("details.code summary")]
    first, second = "Show the code of Figure\u00a01 and Table\u00a01: draw", "Show the code of Figure\u00a02"
    assert summaries == ["Show the parameters", first, "Show the parameters", second]
    shown = soup.find(id="01_first-2").pre.get_text()
    assert 'note: str = ""' in shown and 'note = "</code><script>"' in shown  # the default, and the value in this run


def test_raw_results_are_downloads_of_the_same_bytes(made, capsys):
    root, soup = made
    links = {a["download"]: a["href"] for a in soup.select("a[download]")}
    assert list(links) == ["interpreter.json", "raw.csv", "manifest.json"]  # and no stale.csv
    mime, _, body = links["raw.csv"].partition(",")
    assert mime == "data:text/csv;charset=utf-8"
    assert unquote(body) == (root / "report/results/smoke/raw.csv").read_text()


def test_the_kernel_is_this_interpreter(made):
    root, _ = made
    assert json.loads((root / "report/results/smoke/interpreter.json").read_text()) == sys.executable


def test_the_manifest_says_what_was_run(made):
    root, _ = made
    manifest = json.loads((root / "report/results/smoke/manifest.json").read_text())
    assert manifest["profile"] == "smoke" and manifest["packages"]["torch"] and manifest["machine"]["cores"] > 0
    assert manifest["library_sha256"] == build.sha256(ROOT / "sgsc_lib.py")
    assert manifest["results"]["raw.csv"] == build.sha256(root / "report/results/smoke/raw.csv")
    run = manifest["notebooks"]["01_first"]
    assert run["parameters"] == {"note": "</code><script>", "results": "report/results/smoke"}
    assert run["sha256"] == build.sha256(root / "notebooks" / "01_first.ipynb") and run["seconds"] > 0


def test_rendering_twice_gives_the_same_page(made):
    root, _ = made
    place = build.Place("smoke", root)
    executed = {stem: place.executed(stem) for stem in ("01_first", "02_second")}
    manifest, results = build.read_manifest(place.results), build.raw_results(place.results)
    pages = {page.render(executed, manifest, results) for _ in range(2)}
    assert len(pages) == 1


def test_an_executed_notebook_that_was_left_half_done_or_altered_never_becomes_the_page(made, capsys, monkeypatch):
    root, _ = made
    place, run_it = build.Place("smoke", root), build.papermill.execute_notebook
    before, executed = place.page.read_bytes(), place.executed("01_first").read_bytes()

    def interrupted(*args, **kwargs):
        run_it(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(build.papermill, "execute_notebook", interrupted)
    assert build.main(["--profile", "smoke", "--only", "01"], root) == 130
    monkeypatch.undo()
    assert place.page.read_bytes() == before and place.executed("01_first").read_bytes() == executed
    place.executed("01_first").write_bytes(executed.replace(b'"cell_type": "code"', b'"cell_type": "raw"', 1))
    assert build.main(["--profile", "smoke", "--only", "02"], root) == 1
    error = capsys.readouterr().err
    assert f"{place.executed('01_first')} is not what manifest.json says" in error and "--only 01_first" in error
    assert place.page.read_bytes() == before
    place.executed("01_first").write_bytes(executed)
    assert build.main(["--profile", "smoke", "--only", "02"], root) == 0


def test_a_notebook_edited_while_it_runs_is_out_of_date(made, capsys):
    root, _ = made
    place = build.Place("smoke", root)
    source, run_it = place.notebook("02_second").read_text(), build.run_notebook
    with pytest.MonkeyPatch.context() as patch:

        def edited(*args):
            run_it(*args)
            place.notebook("02_second").write_text(source.replace("# Second", "# Second, edited"))

        patch.setattr(build, "run_notebook", edited)
        assert build.main(["--profile", "smoke", "--only", "02"], root) == 0
    assert "No page yet: 02_second has to run" in capsys.readouterr().out
    place.notebook("02_second").write_text(source)
    assert build.main(["--profile", "smoke", "--only", "02"], root) == 0


def test_only_runs_one_notebook_and_never_mixes_runs(made, capsys):
    root, _ = made
    place = build.Place("smoke", root)
    assert build.main(["--profile", "smoke", "--only", "02"], root) == 0
    out = capsys.readouterr().out
    assert "[1/1] 02_second" in out and "01_first" not in out and f"{place.page}: " in out
    before = place.page.read_bytes()
    first = place.notebook("01_first")
    source = first.read_text()
    first.write_text(source.replace("# First", "# First, changed"))
    assert build.main(["--profile", "smoke", "--only", "02"], root) == 0
    assert "No page yet: 01_first has to run" in capsys.readouterr().out
    assert place.page.read_bytes() == before
    first.write_text(source)
    assert build.main(["--profile", "smoke", "--only", "0"], root) == 1
    assert (
        "--only should be the start of one notebook's name: 01_first, 02_second. Found '0', which fits 2."
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------------------------------------------------------------
# Failures: the previous page stays
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "01_bad, cell 4: ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", "01_bad, cell 4: the kernel died"),
    ],
)
def test_a_failing_cell_is_named_and_leaves_the_page_as_it_was(toy, capsys, source, message):
    root = toy("01_bad: {n: 2}")
    parameters = code("n: int = 1", tags=("parameters",))
    write_notebook(root / "notebooks" / "01_bad.ipynb", "# Bad", parameters, code("x = 1"), code(source), code("y = 1"))
    old = root / "report" / "sgsc-smoke.html"
    old.write_text("the previous page")
    assert build.main(["--profile", "smoke"], root) == 1
    assert message in capsys.readouterr().err
    assert old.read_text() == "the previous page"
    assert [path.name for path in old.parent.glob("sgsc*")] == [old.name]


def test_an_interrupt_ends_the_kernel_and_leaves_the_page_as_it_was(toy):
    root = toy("01_slow:")
    wait = "import os, time\nprint('kernel', os.getpid(), flush=True)\ntime.sleep(60)"
    write_notebook(root / "notebooks" / "01_slow.ipynb", "# Slow", PARAMETERS, code(wait))
    script = (
        "import pathlib, signal, sys; sys.path.insert(0, sys.argv[2]); import build; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(build.main(['--profile', 'smoke'], pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(root), str(ROOT / "report")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        kernel = next(int(line.split()[1]) for line in process.stdout if line.startswith("kernel"))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (
        process.returncode == 130
        and "interrupted. The previous page is left as it was; of the results beside it some may be missing or new."
        in error
    )
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{kernel}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{kernel}")
    assert not list((root / "report").glob("sgsc*"))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (code("", {"text/html": FIGURE.replace("A dot.", " ")}), "should have alternative text and be embedded"),
        (code("", {"text/html": FIGURE.replace('alt="A dot." ', "")}), "should have alternative text and be embedded"),
        (code("", {"image/png": "iVBORw0KGgo="}), "an image without alternative text. Show it with sgsc_lib.figure."),
        (code("", {"text/html": "<img>", "image/svg+xml": "<svg/>"}), "an image without alternative text"),
        (code("", {"text/html": FIGURE}, {"text/html": FIGURE}), "the page has two of each of these: fig-a. Rename"),
        ("![a plot](plot.png)", "should have alternative text and be embedded"),
        (r"Let $\foobar{x}$ be", r"pandoc does not understand the formula $\foobar{x}$"),
        ("$$ \\nope \\tag{3} $$", r"pandoc does not understand the formula"),
        (code("", {"text/markdown": r"is $\nope{1}$"}), r"pandoc does not understand the formula $\nope{1}$"),
        ("See [Figure](#fig-missing).", "nothing on the page has the label fig-missing"),
        ("See [Equation](#eq-9.9).", "nothing on the page has the label eq-9.9"),
    ],
)
def test_what_cannot_go_on_the_page_is_refused_by_name(made, tmp_path, cell, message):
    root, _ = made
    manifest = build.read_manifest(root / "report/results/smoke")
    executed = {"01_one": write_notebook(tmp_path / "01_one.ipynb", "# One", cell)}
    with pytest.raises(page.BuildError, match=f"^01_one, cell 2: .*{re.escape(message)}"):
        page.render(executed, manifest, [])


def test_an_error_output_is_refused(made, tmp_path):
    manifest = build.read_manifest(made[0] / "report/results/smoke")
    cell = code("boom()")
    cell.outputs = [nbformat.v4.new_output("error", ename="NameError", evalue="boom", traceback=[])]
    executed = {"01_one": write_notebook(tmp_path / "01_one.ipynb", "# One", cell)}
    with pytest.raises(page.BuildError, match="01_one, cell 2: NameError: boom"):
        page.render(executed, manifest, [])


def test_a_page_over_the_limit_names_its_biggest_parts(made, tmp_path, monkeypatch):
    manifest = build.read_manifest(made[0] / "report/results/smoke")
    monkeypatch.setattr(page, "SIZE_LIMIT", 100_000)
    (tmp_path / "big.csv").write_text("0" * 100_000)
    executed = {"01_one": write_notebook(tmp_path / "01_one.ipynb", "# One", code("", {"text/html": FIGURE}))}
    with pytest.raises(page.BuildError, match=r"should be under 0.1 MB. Found 0.\d+ MB, with big.csv 0.10 MB, fig-a"):
        page.render(executed, manifest, [tmp_path / "big.csv"])


# ---------------------------------------------------------------------------------------------------------------------
# make verify
# ---------------------------------------------------------------------------------------------------------------------


def test_verify_trains_the_results_again_and_notices_a_number_that_nothing_trained(smoke_page, tmp_path, capsys):
    for folder in ("notebooks", "report/profiles", "report/results/smoke"):
        shutil.copytree(smoke_page.parents[1] / folder, tmp_path / folder)
    results = tmp_path / "report" / "results" / "smoke"
    assert verify.main(["--profile", "smoke"], tmp_path) == 0
    said = capsys.readouterr().out
    assert "are what manifest.json says." in said and "equal to the last bit." in said and "Reproduced, in" in said
    assert "another" not in said and "otherwise" not in said  # neither version nor arithmetic
    for name, column, maker in (
        ("evaluation.csv", "final_test_accuracy", "03_evaluation"),
        ("factorial_curves.csv", "train_loss_mean", "04_gamma_and_smoothness"),
    ):
        whole, manifest = (results / name).read_bytes(), (results / "manifest.json").read_text()
        table = pd.read_csv(results / name)
        table.loc[0, column] += 0.2
        table.to_csv(results / name, index=False)
        assert verify.main(["--profile", "smoke"], tmp_path) == 1
        assert f"{name} is not what manifest.json says" in capsys.readouterr().err
        forged = json.loads(manifest)
        forged["results"][name] = forged["notebooks"][maker]["results"][name] = build.sha256(results / name)
        forged["machine"] |= {"cpu": "Z80", "arithmetic": "8 bits"}
        (results / "manifest.json").write_text(json.dumps(forged))
        assert verify.main(["--profile", "smoke"], tmp_path) == 1
        said = capsys.readouterr().out
        assert said.count("NOT REPRODUCED") == 1 and "Not reproduced, in" in said
        assert "made with another arithmetic: cpu Z80 (here " in said
        (results / name).write_bytes(whole)
        (results / "manifest.json").write_text(manifest)
    shutil.rmtree(results)
    assert verify.main(["--profile", "smoke"], tmp_path) == 1
    error = capsys.readouterr().err
    assert "python report/build.py --profile smoke" in error and "git restore" not in error
    committed = results.with_name("full")
    committed.mkdir()
    (committed / "manifest.json").write_text(json.dumps({"notebooks": {}, "results": {"evaluation.csv": "0"}}))
    assert verify.main(["--profile", "full"], tmp_path) == 1
    assert "`git restore report README.md` brings back what is committed." in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The figure style
# ---------------------------------------------------------------------------------------------------------------------


def test_the_style_gives_the_same_bytes_twice():
    import io

    import matplotlib
    import matplotlib.pyplot as plt

    def draw():
        with matplotlib.style.context(ROOT / "report" / "sgsc.mplstyle"):
            figure, axes = plt.subplots()
            axes.plot([0, 1], label="γ")
            axes.legend()
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            plt.close(figure)
        return buffer.getvalue()

    assert draw() == draw()
