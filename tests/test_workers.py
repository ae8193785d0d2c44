"""Processes, a cluster, and the fingerprint of arithmetic."""

import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from distributed import LocalCluster
from study_inputs import FRESH, RUNS, assert_same, shortly

from sgsc_study import GATES, Run, parallel, with_progress
from sgsc_study.workers import arithmetic, by_same_engine, engine_version, on_workers


def settings_of(k: int) -> tuple:
    return k, os.getpid(), torch.get_num_threads(), torch.get_default_dtype()


@pytest.fixture
def odd_settings():
    """A caller with settings of its own, which are as before in the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    yield
    found = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    assert found == (3, torch.float64)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_tasks_come_back_in_order_from_settled_processes(odd_settings, n_jobs):
    found = parallel(settings_of, [(k,) for k in range(7)], n_jobs=n_jobs)
    assert [k for k, *_ in found] == list(range(7))
    assert all(settings == [1, torch.float32] for _, _, *settings in found)
    assert {pid == os.getpid() for _, pid, *_ in found} == {n_jobs == 1}
    assert parallel(settings_of, [], n_jobs=n_jobs) == []


def test_a_mistake_in_a_task_is_raised_and_the_settings_are_restored(odd_settings):
    with pytest.raises(ZeroDivisionError):
        parallel(divmod, [(1, 1), (1, 0)], n_jobs=1)


def power(base: int, exponent: int) -> int:
    with open(os.environ["SGSC_TEST_LOG"], "a") as log:
        log.write("x")
    return base**exponent


def test_results_are_kept_under_their_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("SGSC_TEST_LOG", str(tmp_path / "log"))

    def run(tasks, keys=()):
        found = parallel(power, tasks, n_jobs=1, cache=tmp_path / "cache", keys=keys)
        return found, len((tmp_path / "log").read_text())

    assert run([(2, 3), (3, 2)]) == ([8, 9], 2)
    assert run([(3, 2), (2, 3), (2, 4)]) == ([9, 8, 16], 3)
    assert run([(5, 5)], keys=["a"]) == ([3125], 4)
    assert run([(6, 6)], keys=["a"]) == ([3125], 4)  # the key says all
    with pytest.raises(ValueError):
        run([(2, 3), (3, 2)], keys=["a"])


def test_progress_is_told_in_lines_on_stderr(capfd):
    assert list(with_progress(iter("abc"), 3, None)) == ["a", "b", "c"] and capfd.readouterr() == ("", "")
    assert list(with_progress(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    out, error = capfd.readouterr()
    assert out == "" and "letters" in error and "3/3" in error and error.endswith("\n")


@pytest.mark.parametrize("part", range(3), ids=["code", "torch", "arithmetic"])
def test_a_worker_with_another_engine_is_refused(part):
    version = engine_version()
    assert by_same_engine(version, abs, -1) == 1
    version[part] = "another"
    with pytest.raises(RuntimeError, match="another"):
        by_same_engine(version, abs, -1)


def test_replacing_a_gate_changes_no_engine(monkeypatch):
    before = engine_version(), arithmetic.__wrapped__()
    monkeypatch.setitem(GATES, "sign", lambda total, square, *, batch_size, gamma: square.clamp(max=1.0))
    assert (engine_version(), arithmetic.__wrapped__()) == before
    runs = [Run(seed, 0.01, 0.3) for seed in (0, 1)]
    assert_same(shortly(runs, n_jobs=2, stack_size=1), shortly(runs))
    monkeypatch.undo()
    assert shortly(runs).step_loss[0, -1] != shortly([Run(0, 0.01)]).step_loss[0, -1]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are those of x86-64")
def test_arithmetic_tells_instructions_that_round_otherwise_apart():
    ask = "import torch; from sgsc_study.workers import arithmetic; print(arithmetic(), torch.get_num_threads())"
    own, threads, *others = (
        subprocess.run(
            [sys.executable, "-c", ask], env=os.environ | variables, check=True, capture_output=True, text=True
        ).stdout.split()
        for variables in (
            {},
            {"OMP_NUM_THREADS": "2"},
            {"ATEN_CPU_CAPABILITY": "default"},
            {"MKL_CBWR": "COMPATIBLE"},
            {"ONEDNN_MAX_CPU_ISA": "SSE41"},
            {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"},
        )
    )
    assert own[0] == threads[0] == arithmetic() and threads[1] == "2"
    assert len({own[0], *(fingerprint for fingerprint, _ in others)}) == 5


@pytest.mark.parametrize("address", ["here", pytest.param("tcp://127.0.0.1:1", marks=pytest.mark.slow)])
def test_a_scheduler_that_does_not_answer_is_refused_by_name(address):
    with pytest.raises(ValueError, match="`scheduler`"), on_workers(address, 1, 1):
        pass


@pytest.mark.slow
def test_a_cluster_gives_the_same_bits(tmp_path):
    expected = shortly(RUNS, fresh=FRESH)
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None, host="127.0.0.1") as cluster:
        found = shortly(RUNS, fresh=FRESH, stack_size=1, scheduler=cluster.scheduler_address, cache=tmp_path)
    assert_same(found, expected)
    assert_same(shortly(RUNS, fresh=FRESH, stack_size=1, cache=tmp_path), expected)


WAITING = """
import os, sys
from sgsc_study.workers import end_with
end_with(os.getppid())
print(os.getpid(), flush=True)
sys.stdin.read()
"""
PARENT = f"""
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {WAITING!r}], stdin=-1, stdout=-1)
os.set_inheritable(worker.stdin.fileno(), True)
print(int(worker.stdout.readline()), flush=True)
subprocess.Popen(["sleep", "20"], close_fds=False)  # holds the pipe open: no end of file comes
time.sleep(60)
"""


@pytest.mark.slow
def test_a_worker_ends_with_the_process_it_works_for():
    """Even one that waits for the rest of a task, as after a kill in the middle of handing it over."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    deadline = time.monotonic() + 15
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")
