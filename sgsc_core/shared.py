"""What all samples share, such as positions or a class token: a sample's gradient is its part of the broadcast.

A tensor without an axis of samples meets them where it is added to something, or expanded. The error there still has
all samples; autograd sums it over the broadcast. So the error of that node in autograd's graph gives the tensor's
gradient of each sample, and nothing has to be run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sgsc_core.calls import Axis, Call, Pass

RESHAPES = {"UnsqueezeBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0"}
Shape = tuple[int, ...]


class Shared:
    """A bare parameter, or a layer's output, that all samples share: its gradient of each sample, [B, *shape]."""

    def __init__(self, shape: Sequence[int], this: Pass, call: Call | None = None) -> None:
        self.shape, self.this, self.call, self.rows = tuple(shape), this, call, this.rows
        self.path, self.names = call.path if call else "", set(call.names if call else ())
        self.errors: Any = None
        self.whole = True  # whether each of its uses is understood
        self.used = False

    def on_errors(self, axis: int, spread: list[int], errors: tuple[Tensor | None, ...]) -> None:
        """Add the error where the tensor met the samples along `axis`, and was broadcast along all of `spread`."""
        if errors[0] is not None:
            rest = [d for d in spread if d != axis]
            summed = errors[0].detach().sum(rest, keepdim=True) if rest else errors[0].detach()
            mine = summed.movedim(axis, 0).reshape(self.rows, *self.shape)
            self.errors = mine if self.errors is None else self.errors + mine

    def explains(self, calls: Sequence[Call]) -> bool:
        """Whether its uses are understood, and are all that there are."""
        return self.whole and self.errors is not None and (self.call is None or list(calls) == [self.call])

    def spread(self) -> Call:
        """The layer's call as if each sample had its own copy of the input."""
        call: Any = self.call
        if call.output_axes == [Axis()]:  # for another of the layer's parameters
            return call
        call.leaves = [t.expand(self.rows, *t.shape) if isinstance(t, Tensor) else t for t in call.leaves]
        call.errors, call.shapes = {0: self.errors}, [self.errors.shape]
        call.axes = [Axis() if isinstance(t, Tensor) else None for t in call.leaves]
        call.output_axes = [Axis()]
        return call

    def release(self) -> None:
        self.errors = None


def follow(outputs: Sequence[Tensor], wanted: Mapping[Any, Shared]) -> None:
    """Hook the nodes of autograd's graph where what the `wanted` nodes made meets the samples.

    A parameter's node is the one that adds to its gradient; its key is the parameter itself.
    """
    consumers: dict[Any, list[Any]] = {}
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for following, _ in node.next_functions:
            if following is not None:
                consumers.setdefault(getattr(following, "variable", following), []).append(node)
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
    for start, shared in wanted.items():
        shared.whole = start in consumers
        ways: list[tuple[Any, Shape]] = [(start, shared.shape)]
        while ways and shared.whole:
            at, shape = ways.pop()
            for node in consumers.get(at, ()):
                made = tuple(node._input_metadata[0].shape)  # of what the node's operation made in the forward pass
                if node.name() in RESHAPES or (node.name() == "AddBackward0" and made == shape):
                    ways.append((node, made))
                    continue
                short = (1,) * (len(made) - len(shape)) + shape
                spread = [d for d, after in enumerate(made) if after != short[d]]
                samples = [d for d in spread if made[d] == shared.rows]
                if node.name() not in ("AddBackward0", "ExpandBackward0") or len(samples) != 1:
                    shared.whole = False  # another operation, or it could be along several axes
                    break
                node.register_prehook(partial(shared.on_errors, samples[0], spread))
