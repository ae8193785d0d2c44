"""The ways to c that the benchmark compares: SGSC, the parts of it, and its peers.

Each takes a model and a batch and returns a function that makes one pass and returns {parameter name: c}. All leave the
batch's mean gradient as well, in `.grad` or as a tensor, because a training step needs it. The peers' per-sample
gradients are turned into signs in place, which is faster and smaller than sgsc_lib.sign_consistency.
"""

from collections.abc import Callable

import torch.nn.functional as F
from cases import next_tokens as loss_of
from torch import Tensor, nn

from sgsc_lib import SGSC, per_sample_gradients

GAMMA = 0.25
Result = dict[str, Tensor] | None
Pass = Callable[[], Result]


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    loss_of(model(x), y).backward()


def consistency_(per_sample: Tensor) -> Tensor:
    """c from per-sample gradients [B, *shape], which are overwritten."""
    return per_sample.sign_().sum(0).div_(len(per_sample)).abs_()


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    return lambda: backward(model, x, y)


def empty_hooks(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    """A plain pass with the hooks that any such method needs at each layer: for its input and its errors."""

    def on_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda errors: None)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(on_layer)
    return lambda: backward(model, x, y)


def sgsc(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    gate = SGSC(model, GAMMA)

    def once() -> Result:
        backward(model, x, y)
        return gate.consistency()

    return once


def sgsc_scaled(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    gate = SGSC(model, GAMMA)

    def once() -> Result:
        backward(model, x, y)
        gate.scale_gradients_()
        return None

    return once


def vmap(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    def once() -> Result:
        per_sample = per_sample_gradients(model, x, y, loss_of)
        _ = {name: g.mean(0) for name, g in per_sample.items()}
        return {name: consistency_(per_sample.pop(name)) for name in list(per_sample)}

    return once


def vmap_chunks(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    size = max(1, min(32, len(x) // 4))

    def once() -> Result:
        sums, signs = {}, {}
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            for name, g in per_sample_gradients(model, x[part], y[part], loss_of).items():
                sums[name] = sums.get(name, 0) + g.sum(0)
                signs[name] = signs.get(name, 0) + g.sign_().sum(0)
        _ = {name: total.div_(len(x)) for name, total in sums.items()}
        return {name: total.div_(len(x)).abs_() for name, total in signs.items()}

    return once


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    from opacus import GradSampleModule

    def on_embedding(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Positions that are the same for all samples are looked up for each: otherwise Opacus gets them wrong."""
        return (args[0].expand(len(x), -1),) if args[0].ndim == 1 else None

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(on_embedding)
    wrapped = GradSampleModule(model, loss_reduction="mean")

    def once() -> Result:
        backward(wrapped, x, y)
        c = {}
        for name, p in model.named_parameters():
            c[name], p.grad_sample = consistency_(p.grad_sample), None
        return c

    return once


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    branches = any(not isinstance(module, nn.Sequential) and [*module.children()] for module in model.modules())
    model, loss = extend(model, use_converter=branches), extend(nn.CrossEntropyLoss())

    def once() -> Result:
        model.zero_grad()
        with backpack(BatchGrad()):
            loss(model(x), y).backward()
        c = {}
        for name, p in model.named_parameters():
            c[name] = consistency_(p.grad_batch)
            del p.grad_batch
        return c

    return once


def torchjd(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    from torchjd.autojac import jac

    names, parameters = zip(*model.named_parameters(), strict=True)

    def once() -> Result:
        logits = model(x)
        losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(len(x), -1).mean(1)
        jacobians = list(jac(losses, parameters))
        _ = [j.mean(0) for j in jacobians]
        return {name: consistency_(jacobians.pop(0)) for name in names}

    return once


# No method but a part of one, timed to see where SGSC's time goes.
FLOOR, HOOKS, OURS, SCALED = "plain backward", "hooks that do nothing", "SGSC, statistic", "SGSC, scale_gradients_"
VMAP = "torch.func vmap"
METHODS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Pass], str]] = {  # with the package it comes from
    FLOOR: (plain, "torch"),
    HOOKS: (empty_hooks, "torch"),
    OURS: (sgsc, "sgsc"),
    SCALED: (sgsc_scaled, "sgsc"),
    VMAP: (vmap, "torch"),
    "torch.func vmap, in chunks": (vmap_chunks, "torch"),
    "Opacus GradSampleModule": (opacus, "opacus"),
    "BackPACK BatchGrad": (backpack, "backpack-for-pytorch"),
    "TorchJD jac": (torchjd, "torchjd"),
}
