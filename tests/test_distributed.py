"""SGSC over two real processes, on gloo, gives the c of one process on the whole batch.

Run as a script, this file forks them, so that what it imports is imported once for all; each saves what SGSC found.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what every optimiser imports on first use
import torch.distributed as dist
from asserts import assert_equal, loss_of
from inputs import branches, cnn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgsc_lib import SGSC

GAMMA = 0.5
SHARDS = {"uneven": (slice(0, 7), slice(7, 24)), "empty": (slice(0, 24), slice(24, 24))}
CASES = {  # for `step`
    "plain": {},
    "plain, empty": {"how": "empty"},
    "ddp, SGSC on the wrapper": {"ddp": True, "wrapped": True},
    "ddp, in parts": {"ddp": True, "first": 3},
}


def problem(build=cnn) -> tuple[nn.Module, Tensor, Tensor]:
    """The same model and global batch in every process: (model, x, y)."""
    model, x, y = build(24)
    return model.double(), x.double(), y


def gated(model: nn.Module, sgsc: SGSC) -> dict[str, Any]:
    c = sgsc.consistency()
    sgsc.scale_gradients_()
    return {"c": c, "gradients": [p.grad for p in model.parameters()], "summary": sgsc.summary().to_dict("list")}


def step(rank: int, how: str = "uneven", ddp: bool = False, wrapped: bool = False, first: int = 0) -> dict[str, Any]:
    """One step on this process's shard, its `first` rows apart."""
    model, x, y = problem()
    net = DistributedDataParallel(model) if ddp else model
    sgsc = SGSC(net if wrapped else model, GAMMA, process_group=dist.group.WORLD)
    x, y = x[SHARDS[how][rank]], y[SHARDS[how][rank]]
    if first:
        with net.no_sync():
            loss_of(net, x[:first], y[:first], "sum").backward()
    loss_of(net, x[first:], y[first:], "sum").backward()
    return gated(model, sgsc)


def idle(rank: int) -> dict[str, Tensor]:
    """c of a second step for which process 1 has no batch; a third gate, for which none has, is refused."""
    model, x, y = problem()
    rows, sgsc = SHARDS["uneven"][rank], SGSC(model, GAMMA, process_group=dist.group.WORLD)
    for working in (True, rank == 0):
        model.zero_grad()
        if working:
            loss_of(model, x[rows], y[rows]).backward()
        sgsc.scale_gradients_()
    c = sgsc.consistency()
    with pytest.raises(RuntimeError, match=r"loss.backward\(\)"):
        sgsc.scale_gradients_()
    return c


def use_branches(rank: int) -> dict[str, Tensor]:
    """Process 0 uses one branch, 1 the other; DistributedDataParallel fills in both gradients everywhere."""
    model, x, y = problem(branches)
    rows, net = SHARDS["uneven"][rank], DistributedDataParallel(model, find_unused_parameters=True)
    sgsc = SGSC(model, GAMMA, process_group=dist.group.WORLD)
    loss_of(lambda x: net(x, "ab"[rank]), x[rows], y[rows]).backward()
    return sgsc.consistency()


def run_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: step(rank, **case) for name, case in CASES.items()}
    torch.save(found | {"idle": idle(rank), "branches": use_branches(rank)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("processes")
    run = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@cache
def alone(rows: int = 24) -> dict[str, Any]:
    """The same step in one process on the first `rows` rows of the global batch."""
    model, x, y = problem()
    sgsc = SGSC(model, GAMMA)
    loss_of(model, x[:rows], y[:rows], "sum").backward()
    return gated(model, sgsc)


@pytest.mark.parametrize("case", CASES)
def test_c_is_that_of_the_global_batch_and_gated_gradients_sum_to_its_own(processes, case):
    expected, prefix = alone(), "module." if "wrapper" in case else ""  # of the names
    names = [f"{prefix}{name}" for name in expected["c"]]
    for found in processes:
        assert_equal(found[case]["c"], dict(zip(names, expected["c"].values(), strict=True)))
        assert found[case]["summary"] == expected["summary"] | {"parameter": names}
    first, second = (found[case]["gradients"] for found in processes)
    torch.testing.assert_close([a + b for a, b in zip(first, second, strict=True)], expected["gradients"])
    assert "ddp" not in case or all(map(torch.equal, first, second))


def test_a_process_without_a_batch_takes_part_and_processes_may_use_different_branches(processes):
    model, x, y = problem(branches)
    sgsc = SGSC(model, GAMMA)
    for branch, rows in zip("ab", SHARDS["uneven"], strict=True):
        torch.nn.functional.cross_entropy(model(x[rows], branch), y[rows]).backward()
    for found in processes:
        assert_equal(found["idle"], alone(rows=7)["c"])
        assert_equal(found["branches"], sgsc.consistency())


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_all, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
