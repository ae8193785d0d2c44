"""Processes, refused workers, and the fingerprint of arithmetic."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, wait_for
from distributed import KilledWorker

from sgsc_study import GATES, parallel, workers
from sgsc_study.workers import arithmetic, by_same_engine, engine_version, on_workers


def settings_of(k: int, caller: int) -> tuple:
    return k, os.getpid() == caller, torch.get_num_threads(), torch.get_default_dtype()


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_tasks_come_back_in_order_from_one_thread_and_the_caller_keeps_its_settings(n_jobs):
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    found = parallel(settings_of, [(k, os.getpid()) for k in range(7)], n_jobs=n_jobs)
    with pytest.raises(ZeroDivisionError):
        parallel(divmod, [(1, 1), (1, 0)], n_jobs=1)
    assert parallel(settings_of, [], n_jobs=n_jobs) == []
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (3, torch.float64)
    assert found == [(k, n_jobs == 1, 1, torch.float32) for k in range(7)]


def test_a_module_in_the_working_folder_is_not_the_one_that_a_worker_asks_for(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('not the one of Python')")
    ask = "from sgsc_study import parallel; print(parallel(abs, [(-1,), (-2,)], n_jobs=2))"
    run = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    assert subprocess.check_output([sys.executable, "-P", "-c", ask], **run) == "[1, 2]\n"


def negative(value: int) -> int:
    return -value


def test_results_are_kept_under_their_keys(tmp_path):
    kept = partial(parallel, n_jobs=1, cache=tmp_path)
    assert kept(negative, [(8,), (9,)], keys=["a", "b"]) == [-8, -9]
    assert kept(negative, [(0,), (0,), (7,)], keys=["b", "a", ["c", 1]]) == [-9, -8, -7]
    with pytest.raises(ValueError):
        kept(negative, [(8,), (9,)], keys=["a"])
    with pytest.raises(ValueError, match="`function`"):
        kept(lambda value: -value, [(8,)])


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


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are those of x86-64")
def test_arithmetic_tells_instructions_that_round_otherwise_apart():
    def told(**variables: str) -> list[str]:
        ask = "import torch; from sgsc_study.workers import arithmetic; print(arithmetic(), torch.get_num_threads())"
        return subprocess.check_output([sys.executable, "-c", ask], env=os.environ | variables, text=True).split()

    own, threads = told(), told(OMP_NUM_THREADS="2")
    instructions = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    instructions |= {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"}
    assert own[0] == threads[0] == arithmetic() and threads[1] == "2"
    assert len({own[0], *(told(**{name: value})[0] for name, value in instructions.items())}) == 5


@pytest.fixture
def dask(tmp_path):
    """Start a Dask scheduler and one worker with these options and variables; the scheduler's address."""
    started, file = [], tmp_path / "scheduler.json"

    def command(name: str, *options: str, **variables: str) -> None:
        run = [sys.executable, "-P", "-m", f"distributed.cli.dask_{name}", "--scheduler-file", str(file), *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
        started.append(subprocess.Popen(run, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables, **quiet))

    def start(*options: str, **variables: str) -> str:
        command("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        assert wait_for(lambda: file.exists() and file.read_text().endswith("}"), 60)
        command("worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard", *options, **variables)
        return json.loads(file.read_text())["address"]

    yield start
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["without the project", "other code", "other arithmetic"])
def test_a_worker_that_computes_otherwise_or_not_at_all_is_refused_by_its_address_and_reason(dask, how, tmp_path):
    reason = "ModuleNotFoundError" if how == "without the project" else re.escape(engine_version()[1])
    variables = {"ATEN_CPU_CAPABILITY": "default"}
    if how == "without the project":
        (tmp_path / "sgsc_lib.py").write_text("raise ModuleNotFoundError(name='sgsc_lib')")
        variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    elif how == "other code":
        definition = shutil.copytree(ROOT / "sgsc_core", tmp_path / "sgsc_core") / "definition.py"
        definition.write_text(definition.read_text() + "\nX = 1\n")
        variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    address = dask(**variables)
    with pytest.raises(RuntimeError, match=rf"worker tcp://127\.0\.0\.1:\d+ .*Found .*{reason}"):
        parallel(abs, [(-1,)], scheduler=address)


@pytest.mark.slow
def test_workers_that_die_of_every_task_or_do_not_come_end_in_an_error(dask, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 30)
    address = dask()
    assert parallel(abs, [(k,) for k in range(-9, 0)], scheduler=address) == [*range(9, 0, -1)]
    with pytest.raises(KilledWorker, match=r"tcp://127\.0\.0\.1:\d+"):
        parallel(os._exit, [(3,)], scheduler=address)


@pytest.mark.slow
def test_a_cluster_that_has_lost_its_workers_or_has_none_ends_in_an_error(dask, monkeypatch, capsys):
    address = dask("--no-nanny", "--nworkers", "1")
    monkeypatch.setattr(workers, "PATIENCE", 60)
    with on_workers(address, 1, 1) as run:
        monkeypatch.setattr(workers, "PATIENCE", 3)
        with pytest.raises(RuntimeError, match=r"\['tcp://127\.0\.0\.1:\d+'\], are gone"):
            list(run([partial(os._exit, 3)], "exit"))
    assert "exit: number of workers: 1" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=f"`scheduler`.*{address}"), on_workers(address, 1, 1):
        pass


@pytest.mark.parametrize("address", ["here", pytest.param("tcp://127.0.0.1:1", marks=pytest.mark.slow)])
def test_a_scheduler_that_does_not_answer_is_refused_by_name(address):
    with pytest.raises(ValueError, match="`scheduler`"), on_workers(address, 1, 1):
        pass


@pytest.mark.slow
def test_a_worker_ends_with_the_process_it_works_for_whatever_it_waits_for():
    wait = "import os, time; from sgsc_study.workers import end_with; end_with(os.getppid())"
    wait += "; print(os.getpid(), flush=True); time.sleep(60)"
    work = f"subprocess.Popen([sys.executable, '-c', {wait!r}], stdout=-1).stdout.readline()"
    worker = int(subprocess.check_output([sys.executable, "-c", f"import subprocess, sys; print(int({work}))"]))
    assert wait_for(lambda: not os.path.exists(f"/proc/{worker}"), 15)
