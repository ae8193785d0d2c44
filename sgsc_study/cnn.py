"""The MNIST-1D paper's convolutional network, trained by the class `SGSC` on its own layers, as a user would."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc_lib import SGSC
from sgsc_study.data import Dataset
from sgsc_study.optimizers import MOMENTUM
from sgsc_study.runs import Run


def mnist1d_cnn(seed: int) -> nn.Sequential:
    """Three Conv1d layers of 25 channels and a Linear layer (Greydanus & Kobak, arXiv 2011.14439), on [B, 40].

    >>> mnist1d_cnn(seed=0)(torch.zeros(2, 40)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convolutions = [nn.Conv1d(1, 25, 5, stride=2, padding=1), nn.ReLU()]
        for _ in range(2):
            convolutions += [nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(nn.Unflatten(1, (1, 40)), *convolutions, nn.Flatten(), nn.Linear(125, 10))


def train_cnn(
    run: Run, data: Dataset, fresh: tuple[Tensor, Tensor], epochs: int, batch_size: int
) -> dict[str, float]:
    """One run by torch's own optimizer and SGSC; its final accuracy on the validation, the test and the fresh rows.

    >>> from sgsc_study.data import load_mnist1d
    >>> data = load_mnist1d(100)
    >>> list(train_cnn(Run(0, 0.01, 0.25, "after"), data, data[4:], epochs=1, batch_size=16))
    ['valid_accuracy', 'test_accuracy', 'fresh_accuracy']
    """
    if (run.gate, run.control, run.label_smoothing) != ("sign", "none", 0) or run.optimizer not in ("adam", "sgd"):
        raise ValueError(f"`run` should be of SGSC's own gate, and of Adam or SGD. Found {run}.")
    model, order = mnist1d_cnn(run.seed), torch.Generator().manual_seed(run.seed)
    sgsc = SGSC(model, run.gamma) if run.gamma else None
    optimizer: torch.optim.Optimizer
    if run.optimizer == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=run.lr, momentum=MOMENTUM, nesterov=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(data.x_train) / batch_size))
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x_train), generator=order).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
            if run.optimizer == "sgd" and run.weight_decay:  # torch's SGD does not decouple it
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1 - optimizer.param_groups[0]["lr"] * run.weight_decay)
            if sgsc and run.placement == "before":
                sgsc.scale_gradients_()
            with sgsc.scaled_update() if sgsc and run.placement == "after" else nullcontext():
                optimizer.step()
            if run.schedule == "cosine":
                cosine.step()
    with torch.no_grad():
        parts = {"valid": data[2:4], "test": data[4:], "fresh": fresh}
        right = {part: model(x).argmax(1) == y for part, (x, y) in parts.items()}
    return {f"{part}_accuracy": round(found.double().mean().item(), 6) for part, found in right.items()}
