"""What a build survives: being killed, a second build, a full disk, damaged files, bad parameters, lost workers.

`make test` runs a short set, `make test-faults` the long one (marker `faults`). Everything happens in copies of the
repository with caches of their own. Each test prints what it counted: `make test-faults` shows it, and `pytest -s`.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import build
import nbformat
import numpy as np
import optuna
import pytest
import yaml
from conftest import ROOT, code, write_notebook
from distributed import Client

import sgsc_lib
from sgsc_lib import Run, load_mnist1d, train

BIN = Path(sys.executable).parent
MARK = "SGSC_FAULT_TEST"  # an environment variable by which a test finds the processes that it set off


# ---------------------------------------------------------------------------------------------------------------------
# Copies of the repository, and builds in them
# ---------------------------------------------------------------------------------------------------------------------

TRAINING = (
    "# Train",
    code('results: str = "report/results/toy"\nn_runs: int = 6\n', tags=("parameters",)),
    code(
        "from sgsc_lib import CACHE, Run, load_mnist1d, results_folder, train, write_table\n"
        "folder, data = results_folder(results), load_mnist1d()\n"
        "for k in range(4):\n"
        "    runs = [Run(10 * k + s, 0.01, 0.25) for s in range(n_runs)]\n"
        "    curves = train(runs, data, epochs=3, stack_size=2, n_jobs=1, cache=CACHE)\n"
        "    write_table(curves.frame(), folder / f'runs-{k}.csv')"
    ),
)
READING = (
    "# Read",
    code('results: str = "report/results/toy"\nruns: str = "report/results/toy/runs-0.csv"\n', tags=("parameters",)),
    code(
        "from sgsc_lib import read_table, results_folder, write_table\n"
        "means = read_table(runs, made_by='01_train').groupby('epoch')['train_loss'].mean().reset_index()\n"
        "write_table(means, results_folder(results) / 'means.csv')"
    ),
)


def copy_repository(to: Path, *, toy: bool = False) -> Path:
    """Copy all that a build needs; `toy` puts two small notebooks that train and read in place of the study's."""
    ignored = shutil.ignore_patterns("results", "executed", "sgsc*.html", "__pycache__")
    shutil.copytree(ROOT / "report", to / "report", ignore=ignored, dirs_exist_ok=True)
    shutil.copy(ROOT / "sgsc_lib.py", to)
    if toy:
        write_notebook(to / "notebooks" / "01_train.ipynb", *TRAINING)
        write_notebook(to / "notebooks" / "02_read.ipynb", *READING)
        shutil.rmtree(to / "report" / "profiles")
        (to / "report" / "profiles").mkdir()
        (to / "report" / "profiles" / "toy.yaml").write_text("01_train:\n02_read:\n")
    else:
        shutil.copytree(ROOT / "notebooks", to / "notebooks", ignore=shutil.ignore_patterns(".*"))
    return to


def environment(root: Path, **extra: str) -> dict[str, str]:
    own = {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
        MARK: str(root),
    }
    return {name: value for name, value in os.environ.items() if name != "SGSC_CACHE"} | own | extra


def start_build(root: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, root / "report" / "build.py", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=root, env=environment(root), **pipes)


def run_build(root: Path, *options: str) -> tuple[int, str]:
    process = start_build(root, *options)
    output, _ = process.communicate()
    return process.returncode, output


def csvs(root: Path, profile: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "report" / "results" / profile).glob("*.csv")}


def processes_of(root: Path) -> list[int]:
    """The living processes that a build in `root` set off, itself included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={root}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A copy of the repository with the toy notebooks, built once and left alone: (root, its CSVs, seconds it took)."""
    root = copy_repository(tmp_path_factory.mktemp("toy"), toy=True)
    start = time.monotonic()
    exit_code, output = run_build(root, "--profile", "toy")
    assert exit_code == 0, output
    assert set(csvs(root, "toy")) == {"means.csv", *(f"runs-{k}.csv" for k in range(4))}
    return root, csvs(root, "toy"), time.monotonic() - start


# ---------------------------------------------------------------------------------------------------------------------
# Killed at any moment
# ---------------------------------------------------------------------------------------------------------------------


