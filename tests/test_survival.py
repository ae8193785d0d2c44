"""What a build survives: kills, a second build, a full disk, bad parameters, a lost worker. In copies; slow."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import build
import nbclient
import nbformat
import papermill
import pytest
import yaml
from conftest import MARK, ROOT, code, copy_repository, run_build, start_build, wait_for, write_notebook, write_profile
from distributed import Client, LocalCluster
from plan import Place, read_profile
from study_inputs import assert_same

from sgsc_study import Run, load_mnist1d, train

pytestmark = pytest.mark.slow
TRAINING = code('results: str = "."\nn_runs: int = 6', tags=("parameters",))
TRAIN = """from sgsc_study import CACHE, Run, begin, load_mnist1d, train, write_table
folder, data = begin(globals()), load_mnist1d()
for k in range(4):
    runs = [Run(10 * k + s, 0.01, 0.25) for s in range(n_runs)]
    write_table(train(runs, data, epochs=3, stack_size=2, n_jobs=1, cache=CACHE).frame(), folder / f"runs-{k}.csv")"""
READING = code('results: str = "."\nruns: str = "none.csv"', tags=("parameters",))
READ = """from sgsc_study import begin, read_table, write_table
folder = begin(globals())
write_table(read_table(runs, made_by="01_train").groupby("epoch", as_index=False).mean(True), folder / "means.csv")"""


def training_repository(to: Path, train: str = TRAIN) -> Path:
    """A copy of the repository with two small notebooks that train and read, and the profile `toy`."""
    root = copy_repository(to)
    shutil.rmtree(root / "notebooks")
    write_notebook(root / "notebooks/01_train.ipynb", "# Train", TRAINING, code(train))
    write_notebook(root / "notebooks/02_read.ipynb", "# Read", READING, code(READ))
    write_profile(root, "01_train:\n02_read: {runs: '{results}/runs-0.csv'}\n")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The training repository, built once and left alone, and its tables."""
    root = training_repository(tmp_path_factory.mktemp("trained"))
    return root, run_build(root, "toy")


def processes_of(root: Path) -> list[int]:
    """The living processes that a build in `root` set off, itself included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if f"{MARK}={root}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                found.append(int(entry.name))
    return found


# -- killed, interrupted, started twice --------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "fixture", "copy"), [
    ("toy", "trained", training_repository), ("smoke", "smoke", copy_repository),
])  # fmt: skip
def test_killed_builds_are_completed_by_the_next_byte_for_byte(profile, fixture, copy, request, tmp_path):
    """Builds are killed at random moments, and the next one completes them; every second one starts from nothing.

    The first two kills hit build.py alone, as a user's kill does, the others all its processes at once, as a power cut.
    """
    expected, root = request.getfixturevalue(fixture)[1], copy(tmp_path / "again")
    moments, start = random.Random(0), time.monotonic()
    assert run_build(root, profile) == expected and len(expected) >= 5
    length, page = time.monotonic() - start, root / f"report/sgsc-{profile}.html"
    for k in range(4):
        if k % 2 == 0:
            shutil.rmtree(root / ".cache", ignore_errors=True)
            shutil.rmtree(root / "report/results", ignore_errors=True)
        before, process = page.read_bytes(), start_build(root, profile)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=moments.uniform(0.1, 0.9) * length)
        for pid in processes_of(root) if k >= 2 else [process.pid] * (process.poll() is None):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert page.read_bytes() == before or page.read_text().rstrip().endswith("</html>")
        start = time.monotonic()
        assert run_build(root, profile) == expected, f"after kill {k + 1}"
        length = time.monotonic() - start
        assert not list((root / "report/results" / profile).glob(".*.part"))
    assert wait_for(lambda: not processes_of(root), 30), "a killed build left processes behind"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_build_ends_at_once_and_an_interrupted_one_leaves_page_and_lock(tmp_path, number):
    root = training_repository(tmp_path / "toy", "import time\nprint('waiting')\ntime.sleep(300)")
    page = root / "report/sgsc-toy.html"
    page.write_text("the previous page")
    first = start_build(root, "toy")
    assert any(line.startswith("waiting") for line in first.stdout)
    second = start_build(root, "toy")
    assert f"process {first.pid}" in second.communicate()[0] and second.returncode == 1
    first.send_signal(number)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in output.rpartition("build.py: ")[2]
    assert wait_for(lambda: not processes_of(root), 30) and page.read_text() == "the previous page"
    with build.locked(Place("toy", root)):  # it went with its holder
        pass


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of its own. Root may write anywhere, so only a mount can refuse it."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("NOT TESTED: a full and a read-only disk, because this user may not mount one")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_or_read_only_disk_ends_in_a_clear_message(trained, disk):
    root = shutil.copytree(trained[0], disk / "toy")
    page = root / "report/sgsc-toy.html"

    def fails(name: str) -> None:
        before, process = page.read_bytes(), start_build(root, "toy")
        said = process.communicate()[0].rpartition("build.py: ")[2]
        assert process.returncode == 1 and name in said and "Traceback" not in said and page.read_bytes() == before

    for leave in (0, 8_192, 65_536):
        shutil.rmtree(root / ".cache", ignore_errors=True)
        (root / "filler").write_bytes(bytes(shutil.disk_usage(root).free - leave))
        fails("No space left on device")
        (root / "filler").unlink()
    assert run_build(root, "toy") == trained[1]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    fails("Read-only file system")


# -- bad parameters: refused by name before any training, whichever way they come --------------------------------------

BAD = {  # refused by a profile and by a notebook's first cell; below those that need the data or other results
    "01_derivation": "epochs: 1, epoch: 5, seed: -1, lr: fast, lr: -0.1; batch_size: 5000, lr: 0",
    "02_tuning": """map_seeds: 1, map_samples: [], map_batches: [0], rounds: [1], search_trials: 3, epochs: 3;
        storage: here, storage: sqlite:////no/a.db, widths: [41],
        widths: [40], map_samples: [100] -> `batch_size`, after_gammas: [0.0]""",
    "03_evaluation": """n_seeds: 5, tuned: '', probe_size: 3, fresh_samples: 1005, epochs: 3, batch_size: 0;
        tuned: none.csv -> none, widths: [40], probe_size: 99999""",
    "04_gamma_and_smoothness": """control_rounds: [1], control_seeds: 3, signal_seeds: 3, epochs: 3, seed_shift: -1;
        bank: none.csv -> none, widths: [40]""",
    "05_gate_after_adam": """n_seeds: 3, anatomy_seeds: 1, rounds: [], gammas: fast, batch_size: 1; scheduler: here,
        batch_size: 4000, gammas: [0.0], sgd_rates: [0.0], widths: [40]""",
    "06_where_it_helps": """steps: 0, n_seeds: 3, cnn_epochs: .nan, data_seeds: [-1]; contest: none.csv -> none,
        scheduler: here, batch_sizes: [4000] -> `batch_size`, noise_levels: [1.5] -> `label_noise`, exponents: [0.0]""",
}


def begin(stem: str, given: dict, folder: Path) -> None:
    """Run a notebook's first two cells of code in this process, with parameters as papermill gives them."""
    cells = nbformat.read(ROOT / f"notebooks/{stem}.ipynb", as_version=4).cells
    first, second = [cell.source for cell in cells if cell.cell_type == "code"][:2]
    notebook = {"In": [first, "\n".join(["# Parameters", *(f"{name} = 0" for name in given)])]}
    exec(first, notebook)
    notebook |= {"results": str(folder), **given}
    exec(second, notebook)


