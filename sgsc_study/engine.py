"""Many training runs at once: one stack of multi-layer perceptrons on a leading run axis R, on one thread.

Run r gives the same bits alone and in any stack: it has generators of its own, and no operation mixes runs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgsc_core.definition import factored_sums, mlp
from sgsc_study.data import Dataset
from sgsc_study.gates import SUMS, Gate, align_runs, sums_of
from sgsc_study.optimizers import OPTIMIZERS, plain, step_
from sgsc_study.runs import EPOCH_CURVES, HALVES, Run

Layers = list[tuple[Tensor, Tensor]]  # of each layer the input A [R, B, in] and the error Δ [R, B, out]


def stacked_parameters(runs: Sequence[Run], widths: tuple[int, ...], like: Tensor) -> list[Tensor]:
    models = [mlp(widths, seed=run.seed).requires_grad_(False) for run in runs]
    return [torch.stack(ps).to(like) for ps in zip(*(model.parameters() for model in models), strict=True)]


def forward(parameters: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """All runs' forward pass on x [R, B, in]: the inputs A of each layer, and the logits [R, classes, B].

    The classes come first, as products and sums along a last axis as short as theirs are two to six times slower.
    """
    inputs = [x]
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        inputs.append(torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT).relu_())  # [R, B, out]
    return inputs, torch.baddbmm(parameters[-1].unsqueeze(2), parameters[-2], inputs[-1].mT)


def losses_of(log_p: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """Each run's mean cross-entropy: log p [R, classes, B], labels [R, B], label smoothing [R] -> [R]."""
    loss = -log_p.gather(1, y.unsqueeze(1)).squeeze(1)
    if smoothing is not None:  # towards the uniform distribution (Szegedy et al., arXiv 1512.00567, section 7)
        loss = loss.lerp(-log_p.mean(1), smoothing.unsqueeze(1))
    return loss.mean(1)


def backward(
    parameters: list[Tensor], inputs: list[Tensor], log_p: Tensor, y: Tensor, smoothing: Tensor | None = None
) -> list[Tensor]:
    """The errors Δ of each layer, [R, B, out]: the gradients of each run's mean loss at the layer's outputs.

    They are p minus the targets at the logits; below, Δ W where the ReLU let its input pass.
    """
    error, (_, classes, size) = log_p.exp(), log_p.shape
    smooth = error.new_zeros(1, 1, 1) if smoothing is None else smoothing.view(-1, 1, 1)
    error.scatter_add_(1, y.unsqueeze(1), (smooth - 1).expand(len(y), 1, size))
    if smoothing is not None:
        error -= smooth / classes
    errors = [error.div_(size).mT]
    for weight, a in zip(parameters[::2][:0:-1], inputs[:0:-1], strict=True):
        errors.append((errors[-1] @ weight).mul_(a.sign()))
    return errors[::-1]


