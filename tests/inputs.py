"""What the tests of SGSC work on: layers of a user's own, toy models, random architectures."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sgsc_lib import mlp

CLASSES = 3


class Made(nn.Module):
    """A module of the given layers and parameters; `compute(module, *inputs)` is its forward."""

    def __init__(self, compute: Any, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.compute(self, *inputs, **named)


def one(layer: nn.Module, compute: Any = lambda self, x: self.layer(x)) -> nn.Module:
    """A model of one layer, `self.layer`."""
    return Made(compute, layer=layer)


def scale(width: int) -> nn.Module:
    """A layer with a layer inside and a parameter used twice."""
    parts = {"scale": nn.Parameter(torch.randn(width)), "inner": nn.Linear(width, width)}
    return Made(lambda self, x: self.inner(x * self.scale) * self.scale, **parts)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model


def toy(batch: int = 12, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Like the toys below, a model with a batch: (model, x, y)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, generator=generator, dtype=dtype)
    return mlp((5, 7, 6, CLASSES), seed=0).to(dtype), x, torch.randint(CLASSES, (batch,), generator=generator)


def cnn(batch: int = 10) -> tuple[nn.Sequential, Tensor, Tensor]:
    """With a Linear on sequences, whose output is a view, and an operation in place behind it."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(1, 2),
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Flatten(), nn.Linear(96, CLASSES),
    )  # fmt: skip
    return model, torch.randn(batch, 2, 6, 6), torch.randint(CLASSES, (batch,))


def branches(batch: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of which a batch uses one branch: model(x, "a") or model(x, "b")."""
    torch.manual_seed(0)
    parts = {name: nn.Linear(5, CLASSES) for name in "ab"}
    return Made(lambda self, x, branch: getattr(self, branch)(x), **parts).double(), *toy(batch)[1:]


def batch_norm() -> tuple[nn.Sequential, Tensor, Tensor]:
    """With batch normalisation in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    model[1](torch.randn(20, 5, dtype=torch.float64))
    return model.eval(), *toy()[1:]


WIDTHS = st.integers(2, 6)
ACTIVATIONS = st.sampled_from([nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, nn.GELU])


def dense(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    """On vectors or on sequences."""
    width, length = draw(WIDTHS), draw(st.sampled_from([(), (1,), (2,), (4,)]))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 2))):
        block = [nn.Linear(width, width, bias=draw(st.booleans())), draw(ACTIVATIONS)()]
        residual = Made(lambda self, x: x + self.body(x), body=nn.Sequential(*block))
        layers += [residual] if draw(st.booleans()) else block
        layers += [nn.LayerNorm(draw(st.sampled_from([(width,), (*length, width)])))] if draw(st.booleans()) else []
    mean_over_time = Made(lambda self, x: x.mean(1))
    ends = [mean_over_time, nn.Flatten()] if length else [nn.Identity()]
    return [*layers, draw(st.sampled_from(ends))], torch.randn(batch, *length, width)


def convolution(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    kinds = [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2)]
    layer, axes = draw(st.sampled_from(kinds))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2))
    first = layer(
        channels, 4, kernel_size=draw(st.integers(1, 3)), stride=draw(st.integers(1, 2)), groups=groups,
        padding=draw(st.integers(0, 2)), dilation=draw(st.integers(1, 2)), bias=draw(st.booleans()),
        padding_mode="zeros" if layer.__name__.startswith("ConvT")
        else draw(st.sampled_from(["zeros", "circular", "replicate"])),
    )  # fmt: skip
    norm = draw(st.sampled_from([nn.GroupNorm(1, 4), nn.GroupNorm(2, 4), nn.PReLU(4)]))
    last = layer(4, 2, kernel_size=3, padding=1)
    x = torch.randn(batch, channels, *[draw(st.integers(5, 7)) for _ in range(axes)])
    return [first, norm, draw(ACTIVATIONS)(), last, nn.Flatten()], x


def tokens(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    size, width = draw(st.integers(2, 5)), draw(WIDTHS)  # so few tokens that a sample repeats some
    shape = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    embedding = nn.Embedding(size, width, padding_idx=draw(st.sampled_from([None, 0, -1])))
    layers = [embedding, nn.Linear(width, width), draw(ACTIVATIONS)(), nn.Flatten()]
    return layers, torch.randint(size, (batch, *shape))


def shared(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    """A layer that is used twice, and a weight that two layers share, on vectors or on sequences."""
    width, length = draw(WIDTHS), draw(st.sampled_from([(), (3,)]))
    parts = {"first": nn.Linear(width, width), "second": nn.Linear(width, width, bias=draw(st.booleans()))}
    parts["second"].weight = parts["first"].weight
    twice = Made(lambda self, x: self.second(self.first(self.first(x).tanh()).tanh()), **parts)
    return [twice, draw(ACTIVATIONS)(), nn.Flatten()], torch.randn(batch, *length, width)


def attention(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    """Attention on sequences, whose batch lies along either axis inside."""
    width, first = 2 * draw(st.integers(2, 3)), draw(st.booleans())
    # without the key's bias, whose gradient is zero but for rounding
    layer = nn.MultiheadAttention(width, draw(st.sampled_from([1, 2])), batch_first=first, bias=False)

    def attend(self, x):
        x = x if first else x.transpose(0, 1)
        y = self.norm(x + self.layer(x, x, x, need_weights=draw_weights)[0])
        return y if first else y.transpose(0, 1)

    draw_weights = draw(st.booleans())
    made = Made(attend, layer=layer, norm=nn.LayerNorm(width))
    return [made, nn.Linear(width, width), nn.Flatten()], torch.randn(batch, draw(st.integers(2, 4)), width)


def bare(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    """Parameters beside layers, and an embedding of positions: what all samples share, as many as samples or not."""
    width, length = draw(WIDTHS), draw(st.sampled_from([batch, 3]))
    parts = {"token": nn.Parameter(torch.randn(1, 1, width)), "positions": nn.Embedding(length, width)}
    parts |= {"scale": nn.Parameter(torch.randn(width)), "inner": nn.Linear(width, width)}

    def forward(self, x):
        x = self.inner(x + self.positions(torch.arange(length))) * self.scale
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1).tanh()

    return [Made(forward, **parts), nn.Flatten()], torch.randn(batch, length, width)


@st.composite
def problems(draw, dtype=torch.float64, least: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    """A random model with a batch of `least` to 9 samples for it: (model, x, y)."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    family = draw(st.sampled_from([dense, dense, convolution, tokens, shared, attention, bare]))
    layers, x = family(draw, draw(st.integers(least, 9)))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        features = model(x.clone()).shape[-1]
    model = model.append(nn.Linear(features, CLASSES)).to(dtype)
    return model, x.to(dtype) if x.is_floating_point() else x, torch.randint(CLASSES, (len(x),))
