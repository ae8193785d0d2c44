"""Architectures of torch alone, as zoo.py has those of other libraries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import BATCH, CLASSES, VOCABULARY, Case, entry, next_tokens, tokens
from torch import Tensor, nn


class Classifier(nn.Module):
    """Embedded tokens, a body that keeps their number, their mean, a class."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(VOCABULARY, 32), body, nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embedding(x))
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


def sequence(body: nn.Module) -> Case:
    return Case(Classifier(body), tokens(), torch.randint(CLASSES, (BATCH,)))


@entry("torch: TransformerEncoder")
def _(dropout: float) -> Case:
    return sequence(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True), 2))


@entry("torch: MultiheadAttention")
def _(dropout: float) -> Case:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(32, 4, dropout, batch_first=True), nn.LayerNorm(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.attention(x, x, x)[0])

    return sequence(Attention())


@entry("torch: LSTM")
def _(dropout: float) -> Case:
    return sequence(nn.LSTM(32, 32, 2, batch_first=True, dropout=dropout))


@entry("torch: GRU")
def _(dropout: float) -> Case:
    return sequence(nn.GRU(32, 32, 2, batch_first=True, dropout=dropout))


class Block(nn.Module):
    def __init__(self, dropout: float, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.projection, self.dropout = nn.Linear(width, 3 * width), nn.Linear(width, width), dropout
        into, out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(into, nn.GELU(), out, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.projection(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """nanoGPT's plan: positions by arange, the head tied to the embedding."""

    def __init__(self, dropout: float, vocabulary: int = VOCABULARY, width: int = 32, positions: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.dropout, self.blocks = nn.Dropout(dropout), nn.Sequential(Block(dropout, width), Block(dropout, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.dropout(self.tokens(x) + self.positions(positions)))))


@entry("torch: nanoGPT")
def _(dropout: float) -> Case:
    return Case(GPT(dropout), tokens(), tokens(), next_tokens)


class UNet(nn.Module):
    """Down and up again, with skip connections: a class at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.twice(3, 16), self.twice(16, 32)])
        self.bottom = self.twice(32, 64)
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.merge = nn.ModuleList([self.twice(64, 32), self.twice(32, 16)])
        self.head = nn.Conv2d(16, CLASSES, 1)

    @staticmethod
    def twice(into: int, out: int) -> nn.Module:
        layers = [(nn.Conv2d(c, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU(inplace=True)) for c in (into, out)]
        return nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


@entry("torch: U-Net")
def _(dropout: float) -> Case:
    return Case(UNet(), torch.randn(BATCH, 3, 16, 16), torch.randint(CLASSES, (BATCH, 16, 16)))


class GraphNet(nn.Module):
    """Graph convolutions on a batch of graphs with dense adjacencies."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 32), nn.Linear(32, 32)])
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(32, CLASSES)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = self.dropout(F.relu(adjacency @ layer(nodes)))
        return self.head(nodes.mean(1))


@entry("torch: graph convolutions")
def _(dropout: float) -> Case:
    x = torch.randn(BATCH, 6, 12), torch.rand(BATCH, 6, 6).softmax(-1)
    return Case(GraphNet(dropout), x, torch.randint(CLASSES, (BATCH,)))
