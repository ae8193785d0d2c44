"""What the tests of SGSC work on: random architectures, toy models, layers of a user's own."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sgsc_lib import mlp

CLASSES = 3
OPTIMISERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


# -- layers of a user's own --------------------------------------------------------------------------------------------


class Made(nn.Module):
    """A module of the given layers and parameters; `compute(module, *inputs)` is its forward."""

    def __init__(self, compute: Any, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.compute(self, *inputs, **named)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def scale(width: int) -> nn.Module:
    """A layer with a layer inside and a parameter used twice."""
    parts = {"scale": nn.Parameter(torch.randn(width)), "inner": nn.Linear(width, width)}
    return Made(lambda self, x: self.inner(x * self.scale) * self.scale, **parts)


def offset() -> nn.Module:
    return Made(lambda self, x: x + self.offset, offset=nn.Parameter(torch.zeros(5)))


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model


# -- toy models, each with a batch: (model, x, y) ----------------------------------------------------------------------


def toy(batch: int = 12, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, generator=generator, dtype=dtype)
    return mlp((5, 7, 6, CLASSES), seed=0).to(dtype), x, torch.randint(CLASSES, (batch,), generator=generator)


def cnn(batch: int = 10) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(1, 2),
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(96, CLASSES),
    )  # fmt: skip
    return model, torch.randn(batch, 2, 6, 6), torch.randint(CLASSES, (batch,))


def branches(batch: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of which a batch uses one branch: model(x, "a") or model(x, "b")."""
    _, x, y = toy(batch)
    torch.manual_seed(0)
    parts = {name: nn.Linear(5, CLASSES) for name in "ab"}
    return Made(lambda self, x, branch: getattr(self, branch)(x), **parts).double(), x, y


def language_model() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(5)
    body = [nn.Embedding(9, 4), nn.LayerNorm(4), Residual(nn.Linear(4, 4), nn.ReLU(inplace=True)), MeanOverTime()]
    model = nn.Sequential(*body, nn.Linear(4, CLASSES)).double()
    return model, torch.randint(9, (6, 5)), torch.randint(CLASSES, (6,))


def batch_norm() -> tuple[nn.Sequential, Tensor, Tensor]:
    """With batch normalisation in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    model[1](torch.randn(20, 5, dtype=torch.float64))
    return model.eval(), *toy()[1:]


# -- random architectures ----------------------------------------------------------------------------------------------

WIDTHS = st.integers(2, 6)
ACTIVATIONS = st.sampled_from([nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, nn.GELU])


def dense(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    width = draw(WIDTHS)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 2))):
        block = [nn.Linear(width, width, bias=draw(st.booleans())), draw(ACTIVATIONS)()]
        layers += [Residual(*block)] if draw(st.booleans()) else block
        layers += [nn.LayerNorm(width)] if draw(st.booleans()) else []
    return layers, torch.randn(batch, width)


def sequence(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    width, length = draw(WIDTHS), draw(st.integers(1, 4))
    layers = [
        nn.Linear(width, width, bias=draw(st.booleans())),
        nn.LayerNorm(draw(st.sampled_from([(width,), (length, width)]))),
        Residual(nn.Linear(width, width), draw(ACTIVATIONS)(), nn.Linear(width, width)),
        draw(st.sampled_from([MeanOverTime, nn.Flatten]))(),
    ]
    return layers, torch.randn(batch, length, width)


def convolution(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    layer, axes = draw(st.sampled_from([(nn.Conv1d, 1), (nn.Conv2d, 2)]))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2))
    layers = [
        layer(
            channels, 4, kernel_size=draw(st.integers(1, 3)), stride=draw(st.integers(1, 2)), groups=groups,
            padding=draw(st.integers(0, 2)), dilation=draw(st.integers(1, 2)), bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from(["zeros", "circular", "replicate"])),
        ),
        nn.GroupNorm(draw(st.sampled_from([1, 2])), 4),
        draw(ACTIVATIONS)(),
        layer(4, 2, kernel_size=3, padding="same"),
        nn.Flatten(),
    ]  # fmt: skip
    return layers, torch.randn(batch, channels, *[draw(st.integers(5, 7)) for _ in range(axes)])


def tokens(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    size, width = draw(st.integers(2, 5)), draw(WIDTHS)  # so few tokens that a sample repeats some
    shape = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    embedding = nn.Embedding(size, width, padding_idx=draw(st.sampled_from([None, 0, -1])))
    layers = [embedding, nn.Linear(width, width), draw(ACTIVATIONS)(), nn.Flatten()]
    return layers, torch.randint(size, (batch, *shape))


@st.composite
def problems(draw, dtype=torch.float64, least: int = 1, most: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    """A random model with a batch of `least` to `most` samples for it: (model, x, y)."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    family = draw(st.sampled_from([dense, sequence, convolution, tokens]))
    layers, x = family(draw, draw(st.integers(least, most)))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        features = model(x.clone()).shape[-1]
    model = model.append(nn.Linear(features, CLASSES)).to(dtype)
    return model, x.to(dtype) if x.is_floating_point() else x, torch.randint(CLASSES, (len(x),))
