"""The processes of tests/test_distributed.py: each runs every case and saves what SGSC found in it.

Run as a script, it forks them, so that what is imported here is imported once for all of them.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what every optimiser imports on first use
import torch.distributed as dist
from asserts import loss_of
from inputs import branches, cnn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgsc_lib import SGSC

GAMMA = 0.5
ROWS = {  # where each process's rows of the 24 end, by number of processes
    "even": {2: (12, 24), 3: (8, 16, 24)},
    "uneven": {2: (7, 24), 3: (5, 6, 24)},
    "empty": {2: (24, 24), 3: (20, 24, 24)},
}
CASES = {  # for `step`
    **{f"{how}, plain": {"how": how} for how in ROWS},
    **{f"{how}, ddp": {"how": how, "ddp": True} for how in ("even", "uneven")},
    "uneven, ddp inside": {"how": "uneven", "ddp": True, "wrapped": True},
    "even, ddp in parts": {"how": "even", "ddp": True, "first": 3},
}


def problem(build=cnn) -> tuple[nn.Module, Tensor, Tensor]:
    """The same model and global batch in every process: (model, x, y)."""
    model, x, y = build(24)
    return model.double(), x.double(), y


def shard(how: str, rank: int, world: int) -> slice:
    ends = (0, *ROWS[how][world])
    return slice(ends[rank], ends[rank + 1])


def gated(model: nn.Module, sgsc: SGSC) -> dict[str, Any]:
    """c, the gated gradients and the summary."""
    c = sgsc.consistency()
    sgsc.scale_gradients_()
    return {"c": c, "gradients": [p.grad for p in model.parameters()], "summary": sgsc.summary().to_dict("list")}


def step(rank: int, world: int, how: str, ddp: bool = False, wrapped: bool = False, first: int = 0) -> dict[str, Any]:
    """One step on this process's shard, its `first` rows apart."""
    model, x, y = problem()
    net = DistributedDataParallel(model) if ddp else model
    sgsc = SGSC(net if wrapped else model, GAMMA, process_group=dist.group.WORLD)
    x, y = (t[shard(how, rank, world)] for t in (x, y))
    if first:
        with net.no_sync():
            loss_of(net, x[:first], y[:first], "sum").backward()
    loss_of(net, x[first:], y[first:], "sum").backward()
    return gated(model, sgsc)


def idle(rank: int, world: int) -> dict[str, Any]:
    """A second step for which the last process has no batch at all; a third gate, for which none has, is refused."""
    model, x, y = problem()
    sgsc = SGSC(model, GAMMA, process_group=dist.group.WORLD)
    for working in (world, world - 1):
        model.zero_grad()
        if rank < working:
            rows = shard("even", rank, world)
            loss_of(model, x[rows], y[rows]).backward()
        sgsc.scale_gradients_()
    c = sgsc.consistency()
    with pytest.raises(RuntimeError, match=r"loss.backward\(\)"):
        sgsc.scale_gradients_()
    return {"c": c}


def use_branches(rank: int, world: int) -> dict[str, Any]:
    """Process 0 uses one branch, the others another; DistributedDataParallel fills in both gradients everywhere."""
    model, x, y = problem(branches)
    net = DistributedDataParallel(model, find_unused_parameters=True)
    sgsc = SGSC(model, GAMMA, process_group=dist.group.WORLD)
    rows = shard("uneven", rank, world)
    loss_of(lambda x: net(x, "b" if rank else "a"), x[rows], y[rows]).backward()
    return {"c": sgsc.consistency()}


def run_all(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {name: step(rank, world, **case) for name, case in CASES.items()}
    found |= {"idle": idle(rank, world), "branches": use_branches(rank, world)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.multiprocessing.start_processes(run_all, (world, folder), world, start_method="fork")
