"""The per-sample gradients that a rule returns: a tensor [b, *shape], or what stands for one and is never built whole.

Σ_i f(g_i) is taken from the factors where f of a product is the product of f. Where a gradient is a sum of products it
is built, for as few samples at a time as a core's cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgsc_core.definition import factored_sums, statistic_dtype

BLOCK_ENTRIES = 2**18  # of gradients that are built at a time, but for one sample's: 1 MiB stays in a core's cache

Function = Callable[[Tensor], Tensor]


class Outer(NamedTuple):
    """Per-sample gradients δ_i a_iᵀ, [b, out, in], as their factors."""

    errors: Tensor  # [b, out]
    inputs: Tensor  # [b, in]

    def sums(self, *functions: Function) -> list[Tensor]:
        errors, inputs = (t.to(statistic_dtype(t)) for t in self)
        return [factored_sums(inputs, errors, f)[0] for f in functions]

    def build(self) -> Tensor:
        return self.errors.unsqueeze(2) * self.inputs.unsqueeze(1)


class Products(NamedTuple):
    """Per-sample gradients Σ_t δ_t a_tᵀ, [b, *shape], as their factors, each of some groups of channels by itself."""

    errors: Tensor  # [b · groups, out, T]
    inputs: Tensor  # [b · groups, T, in]
    groups: int
    shape: tuple[int, ...]  # of groups · out · in entries

    def sums(self, *functions: Function) -> list[Tensor]:
        if self.errors.shape[2] == 1:  # one product, whose sign factors
            factors = (t.reshape(-1, self.groups, t[0].numel()).transpose(0, 1) for t in (self.errors, self.inputs))
            return [total.view(self.shape) for total in Outer(*factors).sums(*functions)]
        totals: list[Tensor | None] = [None] * len(functions)
        for block in self.blocks():
            for k, f in enumerate(functions):  # the sign comes last
                totals[k] = _summed(block.sign_() if f is torch.sign else f(block), totals[k])
        return [total.view(self.shape) for total in totals if total is not None]

    def blocks(self) -> Iterator[Tensor]:
        """The gradients of some samples after another, [n, entries], in memory that the next block overwrites."""
        entries, left, right = math.prod(self.shape), self.errors, self.inputs
        rows = self.groups * max(1, BLOCK_ENTRIES // max(1, entries))
        held = left.new_empty(min(rows, len(left)), left.shape[1], right.shape[2])
        for start in range(0, len(left), rows):
            a, b = left[start : start + rows], right[start : start + rows]
            yield torch.bmm(a, b, out=held[: len(a)]).view(-1, entries)

    def joined(self, fold: int) -> Products:
        """The same where `fold` of the b rows are one sample's."""
        errors, inputs = (t.unflatten(0, (-1, fold, self.groups)) for t in self[:2])
        errors, inputs = errors.permute(0, 2, 3, 1, 4).flatten(3), inputs.transpose(1, 2).flatten(2, 3)
        return Products(errors.flatten(0, 1), inputs.flatten(0, 1), self.groups, self.shape)

    def build(self) -> Tensor:
        return torch.bmm(self.errors, self.inputs).view(-1, *self.shape)


class Rows(NamedTuple):
    """Per-sample gradients [b, rows, D] that are zero but in some rows, each (sample, row) pair once."""

    samples: Tensor  # [Q]
    rows: Tensor  # [Q]
    values: Tensor  # [Q, D]
    shape: tuple[int, int, int]  # b, rows, D

    def sums(self, *functions: Function) -> list[Tensor]:
        dtype = statistic_dtype(self.values)
        totals = [self.values.new_zeros(self.shape[1:], dtype=dtype) for _ in functions]
        return [total.index_add_(0, self.rows, f(self.values).to(dtype))
                for total, f in zip(totals, functions, strict=True)]  # fmt: skip

    def build(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_put_((self.samples, self.rows), self.values)


PerSample = Tensor | Outer | Products | Rows


def sums_of(gradients: PerSample, *before: Function) -> list[Tensor]:
    """Σ_i f(g_i), [*shape], for each f of `before`, and Σ_i sign(g_i); f(xy) = f(x) f(y).

    In float64 for float64 gradients, in float32 otherwise.
    """
    if isinstance(gradients, Tensor):
        return [f(gradients).sum(0, dtype=statistic_dtype(gradients)) for f in (*before, torch.sign)]
    return gradients.sums(*before, torch.sign)


def _summed(rows: Tensor, total: Tensor | None) -> Tensor:
    """The sum of rows [n, P], added to a total [1, P] in place."""
    if rows.is_cuda or rows.dtype != statistic_dtype(rows):
        found = rows.sum(0, keepdim=True, dtype=statistic_dtype(rows))
        return found if total is None else total.add_(found)
    ones = rows.new_ones(1, len(rows))  # a product is faster than a sum over the first axis on a CPU
    return ones @ rows if total is None else total.addmm_(ones, rows)


def built(gradients: PerSample) -> Tensor:
    """Every sample's own gradient as one tensor, [b, *shape]."""
    return gradients if isinstance(gradients, Tensor) else gradients.build()
