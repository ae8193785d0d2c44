"""The models of the benchmark, each with a batch: standard normal features or uniform tokens, uniform labels."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from zoo_torch import GPT

from sgsc_lib import mlp

Built = tuple[nn.Module, Tensor, Tensor]


def labelled(model: nn.Module, *shape: int) -> Built:
    return model, torch.randn(shape), torch.randint(10, shape[:1])


def mlp_on(batch_size: int, *widths: int) -> Built:
    return labelled(mlp(widths, seed=0), batch_size, widths[0])


def mnist1d_cnn() -> Built:
    """The convolutional network of the MNIST-1D paper (Greydanus & Kobak, arXiv 2011.14439)."""
    convolutions = (nn.Conv1d(1, 25, 5, 2, 1), nn.Conv1d(25, 25, 3, 2, 1), nn.Conv1d(25, 25, 3, 2, 1))
    with_relu = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    return labelled(nn.Sequential(nn.Unflatten(1, (1, 40)), *with_relu, nn.Flatten(), nn.Linear(125, 10)), 128, 40)


def cnn() -> Built:
    layers = []
    for into, out, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2)):
        layers += [nn.Conv2d(into, out, 3, stride, 1), nn.GroupNorm(8, out), nn.ReLU()]
    return labelled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)), 32, 3, 32, 32)


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def on_sequences(positions: int) -> Built:
    layers = (nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), MeanOverPositions(), nn.Linear(128, 10))
    return labelled(nn.Sequential(*layers), 32, positions, 128)


def gpt() -> Built:
    tokens = torch.randint(256, (2, 16, 64))
    return GPT(0.0, vocabulary=256, width=128, positions=64), *tokens


class BasicBlock(nn.Module):
    """As torchvision has it, but that no ReLU works in place, which Opacus's hooks do not allow."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.GroupNorm(32, out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(32, out)
        self.relu1, self.relu2, self.shortcut = nn.ReLU(), nn.ReLU(), nn.Identity()
        if (into, stride) != (out, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.GroupNorm(32, out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(h + self.shortcut(x))


def resnet18() -> Built:
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    widths = (64, 64, 128, 256, 512)
    stages = [block for into, out in pairwise(widths)
              for block in (BasicBlock(into, out, 1 if into == out else 2), BasicBlock(out, out, 1))]  # fmt: skip
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return labelled(nn.Sequential(*stem, *stages, *head), 16, 3, 32, 32)


MODELS: dict[str, Callable[[], Built]] = {
    "40-128-128-10": lambda: mlp_on(128, 40, 128, 128, 10),
    "784-1024-1024-10": lambda: mlp_on(512, 784, 1024, 1024, 10),
    "MNIST-1D CNN": mnist1d_cnn,
    "CNN with GroupNorm": cnn,
    "Linear on sequences": lambda: on_sequences(64),
    "small GPT": gpt,
    "resnet18 with GroupNorm": resnet18,
}


def build(make: Callable[[], Built]) -> Built:
    """The same model and batch at every call."""
    torch.manual_seed(0)
    return make()
