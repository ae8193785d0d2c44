"""SGSC over real processes: 2 and 3 of them, on gloo, give the c of one process on the whole batch."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_worker import GAMMA, problem, shard
from torch import Tensor

from sgsc_lib import SGSC

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, WORKER, str(request.param), folder]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@cache
def alone(rows: int = 24) -> dict[str, Any]:
    """The same step in one process on the first `rows` rows of the global batch."""
    model, x, y = problem()
    sgsc = SGSC(model, GAMMA)
    F.cross_entropy(model(x[:rows]), y[:rows], reduction="sum").backward()
    c = sgsc.consistency()
    sgsc.scale_gradients_()
    return {"c": c, "gradients": [p.grad for p in model.parameters()], "summary": sgsc.summary().to_dict("list")}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("case", ["even, plain", "uneven, plain", "empty, plain", "even, ddp", "uneven, ddp",
                                  "even, ddp in parts"])  # fmt: skip
def test_c_is_that_of_the_global_batch(processes, case):
    expected = alone()
    for found in processes:
        assert_equal(found[case]["c"], expected["c"])
        assert found[case]["summary"] == expected["summary"]


def test_c_is_that_of_the_global_batch_with_hooks_on_the_wrapper(processes):
    expected = {f"module.{name}": c for name, c in alone()["c"].items()}
    for found in processes:
        assert_equal(found["uneven, ddp inside"]["c"], expected)


@pytest.mark.parametrize("case", ["even, ddp", "uneven, ddp", "even, ddp in parts"])
def test_gated_gradients_are_those_of_the_global_batch(processes, case):
    for found in processes:
        for mean, total in zip(found[case]["gradients"], alone()["gradients"], strict=True):
            torch.testing.assert_close(mean * len(processes), total)  # DistributedDataParallel averages over processes


def test_without_ddp_the_gradients_stay_the_processes_own(processes):
    total = [sum(own) for own in zip(*(found["uneven, plain"]["gradients"] for found in processes), strict=True)]
    for found, expected in zip(total, alone()["gradients"], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_process_without_a_batch_takes_part(processes):
    world = len(processes)
    working = shard("even", world - 2, world).stop
    for found in processes:
        assert_equal(found["idle"]["c"], alone(working)["c"])


def test_processes_may_use_different_branches(processes):
    model, x, y = problem(branches=True)
    sgsc = SGSC(model, GAMMA)
    for rank in range(len(processes)):
        rows = shard("uneven", rank, len(processes))
        F.cross_entropy(model(x[rows], "b" if rank else "a"), y[rows]).backward()
    for found in processes:
        assert_equal(found["branches"]["c"], sgsc.consistency())


def test_a_second_gate_is_refused_in_every_process(processes):
    for found in processes:
        assert "call loss.backward() first" in found["gated twice"]["error"]
