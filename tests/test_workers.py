"""Processes, refused workers, and the fingerprint of arithmetic."""

import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import wait_for

from sgsc_study import GATES, parallel
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
