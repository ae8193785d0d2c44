"""Many training runs at once: one stack of multi-layer perceptrons on a leading run axis R, on one thread.

Run r gives the same bits alone and in any stack: it has generators of its own, and no operation mixes runs.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sgsc_lib import factored_sums, mlp
from sgsc_study.data import Dataset
from sgsc_study.gates import SUMS, Gate, align_runs, sums_of
from sgsc_study.runs import EPOCH_CURVES, Run

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults (Kingma & Ba, arXiv 1412.6980), as in torch.optim.Adam


def stacked_parameters(runs: Sequence[Run], widths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    models = [mlp(widths, seed=run.seed).requires_grad_(False) for run in runs]
    return [torch.stack(ps).to(dtype) for ps in zip(*(model.parameters() for model in models), strict=True)]


def forward(parameters: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All runs' forward pass on x [R, B, in]: the inputs A of each layer and the outputs of each layer."""
    inputs, outputs = [x], []
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        outputs.append(torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT))  # [R, B, out]
        if not outputs[-1].requires_grad and torch.is_grad_enabled():
            outputs[-1].requires_grad_()  # the errors Δ are the gradients at these outputs
        inputs.append(outputs[-1].relu())
    return inputs[:-1], outputs


def losses_of(logits: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """Each run's mean cross-entropy: logits [R, B, classes], labels [R, B], label smoothing [R] -> [R]."""
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    if smoothing is not None:  # towards the uniform distribution (Szegedy et al., arXiv 1512.00567, section 7)
        loss = loss.lerp(-logits.log_softmax(-1).mean(-1), smoothing.unsqueeze(1))
    return loss.mean(1)


@torch.no_grad()
def evaluate(parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [R] and accuracy [R] of every run on all of x [N, in], in blocks that stay in cache; NaN where N = 0."""
    n_runs, n = len(parameters[0]), len(x)
    loss, correct = torch.zeros(n_runs, dtype=x.dtype), torch.zeros(n_runs, dtype=torch.int64)
    for x_block, y_block in zip(x.split(125), y.split(125), strict=True):
        logits = forward(parameters, x_block.expand(n_runs, *x_block.shape))[1][-1]
        labels = y_block.expand(n_runs, -1)
        loss += losses_of(logits, labels) * len(x_block)
        correct += (logits.argmax(-1) == labels).sum(1)
    return loss / n, correct / n if n else torch.full((n_runs,), math.nan)


def adam_step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[tuple[Tensor, Tensor]],
    lr: Tensor,
    step: int,
    gates: list[Tensor] | None = None,
    weight_decay: Tensor | None = None,
    cautious: bool = False,
) -> None:
    """One step of Adam (Kingma & Ba, algorithm 1) on tensors [R, ...] with a learning rate a run, lr float64 [R].

    Operation by operation what torch.optim.Adam does to one tensor; with `weight_decay` float64 [R], torch.optim.AdamW.
    `gates` scale the finished update; `cautious` keeps of it only what has the gradient's sign. `step` counts from 1;
    `parameters` and `moments` are changed in place.

    >>> p, moments = torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2, 3))
    >>> adam_step_([p], [torch.ones(2, 3)], [moments], torch.tensor([0.1, 0.2], dtype=torch.float64), step=1)
    >>> p[:, 0]  # the first step has the length of the learning rate
    tensor([-0.1000, -0.2000])
    """
    correction1, correction2 = 1 - BETA1**step, 1 - BETA2**step
    for k, (p, g, (m, v)) in enumerate(zip(parameters, gradients, moments, strict=True)):
        if weight_decay is not None:
            p.mul_(align_runs(1 - lr * weight_decay, p))
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        denominator = (v.sqrt() / correction2**0.5).add_(EPSILON)
        update = m * align_runs(-lr / correction1, p)
        if gates is not None:
            update.mul_(gates[k])
        if cautious:
            agrees = (update * g < 0).to(p.dtype)
            update.mul_(agrees / align_runs(agrees.flatten(1).mean(1).clamp_(min=1e-3), p))
        p.addcdiv_(update, denominator)


def controlled(
    gates: list[Tensor], control: str, first: list[Tensor] | None, generators: list[torch.Generator]
) -> list[Tensor]:
    """Replace gates [R, ...] by the part of them that `control` keeps (see `Run`)."""
    if control == "permuted":
        orders = [torch.stack([torch.randperm(g[0].numel(), generator=own) for own in generators]) for g in gates]
        return [g.flatten(1).gather(1, order).view_as(g) for g, order in zip(gates, orders, strict=True)]
    if control == "layer-mean":
        return [align_runs(g.flatten(1).mean(1), g).expand_as(g) for g in gates]
    return first if control == "frozen" and first is not None else gates


def stream(seed: int, purpose: int) -> torch.Generator:
    """A generator of its own for each purpose of a seed: 1 the order of batches, 2 the permuted control."""
    state = np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


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
) -> dict[str, np.ndarray]:
    """Train runs of one placement, control and `gate` (None: plain Adam or a relative) together; see `train`."""
    x_train, y_train = data.x_train, data.y_train
    n_runs, n = len(runs), len(x_train)
    gammas, peak_rates, decays, smoothings = (
        torch.tensor([getattr(run, field) for run in runs], dtype=torch.float64)
        for field in ("gamma", "lr", "weight_decay", "label_smoothing")
    )
    weight_decay = decays if decays.any() else None
    smoothing = smoothings.to(x_train.dtype) if smoothings.any() else None
    cosine = torch.tensor([run.schedule == "cosine" for run in runs])
    placement, control, method = runs[0].placement, runs[0].control, runs[0].gate
    orders, shuffles = [stream(run.seed, 1) for run in runs], [stream(run.seed, 2) for run in runs]
    parameters = stacked_parameters(runs, widths, x_train.dtype)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    probe = x_train[:probe_size].expand(n_runs, -1, -1), y_train[:probe_size].expand(n_runs, -1)
    first_gates, step, log = None, 0, {name: [] for name in ("step_loss", "probe_loss", *EPOCH_CURVES)}
    n_steps = epochs * math.ceil(n / batch_size)

    for epoch in range(1, epochs + 1):
        order = torch.stack([torch.randperm(n, generator=generator) for generator in orders])  # [R, n]
        for batch in order.split(batch_size, dim=1):  # [R, B]
            rates = torch.where(cosine, peak_rates * (1 + math.cos(math.pi * step / n_steps)) / 2, peak_rates)
            step += 1
            with torch.enable_grad():
                inputs, outputs = forward(parameters, x_train[batch])
                losses = losses_of(outputs[-1], y_train[batch], smoothing)  # [R]
                # Runs do not interact, so the gradient of the summed loss is every run's own.
                errors = torch.autograd.grad(losses.sum(), outputs)  # Δ, [R, B, out] a layer
            layers = list(zip(inputs, errors, strict=True))
            gradients = [s for a, delta in layers for s in factored_sums(a, delta, lambda t: t)]
            gates = None
            if gate is not None:
                sums = {"total": gradients}
                for name in set(sums_of(gate)) - {"total"}:
                    sums[name] = [s for a, delta in layers for s in factored_sums(a, delta, SUMS[name])]
                of_tensor = zip(*(sums[name] for name in sums_of(gate)), strict=True)
                gates = [gate(*tensors, batch_size=batch.shape[1], gamma=gammas) for tensors in of_tensor]
                first_gates = first_gates or gates
                gates = controlled(gates, control, first_gates, shuffles)
                if placement == "before":
                    gradients, gates = [g * own for g, own in zip(gradients, gates, strict=True)], None
            if method == "vote":
                gradients = [s.sign() for a, delta in layers for s in factored_sums(a, delta, torch.sign)]
            if method == "vote" and placement == "after":  # signSGD: the votes are the update, without Adam
                for p, votes in zip(parameters, gradients, strict=True):
                    p.sub_(votes * align_runs(rates, p))
            else:
                adam_step_(parameters, gradients, moments, rates, step, gates, weight_decay, method == "cautious")
            log["step_loss"].append(losses.detach())
            if probe_size:
                log["probe_loss"].append(losses_of(forward(parameters, probe[0])[1][-1], probe[1]))
        if epoch % evaluate_every == 0 or epoch == epochs:
            found = [values for k in (0, 2, 4) for values in evaluate(parameters, data[k], data[k + 1])]
            for name, values in zip(EPOCH_CURVES, found, strict=True):
                log[name].append(values)

    curves = {name: torch.stack(rows, 1).numpy() if rows else np.empty((n_runs, 0)) for name, rows in log.items()}
    fresh_loss, fresh_accuracy = evaluate(parameters, *fresh) if fresh else [torch.full((n_runs,), math.nan)] * 2
    return curves | {"fresh_loss": fresh_loss.numpy(), "fresh_accuracy": fresh_accuracy.numpy()}
