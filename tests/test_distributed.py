"""SGSC over real processes: 2 and 3 of them, on gloo, give the c of one process on the whole batch."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import assert_equal, loss_of
from distributed_worker import CASES, GAMMA, gated, problem, shard
from inputs import branches

from sgsc_lib import SGSC


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def processes(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, Path(__file__).with_name("distributed_worker.py"), str(request.param), folder]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@cache
def alone(rows: int = 24) -> dict[str, Any]:
    """The same step in one process on the first `rows` rows of the global batch."""
    model, x, y = problem()
    sgsc = SGSC(model, GAMMA)
    loss_of(model, x[:rows], y[:rows], "sum").backward()
    return gated(model, sgsc)


@pytest.mark.parametrize("case", CASES)
def test_c_is_that_of_the_global_batch(processes, case):
    prefix = "module." if "inside" in case else ""  # of the names, where SGSC is on the wrapper
    expected = alone()
    names = [f"{prefix}{name}" for name in expected["c"]]
    for found in processes:
        assert_equal(found[case]["c"], dict(zip(names, expected["c"].values(), strict=True)))
        assert found[case]["summary"] == expected["summary"] | {"parameter": names}


@pytest.mark.parametrize("case", CASES)
def test_gated_gradients_sum_to_those_of_the_global_batch_and_with_ddp_are_its_mean_everywhere(processes, case):
    of_each = list(zip(*(found[case]["gradients"] for found in processes), strict=True))
    torch.testing.assert_close([sum(gradients) for gradients in of_each], alone()["gradients"])
    assert "ddp" not in case or all(torch.equal(g, first) for first, *others in of_each for g in others)


def test_a_process_without_a_batch_takes_part(processes):
    world = len(processes)
    for found in processes:
        assert_equal(found["idle"]["c"], alone(shard("even", world - 2, world).stop)["c"])


def test_processes_may_use_different_branches(processes):
    model, x, y = problem(branches)
    sgsc = SGSC(model, GAMMA)
    for rank in range(len(processes)):
        rows = shard("uneven", rank, len(processes))
        loss_of(lambda x, branch="b" if rank else "a": model(x, branch), x[rows], y[rows]).backward()
    for found in processes:
        assert_equal(found["branches"]["c"], sgsc.consistency())
