"""What all samples share, such as positions or a class token: a sample's gradient is its part of the broadcast.

A tensor without an axis of samples meets them where it is added to something, or expanded. The error there still has
all samples; autograd sums it over the broadcast. So the error of that node in autograd's graph gives the tensor's
gradient of each sample, and nothing has to be run again. Which axis holds the samples there, the look at two of them
tells: the one that doubles with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from sgsc_core.calls import Axis, Call, Pass

RESHAPES = {"UnsqueezeBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0"}
Shape = tuple[int, ...]


class Meeting(NamedTuple):
    """A node of autograd's graph where a tensor of one shape was broadcast to another."""

    node: Any
    before: Shape
    made: Shape


def meetings(outputs: Sequence[Tensor], starts: Mapping[Any, Shape]) -> dict[Any, list[Meeting]]:
    """Where each of some tensors is broadcast, in the graph of a model's outputs; left out is one that does more.

    A tensor is told by the node that made it; a parameter by itself.
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
    found: dict[Any, list[Meeting]] = {}
    for start, first in starts.items():
        ways, met = [(start, tuple(first))], list[Meeting]()
        for at, shape in ways:  # it grows
            for node in consumers.get(at, ()):
                made = tuple(node._input_metadata[0].shape)  # of what the node's operation made in the forward pass
                if node.name() in RESHAPES or (node.name() == "AddBackward0" and made == shape):
                    ways.append((node, made))
                elif node.name() in ("AddBackward0", "ExpandBackward0") and getattr(node, "_saved_alpha", 1) == 1:
                    met.append(Meeting(node, shape, made))
                else:
                    met.append(Meeting(None, shape, made))
        if met and all(meeting.node is not None for meeting in met):
            found[start] = met
    return found


class Shared:
    """A bare parameter, or a layer's output, that all samples share: its gradient of each sample, [B, *shape]."""

    def __init__(self, names: set[str], shape: Sequence[int], this: Pass, call: Call | None = None) -> None:
        self.names, self.shape, self.this, self.call, self.rows = set(names), tuple(shape), this, call, this.rows
        self.path = call.path if call else ""
        self.errors: Any = None
        self.used = False

    def follow(self, met: Sequence[Meeting], axes: Sequence[int], on_arrival: Callable[[Shared], None]) -> None:
        """Hook the nodes where it meets the samples, which lie along these axes."""
        if any(meeting.made[axis] != self.rows for meeting, axis in zip(met, axes, strict=True)):
            return
        for (node, before, made), axis in zip(met, axes, strict=True):
            before = (1,) * (len(made) - len(before)) + before
            rest = [d for d, size in enumerate(made) if size != before[d] and d != axis]
            node.register_prehook(partial(self.on_errors, axis, rest, on_arrival))

    def on_errors(self, axis: int, rest: list[int], on_arrival: Callable, errors: tuple[Tensor | None, ...]) -> None:
        if errors[0] is not None:
            summed = errors[0].detach().sum(rest, keepdim=True) if rest else errors[0].detach()
            mine = summed.movedim(axis, 0).reshape(self.rows, *self.shape)
            self.errors = mine if self.errors is None else self.errors + mine
            on_arrival(self)

    def explains(self, calls: Sequence[Call]) -> bool:
        """Whether its uses are all that there are."""
        return self.call is None or list(calls) == [self.call]

    def spread(self) -> Call:
        """The layer's call as if each sample had its own copy of the input."""
        call: Any = self.call
        if call.output_axes == [Axis()]:  # for another of the layer's parameters
            return call
        call.leaves = [t.expand(self.rows, *t.shape) if isinstance(t, Tensor) else t for t in call.leaves]
        call.errors, call.shapes = {0: self.errors}, [self.errors.shape]
        call.axes = [Axis() if isinstance(t, Tensor) else None for t in call.leaves]
        call.output_axes, call.known = [Axis()], {}
        return call

    def release(self) -> None:
        self.errors = None


def follow(recorder: Any, this: Pass, outputs: Sequence[Tensor]) -> None:
    """For a `Recorder`: follow what its calls without samples made, and bare parameters, to where samples are met."""
    wanted: dict[Any, tuple[Any, Shared]] = {}
    for node, number, call in recorder.lone:
        wanted[node] = (call.path, number), Shared(call.names, call.shapes[0], this, call)
    for name, way in recorder.ways.items():
        if way.again is not None and (way.shared or name in recorder.unchecked) and name in recorder.look.met:
            wanted[way.parameter] = name, Shared({name}, way.parameter.shape, this)
    met = meetings(outputs, {start: shared.shape for start, (_, shared) in wanted.items()}) if wanted else {}
    for start, (key, shared) in wanted.items():
        if len(met.get(start, ())) == len(recorder.look.met.get(key, ())) > 0:
            shared.follow(met[start], recorder.look.met[key], recorder.on_shared)
