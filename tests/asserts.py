"""What the tests of SGSC share: losses, c by two ways, and the comparison of the two."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from sgsc_lib import SGSC, sign_consistency

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def examples(number: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def loss_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(x), y, reduction=reduction)


def weighted(model: nn.Module, x: Tensor, errors: Tensor) -> Tensor:
    return (model(x) * errors).sum()


def measured(model: nn.Module, x: Tensor, y: Tensor, loss=loss_of) -> dict[str, Tensor]:
    """c of one batch by SGSC, which takes its hooks off again."""
    model.zero_grad()
    before = hooks_on(model)
    with SGSC(model, gamma=1.0) as sgsc:
        loss(model, x, y).backward()
    assert hooks_on(model) == before
    return sgsc.consistency()  # still readable


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, loss=loss_of) -> dict[str, Tensor]:
    """Per-sample gradients by a backward pass for each sample: the oracle where vmap can't go."""
    own, rows = {name: p for name, p in model.named_parameters() if p.requires_grad}, []
    for i in range(len(x)):
        model.zero_grad()
        loss(model, x[i : i + 1], y[i : i + 1]).backward()
        rows.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()})
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in own}


def parts_of_one_pass(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients by a backward pass for each sample's loss, all through one forward pass: the oracle where
    that draws random numbers."""
    losses, own = F.cross_entropy(model(x), y, reduction="none"), dict(model.named_parameters())
    rows = [torch.autograd.grad(loss, own.values(), retain_graph=True) for loss in losses]
    return {name: torch.stack(g) for name, g in zip(own, zip(*rows, strict=True), strict=True)}


def gated_step(sgsc: SGSC, optimiser: torch.optim.Optimizer, placement: str) -> None:
    if placement == "before":
        sgsc.scale_gradients_()
    with sgsc.scaled_update() if placement == "after" else nullcontext():
        optimiser.step()


def assert_consistency(c: dict[str, Tensor], per_sample: dict[str, Tensor]) -> int:
    """Assert c is that of the per-sample gradients, but for signs of gradients within rounding of zero; count those."""
    assert c.keys() == per_sample.keys()
    largest = max(float(g.abs().max()) for g in per_sample.values())
    flips = 0
    for name, g in per_sample.items():
        assert c[name].shape == g.shape[1:] and ((c[name] >= 0) & (c[name] <= 1)).all(), name
        off = (c[name] - sign_consistency(g)).abs() * len(g)  # in samples
        doubtful = ((g != 0) & (g.abs() <= 100 * torch.finfo(g.dtype).eps * largest)).sum(0)
        assert (off <= 2 * doubtful + 1e-3).all(), f"{name}: c differs where no per-sample gradient is near zero"
        flips += int((off > 0.5).sum())
    return flips