@pytest.mark.parametrize("stem", BAD)
def test_bad_parameters_are_refused_by_name_by_profile_and_first_cell(stem, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for rows, by_profile in zip(BAD[stem].split(";"), (True, False), strict=True):
        for row in rows.split(","):
            text, _, named = row.strip().partition(" -> ")
            name = named or f"`{text.partition(':')[0]}`"
            write_profile(tmp_path, f"{stem}: {{{text}}}")
            with pytest.raises(build.BuildError, match=name) if by_profile else nullcontext():
                read_profile(Place("toy", tmp_path))
            with pytest.raises((ValueError, TypeError, FileNotFoundError), match=name):
                begin(stem, yaml.safe_load(text), tmp_path / "results")
    assert not list(tmp_path.rglob("*.csv"))


def test_bad_parameters_are_refused_in_a_kernel_from_papermill_and_from_a_reader_who_edits_their_cell(tmp_path):
    path = ROOT / "notebooks/01_derivation.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="`epochs`"):
        papermill.execute_notebook(path, tmp_path / "out.ipynb", {"epochs": 1}, kernel_name="python3", cwd=tmp_path)
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])).source += "\nepochs = 1"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="`epochs`"):
        nbclient.execute(notebook, cwd=tmp_path)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_dask_cluster_that_loses_a_worker_gives_the_same_bits(tmp_path, n_workers):
    data, runs = load_mnist1d(), [Run(seed, 0.01, 0.25) for seed in range(24)]
    settings = {"epochs": 3, "stack_size": 1, "widths": (40, 32, 10)}
    expected, left = train(runs, data, **settings), []
    own = patch.dict(os.environ)  # Dask sets the numbers of threads for all that this process starts later
    with own, LocalCluster(n_workers, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            first, *_ = client.run(os.getpid).values()

        def lose() -> None:
            if wait_for(lambda: len(list(tmp_path.rglob("output.pkl"))) >= 3, 120):
                os.kill(first, signal.SIGKILL)
                left.append(24 - len(list(tmp_path.rglob("output.pkl"))))

        thread = threading.Thread(target=lose)
        thread.start()
        found = train(runs, data, scheduler=cluster.scheduler_address, cache=tmp_path, **settings)
        thread.join()
    assert left[0] > 0
    assert_same(found, expected)
