"""SGSC over two real processes, on gloo, gives what one process gives on the whole batch.

Run as a script, this file forks them, so that what it imports is imported once for all.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo  # what every optimiser imports on first use
import torch.distributed as dist
from asserts import assert_equal, loss_of
from inputs import branches, cnn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgsc_lib import SGSC

ALONE: list[dist.ProcessGroup] = []  # the group of this process alone, of the model that sees the global batch
UNEVEN, EMPTY = (slice(0, 7), slice(7, 24)), (slice(0, 24), slice(24, 24))  # the rows of each process


def problem(build=cnn) -> tuple[nn.Module, Tensor, Tensor]:
    """The same model and global batch in every process: (model, x, y)."""
    model, x, y = build(24)
    return model.double(), x.double(), y


def check_step(rank: int, shards=UNEVEN, ddp: bool = False, wrapped: bool = False, first: int = 0) -> None:
    """A step on this process's shard, its `first` rows apart; the gated gradients sum to those of one process."""
    (model, x, y), (whole, *batch) = problem(), problem()
    net = DistributedDataParallel(model) if ddp else model
    sgsc = SGSC(net if wrapped else model, gamma=0.5, process_group=dist.group.WORLD)
    alone = SGSC(whole, gamma=0.5, process_group=ALONE[0])
    loss_of(whole, *batch, "sum").backward()
    x, y = x[shards[rank]], y[shards[rank]]
    if first:
        with net.no_sync():
            loss_of(net, x[:first], y[:first], "sum").backward()
        sgsc.consistency()  # reading it in between changes nothing
    loss_of(net, x[first:], y[first:], "sum").backward()
    prefix = "module." if wrapped else ""
    assert_equal(sgsc.consistency(), {f"{prefix}{name}": c for name, c in alone.consistency().items()})
    expected = alone.summary().drop(columns="rounding")  # that is of this process's own gradients
    assert sgsc.summary().drop(columns="rounding").equals(expected.assign(parameter=prefix + expected["parameter"]))
    sgsc.scale_gradients_()
    alone.scale_gradients_()
    for p, of_whole in zip(model.parameters(), whole.parameters(), strict=True):
        total = p.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, of_whole.grad)
        assert not ddp or torch.equal(total, 2 * p.grad)


def check_idle(rank: int) -> None:
    """A second step for which process 1 has no batch; a third gate, for which none has, is refused."""
    (model, x, y), (whole, *_) = problem(), problem()
    sgsc, alone = SGSC(model, gamma=0.5, process_group=dist.group.WORLD), SGSC(whole, gamma=0.5, process_group=ALONE[0])
    for working in (True, rank == 0):
        model.zero_grad()
        if working:
            loss_of(model, x[UNEVEN[rank]], y[UNEVEN[rank]]).backward()
        sgsc.scale_gradients_()
    loss_of(whole, x[UNEVEN[0]], y[UNEVEN[0]]).backward()
    assert_equal(sgsc.consistency(), alone.consistency())
    with pytest.raises(RuntimeError, match=r"loss.backward\(\)"):
        sgsc.scale_gradients_()


def check_branches(rank: int) -> None:
    """Process 0 uses one branch, 1 the other; DistributedDataParallel fills in both gradients everywhere."""
    (model, x, y), (whole, *_) = problem(branches), problem(branches)
    sgsc, alone = SGSC(model, gamma=0.5, process_group=dist.group.WORLD), SGSC(whole, gamma=0.5, process_group=ALONE[0])
    net = DistributedDataParallel(model, find_unused_parameters=True)
    loss_of(lambda x: net(x, "ab"[rank]), x[UNEVEN[rank]], y[UNEVEN[rank]]).backward()
    for branch, rows in zip("ab", UNEVEN, strict=True):
        torch.nn.functional.cross_entropy(whole(x[rows], branch), y[rows]).backward()
    assert_equal(sgsc.consistency(), alone.consistency())


def check_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ALONE.append(dist.new_subgroups(1)[0])
    with pytest.raises(ValueError, match="`process_group`"):
        SGSC(cnn()[0], gamma=0.5)
    check_step(rank)
    check_step(rank, EMPTY)
    check_step(rank, ddp=True, wrapped=True)
    check_step(rank, ddp=True, first=3)
    check_idle(rank)
    check_branches(rank)
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds_on_the_global_batch(tmp_path):
    run = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]


if __name__ == "__main__":
    torch.multiprocessing.start_processes(check_all, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
