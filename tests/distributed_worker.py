"""The processes of tests/test_distributed.py: each runs every case and saves what SGSC found in it.

Run as a script, it forks them, so that what is imported here is imported once for all of them.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what SGSC and every optimiser import on first use
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgsc_lib import SGSC

GAMMA = 0.5
ROWS = {  # where each process's rows of the 24 end, by number of processes
    "even": {2: (12, 24), 3: (8, 16, 24)},
    "uneven": {2: (7, 24), 3: (5, 6, 24)},
    "empty": {2: (24, 24), 3: (20, 24, 24)},
}


class Branches(nn.Module):
    """A model of which a process may use one branch only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 3), nn.Linear(48, 3)

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return getattr(self, branch)(x.flatten(1))


def problem(*, branches: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """The same model and global batch in every process: (model, x, y)."""
    torch.manual_seed(0)
    cnn = [nn.Conv1d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8), nn.ReLU()]
    model = Branches() if branches else nn.Sequential(*cnn, nn.Linear(8, 3))
    return model.double(), torch.randn(24, 4, 12, dtype=torch.float64), torch.randint(3, (24,))


def shard(how: str, rank: int, world: int) -> slice:
    ends = (0, *ROWS[how][world])
    return slice(ends[rank], ends[rank + 1])


def step(
    how: str, rank: int, world: int, *, ddp: bool, wrapped: bool = False, in_parts: bool = False
) -> dict[str, Any]:
    """One step on this process's shard: c, the gated gradients and the summary of the global batch."""
    model, x, y = problem()
    net = DistributedDataParallel(model) if ddp else model
    sgsc = SGSC(net if wrapped else model, GAMMA, process_group=dist.group.WORLD)
    x, y = (t[shard(how, rank, world)] for t in (x, y))
    if in_parts:
        with net.no_sync() if ddp else nullcontext():
            F.cross_entropy(net(x[:3]), y[:3], reduction="sum").backward()
    rest = slice(3 if in_parts else 0, None)
    F.cross_entropy(net(x[rest]), y[rest], reduction="sum").backward()
    c = sgsc.consistency()
    sgsc.scale_gradients_()
    return {"c": c, "gradients": [p.grad for p in model.parameters()], "summary": sgsc.summary().to_dict("list")}


def idle(rank: int, world: int) -> dict[str, Any]:
    """A second step for which the last process has no batch at all: it gates all the same."""
    model, x, y = problem()
    sgsc = SGSC(model, GAMMA, process_group=dist.group.WORLD)
    for working in (world, world - 1):
        model.zero_grad()
        if rank < working:
            rows = shard("even", rank, world)
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        sgsc.scale_gradients_()
    return {"c": sgsc.consistency()}


def branches(rank: int, world: int) -> dict[str, Any]:
    """Process 0 uses one branch, the others another; DistributedDataParallel fills in both gradients everywhere."""
    model, x, y = problem(branches=True)
    net = DistributedDataParallel(model, find_unused_parameters=True)
    sgsc = SGSC(model, GAMMA, process_group=dist.group.WORLD)
    rows = shard("uneven", rank, world)
    F.cross_entropy(net(x[rows], "b" if rank else "a"), y[rows]).backward()
    return {"c": sgsc.consistency()}


def gated_twice(rank: int, world: int) -> dict[str, Any]:
    model, x, y = problem()
    sgsc = SGSC(model, GAMMA, process_group=dist.group.WORLD)
    F.cross_entropy(model(x), y).backward()
    sgsc.scale_gradients_()
    try:
        sgsc.scale_gradients_()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def run_all(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {f"{how}, plain": step(how, rank, world, ddp=False) for how in ROWS}
    found |= {f"{how}, ddp": step(how, rank, world, ddp=True) for how in ("even", "uneven")}
    found["uneven, ddp inside"] = step("uneven", rank, world, ddp=True, wrapped=True)
    found["even, ddp in parts"] = step("even", rank, world, ddp=True, in_parts=True)
    found |= {"idle": idle(rank, world), "branches": branches(rank, world), "gated twice": gated_twice(rank, world)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.multiprocessing.start_processes(run_all, (world, folder), world, start_method="fork")