def kill_and_complete(root: Path, profile: str, expected: dict[str, bytes], length: float, kills: int) -> None:
    """Kill a build at a random moment and complete the next one, again and again; every second starts without a cache.

    A kill hits build.py alone, as a user's kill does, or all its processes at once, as a power cut does.
    """
    moments, page = random.Random(0), root / "report" / f"sgsc-{profile}.html"
    page.write_text("the previous page")
    for k in range(kills):
        before, moment = page.read_bytes(), moments.uniform(0, 0.95 * length)
        while True:
            if k % 2 == 0:
                shutil.rmtree(root / ".cache", ignore_errors=True)
                shutil.rmtree(root / "report" / "results", ignore_errors=True)
            process = start_build(root, "--profile", profile)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=moment)
            for pid in processes_of(root) if k % 4 > 1 else [process.pid] * (process.poll() is None):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
            if page.read_bytes() == before:
                assert process.returncode == -signal.SIGKILL
                break
            # The build had come to its end, as the machine is quicker now: its page is whole. Again, and earlier.
            assert page.read_text().rstrip().endswith("</html>")
            moment /= 2
            page.write_bytes(before)
        start = time.monotonic()
        exit_code, output = run_build(root, "--profile", profile)
        assert exit_code == 0, f"after a kill at {moment:.1f} s:\n{output[-4000:]}"
        assert csvs(root, profile) == expected
        assert not list((root / "report" / "results" / profile).glob(".*.part"))
        took = time.monotonic() - start
        print(f"kill {k + 1}/{kills} at {moment:.1f} s survived; the next build took {took:.1f} s", flush=True)
        length = took if k % 2 == 0 else length  # the next one reads from this one's cache
    assert wait_for(lambda: not processes_of(root), 30), "a killed build left processes behind"


def test_a_killed_build_is_completed_by_the_next_one_byte_for_byte(toy, tmp_path):
    _, expected, length = toy
    kill_and_complete(copy_repository(tmp_path, toy=True), "toy", expected, length, kills=2)


@pytest.mark.faults
def test_twenty_killed_smoke_builds_are_completed_byte_for_byte(tmp_path):
    start = time.monotonic()
    undisturbed = copy_repository(tmp_path / "undisturbed")
    exit_code, output = run_build(undisturbed, "--profile", "smoke")
    assert exit_code == 0, output
    expected, length = csvs(undisturbed, "smoke"), time.monotonic() - start
    kill_and_complete(copy_repository(tmp_path / "killed"), "smoke", expected, length, kills=20)


def test_a_build_from_the_cache_gives_the_same_bytes_and_still_says_what_training_took(toy, tmp_path):
    root, manifest = shutil.copytree(toy[0], tmp_path / "copy"), "report/results/toy/manifest.json"
    exit_code, output = run_build(root, "--profile", "toy")
    assert exit_code == 0 and csvs(root, "toy") == toy[1], output
    first, again = (json.loads((folder / manifest).read_text())["notebooks"]["01_train"] for folder in (toy[0], root))
    assert (first["stacks_trained"], again["stacks_trained"]) == (12, 0)
    assert again["training"] == first["training"]
    assert first["training"].items() >= {"stacks": 12, "seconds": first["seconds"]}.items()
    assert " cores (" in first["training"]["machine"]
    assert "1/2] 01_train: 0 s so far, about " in output and "left, less for what the cache holds" in output


def test_a_second_build_ends_at_once_and_a_terminated_one_leaves_the_page(tmp_path):
    root = copy_repository(tmp_path, toy=True)
    wait = "import time\nprint('waiting', flush=True)\ntime.sleep(120)"
    write_notebook(root / "notebooks" / "01_train.ipynb", "# Wait", TRAINING[1], code(wait))
    page = root / "report" / "sgsc-toy.html"
    page.write_text("the previous page")
    first = start_build(root, "--profile", "toy")
    assert any(line.startswith("waiting") for line in first.stdout)
    exit_code, output = run_build(root, "--profile", "toy")
    assert exit_code == 1 and f"another build of toy is running: process {first.pid}, started 20" in output
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert (
        first.returncode == 130
        and "interrupted. The previous page is left as it was; of the results beside it some may be missing or new."
        in output
    )
    assert wait_for(lambda: not processes_of(root), 30)
    assert page.read_text() == "the previous page"
    write_notebook(root / "notebooks" / "01_train.ipynb", *TRAINING)
    exit_code, output = run_build(root, "--profile", "toy")
    assert exit_code == 0, output  # the lock went with its holder


