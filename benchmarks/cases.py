"""What an architecture of the zoo is: a model with a batch for it, and the losses. It needs torch alone.

A builder is entered in `ARCHITECTURES` under "library: name". It takes the dropout rate and returns a `Case`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, VOCABULARY, TOKENS, BATCH = 10, 50, 8, 16


class Case(NamedTuple):
    """A model and a batch, the samples first: one tensor, a tuple of inputs, or a dict of keyword inputs."""

    model: nn.Module
    x: Any
    y: Tensor
    loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    way_out: Callable[[nn.Module], object] | None = (
        None  # of a refusal that is expected: done to the model, it is served
    )


ARCHITECTURES: dict[str, Callable[[float], Case]] = {}


def entry(name: str) -> Callable:
    def enter(builder: Callable) -> Callable:
        ARCHITECTURES[name] = builder
        return builder

    return enter


# ---- Batches and losses ----------------------------------------------------------------------------------------------


def images(model: nn.Module, size: int = 32, **more: Any) -> Case:
    return Case(model, torch.randn(BATCH, 3, size, size), torch.randint(CLASSES, (BATCH,)), **more)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, TOKENS))


def by_logits(output: Any, y: Tensor) -> Tensor:
    """The mean over samples, for a class or for a class at each position."""
    return F.cross_entropy(output.logits.flatten(0, -2), y.flatten())


def next_tokens(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())
