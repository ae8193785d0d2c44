"""The MNIST-1D paper's convolutional network, trained by the class `SGSC` on its own layers, as a user would."""

import torch
import torch.nn.functional as F
from torch import nn

from sgsc_lib import SGSC
from sgsc_study.data import Dataset


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
    data: Dataset, epochs: int, batch_size: int, seed: int, lr: float, gamma: float, placement: str
) -> dict[str, float]:
    """One run by torch.optim.Adam and SGSC; its final accuracy on the validation and the test rows.

    >>> from sgsc_study.data import load_mnist1d
    >>> list(train_cnn(load_mnist1d(100), 1, 16, seed=0, lr=0.01, gamma=0.25, placement="before"))
    ['valid', 'test']
    """
    model, order = mnist1d_cnn(seed), torch.Generator().manual_seed(seed)
    optimizer, sgsc = torch.optim.Adam(model.parameters(), lr=lr), SGSC(model, gamma) if gamma else None
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x_train), generator=order).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
            if sgsc and placement == "after":
                with sgsc.scaled_update():
                    optimizer.step()
                continue
            if sgsc:
                sgsc.scale_gradients_()
            optimizer.step()
    with torch.no_grad():
        parts = {"valid": data[2:4], "test": data[4:]}
        return {part: (model(x).argmax(1) == y).double().mean().item() for part, (x, y) in parts.items()}