# ---------------------------------------------------------------------------------------------------------------------
# A full disk, a folder that cannot be written
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, megabytes: int):
    """A disk of its own for `folder`. Root may write anywhere, so only a mount can refuse it."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("NOT TESTED: a full and a read-only disk, because this user may not mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fill the disk of `folder` but for `leave` bytes; returns the file that does."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        left = shutil.disk_usage(folder).free - leave
        file.write(bytes(max(left, 0)))
    return filler


def full_disks(toy, root: Path, leaves: list[int]) -> None:
    _, expected, _ = toy
    with small_disk(root, 40):
        copy_repository(root, toy=True)
        assert run_build(root, "--profile", "toy")[0] == 0
        page = root / "report" / "sgsc-toy.html"
        before = page.read_bytes()
        for leave in leaves:
            shutil.rmtree(root / ".cache", ignore_errors=True)
            filler = fill(root, leave)
            exit_code, output = run_build(root, "--profile", "toy")
            assert exit_code == 1, f"{leave} bytes left:\n{output}"
            assert "No space left on device" in output and "The previous page is left as it was." in output
            assert "Traceback" not in output.rpartition("build.py: ")[2]
            assert page.read_bytes() == before
            print(f"full disk, {leave} bytes left: {output.rpartition('build.py: ')[2].splitlines()[0]}")
            filler.unlink()
        exit_code, output = run_build(root, "--profile", "toy")
        assert exit_code == 0 and csvs(root, "toy") == expected, output
        before = page.read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        exit_code, output = run_build(root, "--profile", "toy")
        assert exit_code == 1 and "build.py: Read-only file system: " in output and "Traceback" not in output
        assert page.read_bytes() == before


@pytest.mark.faults
def test_a_full_or_read_only_disk_ends_in_a_clear_message(toy, tmp_path):
    full_disks(toy, tmp_path, [0])


@pytest.mark.faults
def test_disks_that_run_full_at_other_moments(toy, tmp_path):
    full_disks(toy, tmp_path, [0, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


def damages(path: Path, flips: int, seed: int = 0):
    """Damage a file in one way after another: emptied, cut anywhere, a bit flipped anywhere; restored after each."""
    whole, at = path.read_bytes(), random.Random(seed)
    parts = [("emptied", b""), *(("cut", whole[: at.randrange(1, len(whole))]) for _ in range(2))]
    for _ in range(flips):
        byte, bit = at.randrange(len(whole)), at.randrange(8)
        parts.append(
            (f"bit {bit} of byte {byte} flipped", whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
        )
    for name, damaged in parts:
        path.write_bytes(damaged)
        yield name
        path.write_bytes(whole)


def test_a_notebook_that_writes_anothers_result_is_refused_and_so_is_the_result(toy, tmp_path, capsys):
    root = shutil.copytree(toy[0], tmp_path / "copy")
    page = (root / "report" / "sgsc-toy.html").read_bytes()
    *first, last = READING
    last = code(last.source.replace("means.csv", "runs-3.csv"))
    write_notebook(root / "notebooks" / "02_read.ipynb", *first, last)
    assert build.main(["--profile", "toy", "--only", "02"], root) == 1
    error = capsys.readouterr().err
    assert "02_read wrote runs-3.csv, which is a result of 01_train." in error and "--only 01_train" in error
    assert build.main(["--profile", "toy", "--only", "02"], root) == 1
    assert "runs-3.csv is not what manifest.json says" in capsys.readouterr().err
    assert (root / "report" / "sgsc-toy.html").read_bytes() == page


def test_damaged_results_are_refused_by_name_with_the_command_that_makes_them_anew(toy, tmp_path, capsys):
    root, noticed = shutil.copytree(toy[0], tmp_path / "copy"), 0
    results = root / "report" / "results" / "toy"
    page = (root / "report" / "sgsc-toy.html").read_bytes()
    for path in sorted(results.glob("runs-*.csv")):
        for how in damages(path, flips=5):
            assert build.main(["--profile", "toy", "--only", "02"], root) == 1
            error = capsys.readouterr().err
            assert f"{path} is not what manifest.json says: truncated, edited or damaged." in error, how
            assert "Make it anew: " in error and "python report/build.py --profile toy --only 01_train" in error
            with pytest.raises(ValueError, match=r"is not what manifest\.json says"):
                sgsc_lib.read_table(path, made_by="01_train")
            noticed += 1
    shutil.copy(results / "runs-1.csv", results / "runs-0.csv")  # whole, but of another version
    assert build.main(["--profile", "toy", "--only", "02"], root) == 1
    assert f"{results / 'runs-0.csv'} is not what" in capsys.readouterr().err
    (results / "runs-0.csv").unlink()
    assert build.main(["--profile", "toy", "--only", "02"], root) == 1
    assert f"{results / 'runs-0.csv'} is missing." in capsys.readouterr().err
    assert (root / "report" / "sgsc-toy.html").read_bytes() == page
    print(f"{noticed + 2} damaged result files noticed")


def test_results_of_other_versions_or_machines_are_not_mixed(toy, tmp_path, capsys):
    root = shutil.copytree(toy[0], tmp_path / "copy")
    path = root / "report" / "results" / "toy" / "manifest.json"
    whole = path.read_text()
    for key, other in ({"python": "3.10.1"}, "Python 3.10.1 (now "), ({"data_sha256": "0"}, "data 0 (now "):
        path.write_text(json.dumps(json.loads(whole) | key))
        assert build.main(["--profile", "toy", "--only", "02"], root) == 1
        error = capsys.readouterr().err
        assert (
            other in error and "--only would mix the two" in error and "python report/build.py --profile toy" in error
        )
    manifest = json.loads(whole)
    manifest["packages"]["torch"], manifest["machine"]["arithmetic"] = "1.0", "8 bits"
    path.write_text(json.dumps(manifest))
    assert build.main(["--profile", "toy", "--only", "02"], root) == 1
    error = capsys.readouterr().err
    assert "torch 1.0 (now " in error and "arithmetic 8 bits (now " in error
    for damaged in ("", whole[: len(whole) // 2], "[]"):
        path.write_text(damaged)
        assert build.main(["--profile", "toy", "--only", "02"], root) == 1
        assert f"{path} is damaged" in capsys.readouterr().err


def test_damaged_cache_entries_are_trained_again(tmp_path):
    data, runs = load_mnist1d(500), [Run(0, 0.01, 0.25), Run(1, 0.01, 0.25)]
    settings = {"epochs": 2, "widths": (40, 8, 10), "probe_size": 4, "n_jobs": 1, "cache": tmp_path}
    expected = train(runs, data, **settings)
    noticed, harmless = 0, 0
    (output,) = (tmp_path / "runs").rglob("output.pkl")
    for how in damages(output, flips=50):
        os.utime(output, (1e9, 1e9))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib warns of what it cannot read
            found = train(runs, data, **settings)
        for name in ("step_loss", "probe_loss", *sgsc_lib.EPOCH_CURVES):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), (how, name)
        again = output.stat().st_mtime != 1e9
        noticed, harmless = noticed + again, harmless + (not again)
    print(f"{noticed} damaged cache entries trained again, {harmless} damaged where nothing is read from")
    assert noticed >= 40


# ---------------------------------------------------------------------------------------------------------------------
# Bad parameters: refused by name, with what was expected and found, before any training
# ---------------------------------------------------------------------------------------------------------------------

BAD = [  # how it is given, notebook, parameters as YAML, what the error says
    ("profile", "01_derivation", "epochs: 1", "`epochs` should be ≥ 2. Found 1."),
    ("profile", "01_derivation", "epoch: 5", "`epoch` is not a parameter of this notebook"),
    ("profile", "01_derivation", "lr: fast", "`lr` should be a finite float. Found 'fast'."),
    ("profile", "02_tuning", "map_widths: 64", "`map_widths` should be a non-empty list[int]. Found 64."),
    ("profile", "02_tuning", "n_trials: 0", "`n_trials` should be ≥ 1. Found 0."),
    ("profile", "03_evaluation", "n_seeds: 2", "`n_seeds` should be ≥ 3. Found 2."),
    ("profile", "03_evaluation", "tuned: ''", "`tuned` should not be empty. Found ''."),
    ("profile", "04_gamma_and_smoothness", "gammas: [0.5]", "`gammas` should contain 0, plain Adam. Found [0.5]."),
    ("-p", "01_derivation", "seed: -1", "`seed` should be ≥ 0. Found -1."),
    ("-p", "01_derivation", "epochs: many", "`epochs` should be an int. Found 'many'."),
    ("-p", "01_derivation", "batch_size: 5000", "`batch_size` should be ≤ 3200. Found 5000."),
    ("-p", "01_derivation", "lr: nan", "`lr` should be a finite float. Found nan."),
    ("-p", "01_derivation", "lr: 0", "`lr` should be > 0. Found 0"),
    ("-p", "02_tuning", "n_trial: 3", "`n_trial` is not a parameter of this notebook"),
    ("-p", "02_tuning", "map_seeds: 1", "`map_seeds` should be ≥ 2. Found 1."),
    ("-p", "02_tuning", "widths: '[40, 10]'", "`widths` should be a non-empty list[int]. Found '[40, 10]'."),
    ("-p", "02_tuning", "storage: here", "`storage` should be empty or a database URL"),
    ("-p", "03_evaluation", "n_seeds: 3.5", "`n_seeds` should be an int. Found 3.5."),
    ("-p", "03_evaluation", "fresh_samples: 9", "`fresh_samples` should be ≥ 10. Found 9."),
    ("-p", "03_evaluation", "tuned: none.csv", "none.csv is not there yet: notebook 02_tuning makes it."),
    ("-p", "03_evaluation", "probe_size: -1", "`probe_size` should be ≥ 0. Found -1."),
    ("-y", "01_derivation", "lr: .inf", "`lr` should be a finite float. Found inf."),
    ("-y", "01_derivation", "lr: -0.1", "`lr` should be ≥ 0. Found -0.1."),
    ("-y", "01_derivation", "seed: [0, 1]", "`seed` should be an int. Found [0, 1]."),
    ("-y", "01_derivation", "seed: true", "`seed` should be an int. Found True."),
    ("-y", "02_tuning", "map_samples: []", "`map_samples` should be a non-empty list[int]. Found []."),
    ("-y", "02_tuning", "map_widths: [64, wide]", "`map_widths` should be an int. Found 'wide'."),
    ("-y", "02_tuning", "map_samples: [5001]", "`map_samples` should be multiples of the 10 classes. Found 5001."),
    ("-y", "02_tuning", "widths: [41, 10]", "`widths` should start with 40"),
    ("-y", "02_tuning", "widths: [40, 9]", "end with at least 10, the number of classes. Found (40, 9)."),
    ("-y", "02_tuning", "map_batches: [0]", "`map_batches` should be ≥ 1. Found 0."),
    ("-y", "03_evaluation", "widths: [40]", "`widths` should name at least an input and an output width. Found (40,)."),
    ("-f", "03_evaluation", "epochs: 3", "`epochs` should be ≥ 4. Found 3."),
    ("-f", "03_evaluation", "n_seeds: null", "`n_seeds` should be an int. Found None."),
    (
        "-f",
        "03_evaluation",
        "fresh_samples: 1005",
        "`fresh_samples` should be a multiple of the 10 classes. Found 1005.",
    ),
    ("-f", "03_evaluation", "arms: [Adam]", "`arms` is not a parameter of this notebook"),
    ("-f", "03_evaluation", "probe_size: 99999", "`probe_size` should be ≤ 3200. Found 99999."),
    ("-f", "04_gamma_and_smoothness", "gammas: [0.0, .nan]", "`gammas` should be a finite float. Found nan."),
    ("-f", "04_gamma_and_smoothness", "gammas: [0.0, -1.0]", "`gammas` should be ≥ 0. Found -1.0."),
    ("-f", "04_gamma_and_smoothness", "epochs: 49", "`epochs` should be that of the runs in"),
    ("-f", "04_gamma_and_smoothness", "widths: [40, 10]", "128-128-10. Found 40-10."),
    ("-y", "05_beyond", "batch_size: 2000", "`batch_size` should be ≤ 1077. Found 2000."),
    (
        "-y",
        "05_beyond",
        "storage: sqlite:////nowhere/at/all.db",
        "`storage` should be the URL of a database that can be",
    ),
    ("profile", "05_beyond", "contest_trials: 0", "`contest_trials` should be ≥ 1. Found 0."),
    ("-f", "04_gamma_and_smoothness", "control_seeds: 500", "`control_seeds` should be ≤ 40. Found 500."),
    ("-p", "05_beyond", "contest_seeds: 1", "`contest_seeds` should be ≥ 2. Found 1."),
    ("-y", "05_beyond", "noise_levels: [0.0, 1.5]", "`label_noise` should be ≤ 1.0. Found 1.5."),
    ("-y", "05_beyond", "batch_sizes: [4000]", "`batch_size` should be ≤ 3200. Found 4000."),
    ("-f", "05_beyond", "cnn_epochs: .nan", "`cnn_epochs` should be an int. Found nan."),
    ("-f", "05_beyond", "scheduler: here", "`scheduler` should be the address of a running Dask scheduler"),
    ("nbclient", "01_derivation", "epochs: '50'", "`epochs` should be an int. Found '50'."),
    ("nbclient", "02_tuning", "epochs: 3", "`epochs` should be ≥ 4. Found 3."),
    ("nbclient", "03_evaluation", "batch_size: 0", "`batch_size` should be ≥ 1. Found 0."),
    ("nbclient", "04_gamma_and_smoothness", "signal_seeds: 1", "`signal_seeds` should be ≥ 2. Found 1."),
]


def give(root: Path, folder: Path, how: str, stem: str, parameters: str) -> str:
    """Run a notebook with parameters in one of the ways there are; returns what it says when it is refused."""
    notebook, given = root / "notebooks" / f"{stem}.ipynb", yaml.safe_load(parameters)
    if how == "profile":
        (root / "report" / "profiles" / f"{folder.name}.yaml").write_text(f"{stem}: {{{parameters}}}\n")
        exit_code, output = run_build(root, "--profile", folder.name)
    elif how == "nbclient":  # as a reader does who edits the parameters' cell
        opened = nbformat.read(notebook, as_version=4)
        (cell,) = (cell for cell in opened.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
        nbformat.write(opened, folder / "edited.ipynb")
        script = (
            "import nbclient, nbformat, sys\nnbclient.execute(nbformat.read(sys.argv[1], 4), kernel_name='python3')"
        )
        command = [sys.executable, "-c", script, folder / "edited.ipynb"]
    else:
        (folder / "given.yaml").write_text(parameters)
        last = {"-f": [folder / "given.yaml"], "-y": [parameters], "-p": itertools.chain(*given.items())}[how]
        command = [
            sys.executable,
            "-m",
            "papermill",
            "-k",
            "python3",
            notebook,
            folder / "out.ipynb",
            how,
            *map(str, last),
        ]
    if how != "profile":
        ran = subprocess.run(command, cwd=folder, env=environment(root), capture_output=True, text=True)
        exit_code, output = ran.returncode, ran.stdout + ran.stderr
    assert exit_code == 1, output
    return output


def refuse(tmp_path: Path, table: list) -> None:
    root = copy_repository(tmp_path / "repository")
    shutil.copytree(ROOT / "report" / "results" / "full", root / "report" / "results" / "full")
    there = sorted((root / "report" / "results" / "full").iterdir())

    def one(k: int) -> str:
        (tmp_path / f"bad-{k}").mkdir()
        return give(root, tmp_path / f"bad-{k}", *table[k][:3])

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(one, range(len(table))))
    wrong = [(row, output[-2000:]) for row, output in zip(table, outputs, strict=True) if row[3] not in output]
    assert not wrong, wrong
    assert not (root / ".cache").exists(), "something was trained"
    assert sorted((root / "report" / "results" / "full").iterdir()) == there
    assert not list((root / "report" / "results").rglob("bad-*/*.csv"))
    print(f"{len(table)} bad parameters refused before any training")


def test_bad_parameters_are_refused_whichever_way_they_come(tmp_path):
    refuse(tmp_path, [next(row for row in BAD if row[0] == how) for how in ("-p", "-y", "-f", "nbclient")])


@pytest.mark.faults
def test_all_bad_parameters_are_refused_before_any_training(tmp_path):
    refuse(tmp_path, BAD)


# ---------------------------------------------------------------------------------------------------------------------
# Past one machine
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def running(*command: str | Path, **options):
    """Processes that end with the block."""
    process = subprocess.Popen([str(part) for part in command], **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_dask_cluster_that_loses_a_worker_gives_the_same_bits(tmp_path):
    data, runs = load_mnist1d(), [Run(seed, 0.01, 0.25) for seed in range(24)]
    settings = {"epochs": 3, "stack_size": 1, "probe_size": 4, "widths": (40, 32, 10)}
    expected = train(runs, data, **settings)
    address, cache = tmp_path / "scheduler.json", tmp_path / "cache"
    quiet = {"cwd": tmp_path, "env": environment(ROOT), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    loopback = ["--host", "127.0.0.1", "--scheduler-file", address, "--no-dashboard"]
    own = ["--nthreads", "1", "--no-nanny", "--local-directory", tmp_path]
    with (
        running(BIN / "dask", "scheduler", "--port", "0", *loopback, **quiet),
        running(BIN / "dask", "worker", *loopback, *own, **quiet) as lost,
        running(BIN / "dask", "worker", *loopback, *own, **quiet),
        Client(scheduler_file=str(address)) as client,
    ):
        client.wait_for_workers(2, timeout=120)
        done_at_loss = []

        def lose() -> None:
            def done() -> int:
                return len(list(cache.rglob("output.pkl")))

            if wait_for(lambda: done() >= 3, 120):
                lost.send_signal(signal.SIGKILL)
                done_at_loss.append(done())

        thread = threading.Thread(target=lose)
        thread.start()
        scheduler = json.loads(address.read_text())["address"]
        found = train(runs, data, scheduler=scheduler, cache=cache, **settings)
        thread.join()
        workers = len(client.scheduler_info()["workers"])
    assert done_at_loss and 3 <= done_at_loss[0] < 24 and workers == 1
    for name in ("step_loss", "probe_loss", *sgsc_lib.EPOCH_CURVES):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    print(f"a worker killed after {done_at_loss[0]} of 24 stacks: the rest came from the other one, bit for bit")


@pytest.fixture
def postgres():
    """A PostgreSQL server of its own, on a socket in a temporary folder; the URL of its database."""
    places = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    if not (initdb := next((Path(place) for place in places if place), None)):
        pytest.fail("This test needs PostgreSQL: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it does not run as root
    if as_user:
        shutil.chown(folder, "postgres")

    def run(tool: str, *arguments: str) -> None:
        command = [*as_user, initdb.resolve().parent / tool, *arguments]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "sgsc", "--no-sync")
    only_socket = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", "-o", only_socket, "start")
    try:
        yield f"postgresql+psycopg://sgsc@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


TUNING = """
import sys
import time
from pathlib import Path
from optuna.distributions import FloatDistribution
from sgsc_lib import load_mnist1d, tune
arms = {"Adam": {"lr": FloatDistribution(1e-4, 1.0, log=True), "gamma": 0.0}}
own, *others = map(Path, sys.argv[2:3] + sys.argv[4:])
own.mkdir()
while not all(folder.exists() for folder in others):  # all start at once, or the first would leave nothing
    time.sleep(0.05)
