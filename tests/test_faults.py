"""What a build survives: being killed, a second build, a full disk, damaged files, bad parameters, lost workers.

`make test` runs a short set, `make test-faults` the long one (marker `faults`). Everything happens in copies of the
repository with caches of their own. Each test prints what it counted; `pytest -s` or `-rP` shows it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import build
import numpy as np
import pytest
from conftest import ROOT, code, write_notebook

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
        if k % 2 == 0:
            shutil.rmtree(root / ".cache", ignore_errors=True)
            shutil.rmtree(root / "report" / "results", ignore_errors=True)
        before, moment = page.read_bytes(), moments.uniform(0, 0.95 * length)
        process = start_build(root, "--profile", profile)
        with pytest.raises(subprocess.TimeoutExpired):  # else the build was over, and nothing was killed
            process.communicate(timeout=moment)
        for pid in processes_of(root) if k % 4 > 1 else [process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert page.read_bytes() == before
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


def test_a_second_build_ends_at_once_and_a_terminated_one_leaves_the_page(tmp_path):
    root = copy_repository(tmp_path, toy=True)
    wait = "import time\nprint('waiting', flush=True)\ntime.sleep(120)"
    write_notebook(root / "notebooks" / "01_train.ipynb", "# Wait", code(wait))
    page = root / "report" / "sgsc-toy.html"
    page.write_text("the previous page")
    first = start_build(root, "--profile", "toy")
    assert any(line.startswith("waiting") for line in first.stdout)
    exit_code, output = run_build(root, "--profile", "toy")
    assert exit_code == 1 and f"another build of toy is running: process {first.pid}, started 20" in output
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "interrupted. The previous page is left as it was." in output
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


def test_a_full_or_read_only_disk_ends_in_a_clear_message(toy, tmp_path):
    full_disks(toy, tmp_path, [0])


@pytest.mark.faults
def test_disks_that_run_full_at_other_moments(toy, tmp_path):
    full_disks(toy, tmp_path, [0, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


def damages(path: Path, flips: int, seed: int = 0):
    """Damage a file in one way after another: emptied, cut at random, one bit flipped at random; restored after each."""
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


def test_damaged_results_are_refused_by_name_with_the_command_that_makes_them_anew(toy, tmp_path, capsys):
    root, noticed = shutil.copytree(toy[0], tmp_path / "copy"), 0
    results = root / "report" / "results" / "toy"
    page = (root / "report" / "sgsc-toy.html").read_bytes()
    for path in sorted(results.glob("runs-*.csv")):
        for how in damages(path, flips=5):
            assert build.main(["--profile", "toy", "--only", "02"], root) == 1
            error = capsys.readouterr().err
            assert f"{path} is not what manifest.json says: truncated, edited or damaged." in error, how
            assert "Make it anew: python report/build.py --profile toy --only 01_train" in error
            with pytest.raises(ValueError, match="is not what manifest.json says"):
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
    manifest["packages"]["torch"], manifest["machine"]["cpu"] = "1.0", "Z80"
    path.write_text(json.dumps(manifest))
    assert build.main(["--profile", "toy", "--only", "02"], root) == 1
    error = capsys.readouterr().err
    assert "torch 1.0 (now " in error and "Z80 (now " in error
    for damaged in ("", whole[: len(whole) // 2], "[]"):
        path.write_text(damaged)
        assert build.main(["--profile", "toy", "--only", "02"], root) == 1
        assert f"{path} is damaged" in capsys.readouterr().err


def test_damaged_cache_entries_are_trained_again(tmp_path):
    data, runs = load_mnist1d(500), [Run(0, 0.01, 0.25), Run(1, 0.01, 0.25)]
    settings = {"epochs": 2, "widths": (40, 8, 10), "probe_size": 4, "n_jobs": 1, "cache": tmp_path}
    expected = train(runs, data, **settings)
    noticed, harmless = 0, 0
    files = [path for path in (tmp_path / "runs").rglob("*") if path.name in ("output.pkl", "metadata.json")]
    assert {path.name for path in files} == {"output.pkl", "metadata.json"}
    for path in files:
        for how in damages(path, flips=150 if path.name == "output.pkl" else 10):
            trained, stack = [], sgsc_lib._train_stack

            def counted(*args, stack=stack, trained=trained, **kwargs):
                trained.append(1)
                return stack(*args, **kwargs)

            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
                warnings.simplefilter("ignore")  # joblib warns of what it cannot read
                patch.setattr(sgsc_lib, "_engine_version", lambda made=sgsc_lib._engine_version(): made)
                patch.setattr(sgsc_lib, "_train_stack", counted)
                found = train(runs, data, **settings)
            for name in ("step_loss", "probe_loss", *sgsc_lib.Curves.EPOCH_CURVES):
                assert np.array_equal(getattr(found, name), getattr(expected, name)), (path.name, how, name)
            noticed, harmless = noticed + bool(trained), harmless + (not trained)
    print(f"{noticed} damaged cache entries trained again, {harmless} damaged where nothing is read from")
    assert noticed >= 100