@torch.no_grad()
def evaluate(parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [R] and accuracy [R] of every run on all of x [N, in], in blocks that stay in cache; NaN where N = 0."""
    n_runs, n = len(parameters[0]), len(x)
    loss, correct = x.new_zeros(n_runs), y.new_zeros(n_runs)
    for x_block, y_block in zip(x.split(160), y.split(160), strict=True) if n else ():
        logits, labels = forward(parameters, x_block.expand(n_runs, *x_block.shape))[1], y_block.expand(n_runs, -1)
        loss += losses_of(logits.log_softmax(1), labels) * len(x_block)
        correct += (logits.mT.contiguous().argmax(2) == labels).sum(1)
    return loss / n, correct / n if n else torch.full_like(loss, math.nan)


def controlled(
    gates: list[Tensor], control: str, first: list[Tensor] | None, generators: list[torch.Generator]
) -> list[Tensor]:
    """Replace gates [R, ...] by the part of them that `control` keeps (see `Run`)."""
    if control == "permuted":
        orders = [random_orders(g[0].numel(), generators, g.device) for g in gates]
        return [g.flatten(1).gather(1, order).view_as(g) for g, order in zip(gates, orders, strict=True)]
    if control == "layer-mean":
        return [align_runs(g.flatten(1).mean(1), g).expand_as(g) for g in gates]
    return first if control == "frozen" and first is not None else gates


def stream(seed: int, purpose: int) -> torch.Generator:
    """A generator of its own for each purpose of a seed: 1 the order of batches, 2 the permuted control."""
    state = np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def random_orders(n: int, generators: list[torch.Generator], device: torch.device) -> Tensor:
    """An order of n for each run, [R, n], drawn on the processor, whose draws are the same beside any device."""
    return torch.stack([torch.randperm(n, generator=own) for own in generators]).to(device)


class Step(NamedTuple):
    """What one step of a stack left; the parameters are changed in place by the next."""

    epoch: int  # from 1
    ends_epoch: bool
    losses: Tensor  # [R], of the batch, before the update
    gradients: list[Tensor]  # mean gradients, [R, *shape] a parameter
    gates: list[Tensor] | None  # what a gate made of the batch, [R, *shape] a parameter
    updates: list[Tensor]  # what the optimizer added, gated or not; weight decay aside
    parameters: list[Tensor]  # after the update


@torch.no_grad()
def training(
    runs: Sequence[Run], data: Dataset, gate: Gate | None, epochs: int, batch_size: int, widths: tuple[int, ...]
) -> Iterator[Step]:
    """Train runs of one optimizer, placement, control and `gate` (None: no gate, or a relative) together."""
    x_train, y_train = data.x_train, data.y_train
    n = len(x_train)
    gammas, peak_rates, decays, smoothings = (
        torch.tensor([getattr(run, field) for run in runs], dtype=torch.float64)
        for field in ("gamma", "lr", "weight_decay", "label_smoothing")
    )
    weight_decay = decays if decays.any() else None
    smoothing = smoothings.to(x_train) if smoothings.any() else None
    cosine = torch.tensor([run.schedule == "cosine" for run in runs])
    placement, control, method = runs[0].placement, runs[0].control, runs[0].gate
    # signSGD: the votes are the update, without an optimizer
    optimizer = plain if (method, placement) == ("vote", "after") else OPTIMIZERS[runs[0].optimizer]
    orders, shuffles = [stream(run.seed, 1) for run in runs], [stream(run.seed, 2) for run in runs]
    parameters = stacked_parameters(runs, widths, x_train)
    state: list[dict[str, Tensor]] = [{} for _ in parameters]
    first_gates, step, n_steps = None, 0, epochs * math.ceil(n / batch_size)

    for epoch in range(1, epochs + 1):
        order = random_orders(n, orders, x_train.device)  # [R, n]
        for start in range(0, n, batch_size):
            batch = order[:, start : start + batch_size]  # [R, B]
            rates = torch.where(cosine, peak_rates * (1 + math.cos(math.pi * step / n_steps)) / 2, peak_rates)
            step += 1
            x, y = x_train.index_select(0, batch.flatten()).view(*batch.shape, -1), y_train[batch]
            inputs, logits = forward(parameters, x)
            log_p = logits.log_softmax(1)
            losses = losses_of(log_p, y, smoothing)  # [R]
            layers = list(zip(inputs, backward(parameters, inputs, log_p, y, smoothing), strict=True))
            layers, judging = in_samples(layers, control)
            means = gradients = sums_over(layers, "total")
            made = gates = None
            if gate is not None:
                known = {"total": means} if judging is layers else {}
                of_tensor = zip(*(known.get(name) or sums_over(judging, name) for name in sums_of(gate)), strict=True)
                size = judging[0][0].shape[1]
                made = [gate(*tensors, batch_size=size, gamma=gammas) for tensors in of_tensor]
                first_gates = first_gates or made
                made = gates = controlled(made, control, first_gates, shuffles)
                if placement == "before":
                    gradients, gates = [g * own for g, own in zip(gradients, gates, strict=True)], None
            if method == "vote":
                gradients = [s.sign() for s in sums_over(layers, "sign")]
            updates = step_(
                parameters, gradients, state, rates, step, optimizer=optimizer, gates=gates,
                weight_decay=weight_decay, cautious=method == "cautious",
            )  # fmt: skip
            yield Step(epoch, start + batch_size >= n, losses, means, made, updates, parameters)


def sums_over(layers: Layers, name: str) -> list[Tensor]:
    """Σ_i f(g_i) of every parameter, [R, *shape], for the f that has this name in `SUMS`, or "total"."""
    f = SUMS.get(name, lambda t: t)
    return [s for a, delta in layers for s in factored_sums(a, delta, f)]


def in_samples(layers: Layers, control: str) -> tuple[Layers, Layers]:
    """The samples that make the gradient and those that make the gate: all, or, for the halves' controls, half.

    The first half of a batch makes the gradient; its gate is its own, or that of the other half.
    """
    if control not in HALVES:
        return layers, layers
    size = layers[0][0].shape[1]
    first = [(a[:, : size // 2], delta[:, : size // 2] * (size / (size // 2))) for a, delta in layers]
    other = [(a[:, -(size // 2) :], delta[:, -(size // 2) :]) for a, delta in layers]
    return first, first if control == "own-half" else other


@torch.no_grad()
def train_stack(
    runs: Sequence[Run],
    data: Dataset,
    fresh: tuple[Tensor, Tensor] | None,
    gate: Gate | None,
    epochs: int,
    batch_size: int,
    widths: tuple[int, ...],
    probe_size: int,
    evaluate_every: int,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """The curves of runs trained together; see `train`."""
    data = Dataset(*(part.to(device) for part in data))
    n_runs, log = len(runs), {name: [] for name in ("step_loss", "probe_loss", *EPOCH_CURVES)}
    probe = data.x_train[:probe_size].expand(n_runs, -1, -1), data.y_train[:probe_size].expand(n_runs, -1)
    for step in training(runs, data, gate, epochs, batch_size, widths):
        log["step_loss"].append(step.losses)
        if probe_size:
            log["probe_loss"].append(losses_of(forward(step.parameters, probe[0])[1].log_softmax(1), probe[1]))
        if step.ends_epoch and (step.epoch % evaluate_every == 0 or step.epoch == epochs):
            found = [values for k in (0, 2, 4) for values in evaluate(step.parameters, data[k], data[k + 1])]
            for name, values in zip(EPOCH_CURVES, found, strict=True):
                log[name].append(values)

    curves = {name: torch.stack(rows, 1).cpu().numpy() if rows else np.empty((n_runs, 0)) for name, rows in log.items()}
    x, y = fresh or (data.x_test[:0], data.y_test[:0])  # of no rows the mean is NaN
    last = zip(("fresh_loss", "fresh_accuracy"), evaluate(step.parameters, x.to(device), y.to(device)), strict=True)
    return curves | {name: values.cpu().numpy() for name, values in last}