table = tune(arms, load_mnist1d(), study="shared", n_trials=24, ask_batch=2, storage=sys.argv[1], cache=sys.argv[2],
             progress="shared", epochs=2, widths=(40, 8, 10), n_jobs=1)
table.to_csv(sys.argv[3], index=False)
"""


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["none", "one of three"])
def test_processes_on_one_database_share_a_study_and_lose_no_trial(postgres, tmp_path, killed):
    names = ["one", "two", "three"] if killed else ["one", "two"]
    options = {"env": environment(ROOT), "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                TUNING,
                postgres,
                tmp_path / n,
                tmp_path / f"{n}.csv",
                *(tmp_path / m for m in names),
            ],
            **options,
        )
        for n in names
    ]
    if killed:
        assert "shared" in processes[-1].stderr.readline()  # it has told its first trials
        processes.pop().kill()
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        assert "trials left" in error, "this process trained nothing"
    (study,) = optuna.get_all_study_names(postgres)
    trials = optuna.load_study(study_name=study, storage=postgres).get_trials(deepcopy=False)
    states = [trial.state.name for trial in trials]
    assert states.count("COMPLETE") == 24 and "RUNNING" not in states
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert len((tmp_path / "one.csv").read_text().splitlines()) == 25
    print(f"{len(names)} processes, {states.count('COMPLETE')} trials, {states.count('FAIL')} given up")
