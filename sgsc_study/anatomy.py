"""What the steps of a training run do: the gate by layer, the direction and size of updates, the end point's curvature.

It follows the engine's own steps and changes nothing in them.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sgsc_study.data import Dataset
from sgsc_study.engine import evaluate, forward, losses_of, stream, training
from sgsc_study.gates import Gate, align_runs
from sgsc_study.optimizers import OPTIMIZERS
from sgsc_study.runs import Run


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Each run's inner product of two lists of tensors [R, *shape], over all parameters: [R].

    >>> inner([torch.ones(2, 3)], [torch.ones(2, 3)])
    tensor([3., 3.])
    """
    return torch.stack([(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Each run's cosine between two directions in parameter space, [R]; 0 where one has no length."""
    return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt().clamp_(min=1e-30)


def sharpness(runs: Sequence[Run], parameters: Sequence[Tensor], x: Tensor, y: Tensor, iterations: int = 50) -> Tensor:
    """The largest eigenvalue of the Hessian of each run's mean loss on x [N, in], y [N], by power iteration: [R]."""
    own = [p.detach().clone().requires_grad_() for p in parameters]
    rows = (len(runs), *x.shape)
    draws = [stream(run.seed, 3) for run in runs]
    v = [torch.stack([torch.randn(p.shape[1:], generator=draw, dtype=p.dtype) for draw in draws]) for p in own]
    with torch.enable_grad():
        log_p = forward(own, x.expand(rows))[1].log_softmax(1)
        loss = losses_of(log_p, y.expand(rows[:2])).sum()  # runs do not interact
        gradients = torch.autograd.grad(loss, own, create_graph=True)
        for _ in range(iterations):
            length = inner(v, v).sqrt()
            v = [part / align_runs(length, part) for part in v]
            product = [h.detach() for h in torch.autograd.grad(gradients, own, v, retain_graph=True)]
            v, value = product, inner(v, product)
    return value


@torch.no_grad()
def anatomy(
    runs: Sequence[Run], data: Dataset, gate: Gate | None, epochs: int, batch_size: int, widths: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Follow a stack of runs as `engine.training` takes them (of one optimizer, placement, control and gate).

    Means over the steps of each epoch, [R, epochs]: `gate_1`, `gate_2`, …, the mean gate of the weights of each layer
    (1 without a gate); `cosine_to_sgd`, between the update and Nesterov's on the same gradients, and
    `ungated_cosine_to_sgd`, the same of what the optimizer would have done without the gate; `update_norm`. At the end
    of each epoch: `weight_norm`; `still_share`, the share of parameters that have moved since the start by less than a
    tenth of the root mean square movement of their tensor; `train_loss`, `test_accuracy`. At the end of the run, [R]:
    `sharpness`, on all training rows.

    >>> from sgsc_study.data import load_mnist1d
    >>> from sgsc_study.gates import sign_gate
    >>> found = anatomy([Run(0, 0.01, 0.5, "after")], load_mnist1d(100), sign_gate, 2, 16, (40, 8, 10))
    >>> found["cosine_to_sgd"].shape, found["sharpness"].shape
    ((1, 2), (1,))
    """
    log: dict[str, list[Tensor]] = {}
    states: dict[str, list[dict[str, Tensor]]] = {}
    start: list[Tensor] = []
    ones = torch.ones(len(runs), dtype=torch.float64)
    of_epoch: list[dict[str, Tensor]] = []
    for count, step in enumerate(training(runs, data, gate, epochs, batch_size, widths), 1):
        if not start:  # what the first update was added to, up to rounding
            start = [p - u for p, u in zip(step.parameters, step.updates, strict=True)]
        directions = {}
        for name in {"sgd", runs[0].optimizer}:
            state = states.setdefault(name, [{} for _ in start])
            directions[name] = [
                OPTIMIZERS[name](g, own, ones, count, g.ndim == 3 and k < len(start) - 2)
                for k, (g, own) in enumerate(zip(step.gradients, state, strict=True))
            ]
        gates = step.gates or [torch.ones_like(p) for p in start]
        found = {f"gate_{k}": g.flatten(1).mean(1) for k, g in enumerate(gates[::2], 1)}
        found["cosine_to_sgd"] = cosine(step.updates, directions["sgd"])
        found["ungated_cosine_to_sgd"] = cosine(directions[runs[0].optimizer], directions["sgd"])
        found["update_norm"] = inner(step.updates, step.updates).sqrt()
        of_epoch.append(found)
        if step.ends_epoch:
            ended = {name: torch.stack([each[name] for each in of_epoch]).mean(0) for name in found}
            of_epoch = []
            moved = [(p - p0).abs().flatten(1) for p, p0 in zip(step.parameters, start, strict=True)]
            still = [m < 0.1 * m.square().mean(1, keepdim=True).sqrt() for m in moved]
            ended["still_share"] = torch.cat(still, 1).float().mean(1)
            ended["weight_norm"] = inner(step.parameters, step.parameters).sqrt()
            ended["train_loss"] = evaluate(step.parameters, data.x_train, data.y_train)[0]
            ended["test_accuracy"] = evaluate(step.parameters, data.x_test, data.y_test)[1]
            for name, values in ended.items():
                log.setdefault(name, []).append(values)
    curves = {name: torch.stack(values, 1).numpy() for name, values in log.items()}
    return curves | {"sharpness": sharpness(runs, step.parameters, data.x_train, data.y_train).numpy()}
