"""A call of a module in a forward pass: what went in, what came out, where its samples lie. And what hooks see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


class Axis(NamedTuple):
    """Where the samples lie in a tensor: an axis of B · `fold` entries, one sample's beside each other."""

    dim: int = 0
    fold: int = 1


def by_sample(tensor: Tensor, axis: Axis) -> Tensor:
    """[..., B · fold, ...] -> [B, ..., fold, ...], the samples in front."""
    return tensor.unflatten(axis.dim, (-1, axis.fold)).movedim(axis.dim, 0)


def in_front(tensor: Tensor, axis: Axis) -> Tensor:
    """The same as [B · fold, ...], or, if that is how it is, the tensor itself."""
    return tensor.movedim(axis.dim, 0) if axis.dim else tensor


_ONE_ARGUMENT = tree_flatten(((0,), {}))[1]


def flattened(args: tuple, kwargs: dict) -> tuple[list[Any], Any]:
    """`tree_flatten((args, kwargs))`, at once for what most modules get: one tensor."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return [args[0]], _ONE_ARGUMENT
    return tree_flatten((args, kwargs))


def rows_of(args: tuple, kwargs: dict) -> int | None:
    """How many samples a call has: the length of its first tensor, but for one of length 1 beside longer ones; None
    where it has no tensor with an axis."""
    lengths = [t.shape[0] for t in flattened(args, kwargs)[0] if isinstance(t, Tensor) and t.ndim]
    return next((n for n in lengths if n != 1), 1) if lengths else None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of an output: in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, list | tuple) else []


def behind(output: Tensor, call: Call) -> Tensor:
    """The tensor to hook for an output: itself, or, of a view that the module made, the tensor it is a view of.

    An operation in place behind a view, such as a ReLU's, would go round a hook on it.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel() or not base.is_contiguous():
        return output
    inputs = {call.leaves[k].untyped_storage().data_ptr() for k in call.tensors()}
    return output if base.untyped_storage().data_ptr() in inputs else base


def _device(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else tensor.device.type  # the first is told at once


def exactly(tensor: Tensor) -> AbstractContextManager:
    """Without autocast, which would multiply signs in bfloat16: that counts exactly only to 256."""
    kind = _device(tensor)
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


_NOTHING: AbstractContextManager = nullcontext()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers and attributes back: what a forward pass counts or keeps is the training's own."""
    kept = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    values = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, before in values:
                buffer.copy_(before)


class RandomState:
    """The random numbers that come next, on the CPU and on the devices of a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
        self.states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        for device, state in zip(self.devices, self.states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RandomState) and all(map(torch.equal, self.states, other.states))

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass
class Pass:
    """One forward pass of a hooked model: its samples, whether they count by now (its backward pass has given a
    parameter a gradient), whether it ran under autocast, and how often each module was called."""

    rows: int
    counted: bool = False
    autocast: bool = False
    calls: dict[str, int] = dataclasses.field(default_factory=dict)


class Call:
    """A call of a module, kept from its forward pass until the gradients are there."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        output: Any,
        this: Pass,
        before: RandomState | None,
    ) -> None:
        self.path, self.module, self.this, self.rows = path, module, this, this.rows
        self.names: set[str] = set()  # parameters whose sums still need the call
        self.rule: Any = None
        self.found: dict[str, Any] | None = None  # what the rule made of it
        self.known: dict[str, Any] = {}  # what is so of all calls like it, and shared by them
        leaves, self.spec = flattened(args, kwargs)
        self.versions = [t._version if isinstance(t, Tensor) else None for t in leaves]
        self.leaves = [t if v is None else t.detach() for t, v in zip(leaves, self.versions, strict=True)]
        outputs = tensors_in(output)
        self.errors: dict[int, Tensor] = {}  # at the outputs that have some
        self.axes, self.output_axes = [], []  # type: list[Axis | None], list[Axis | None]
        self.shapes = [t.shape for t in outputs]
        # the state before the call, and what came out, where it drew random numbers
        self.random = before if before is not None and before != RandomState(module) else None
        self.outputs, self.output_versions = [], []  # type: list[Tensor], list[int]
        if self.random is not None:
            self.outputs, self.output_versions = [t.detach() for t in outputs], [t._version for t in outputs]
        self.served = self.arrived = self.released = False
        device = _device(outputs[0]) if outputs else "cpu"
        self.autocast: dict[str, Any] = {"device_type": device, "enabled": torch.is_autocast_enabled(device)}
        if self.autocast["enabled"]:
            self.autocast |= {"dtype": torch.get_autocast_dtype(device), "cache_enabled": False}

    def release(self) -> None:
        """Let go of tensors, so that a loss that is kept does not keep every layer's input with it."""
        self.leaves, self.errors, self.outputs, self.released = [], {}, [], True

    def kind(self) -> tuple[int, list[Sequence[int]], list[torch.Size]]:
        """What its axes depend on: the number of samples, and the shapes at input and output, () of no tensor."""
        return self.rows, [t.shape if isinstance(t, Tensor) else () for t in self.leaves], self.shapes

    def place(self, looked: tuple[Sequence[Axis | None], Sequence[Axis | None]] | None) -> None:
        """Take the axes that a look at other samples found, where they fit what is here; else guess."""
        rows, inputs, outputs = self.kind()
        self.axes, self.output_axes = [_guess(s, rows) for s in inputs], [_guess(s, rows) for s in outputs]
        ends = (self.axes, inputs), (self.output_axes, outputs)  # type: Any
        for (own, sizes), found in zip(ends, looked or (), strict=False):
            if len(found) != len(sizes) or not rows:
                continue
            for k, (size, axis) in enumerate(zip(sizes, found, strict=True)):
                own[k] = None
                if axis is not None and axis.dim < len(size) and size[axis.dim] % rows == 0:
                    own[k] = axis if size[axis.dim] // rows == axis.fold else None

    def overwritten(self) -> bool:
        """Whether an input was changed in place after it was used."""
        return any(v is not None and t._version != v for t, v in zip(self.leaves, self.versions, strict=True))

    def tensors(self) -> list[int]:
        return [k for k, version in enumerate(self.versions) if version is not None]


def _guess(shape: Sequence[int], rows: int) -> Axis | None:
    """The first axis, where it is as long as the batch; of one sample, whatever there is."""
    if not len(shape) or not rows:
        return None
    return Axis(0, shape[0]) if rows == 1 else Axis() if shape[0] == rows else None


def is_close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, on the scale of the tensor."""
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    tolerance = 1e-5 if a.dtype == torch.float64 else 1e-3 if a.dtype == torch.float32 else 5e-2
    scale = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
    return torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


class Hook:
    """A hook on one module. A copy of the model does not report to SGSC, nor does one that was saved and loaded."""

    def __init__(self, function: Callable, module: nn.Module, path: str = "") -> None:
        self.function, self.module, self.path = function, module, path
        self.uncompiled = torch.compiler.disable(function)

    def __call__(self, called: nn.Module, *rest: Any) -> Any:
        if called is not self.module:
            return None
        function = self.uncompiled if torch.compiler.is_compiling() else self.function  # the first costs time
        return function(self.path, called, *rest)

    def __deepcopy__(self, _: dict) -> Hook:
        return self

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Gone, ()


class Gone:
    """What is left of a hook in a model that was saved and loaded."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass
