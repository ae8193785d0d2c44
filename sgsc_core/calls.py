"""One call of a module in a forward pass: where its samples lie, and their gradients, by running the module again.

What no rule serves is recomputed: the module's function on one sample, whose gradient vmap takes for all of them. That
works for any module whose call is a function of its arguments and parameters, and keeps samples apart. Random
operations are repeated with the random numbers of the forward pass, which the outputs must confirm.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sgsc_core.checks import named, unobserved


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


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of an output: in tuples, lists, dicts, dataclasses and what has an attribute dict of them."""
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


@contextmanager
def exactly(*tensors: Tensor) -> Iterator[None]:
    """Neither a graph nor autocast, which would multiply signs in bfloat16: that counts exactly only to 256."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {t.device.type for t in tensors}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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


class Call:
    """A call of a module, kept from its forward pass until the gradients are there."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        output: Any,
        this: Any,
        before: RandomState | None,
    ) -> None:
        self.path, self.module, self.this, self.rows = path, module, this, this.rows
        self.names: set[str] = set()  # parameters whose sums still need the call
        self.found: dict[str, Any] | None = None  # what a rule made of it
        leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves: list[Any] = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        self.versions = [t._version if isinstance(t, Tensor) else 0 for t in leaves]
        outputs = tensors_in(output)
        self.errors: dict[int, Tensor] = {}  # at the outputs that have some
        self.axes: list[Axis | None] = [self._guess(t) for t in self.leaves]
        self.output_axes: list[Axis | None] = [self._guess(t) for t in outputs]
        self.shapes = [t.shape for t in outputs]
        # the state before the call, and what came out, where it drew random numbers
        self.random = before if before is not None and before != RandomState(module) else None
        self.outputs = [t.detach() for t in outputs] if self.random is not None else []
        self.output_versions = [t._version for t in self.outputs]
        device = outputs[0].device.type if outputs else "cpu"
        self.autocast = {"device_type": device, "enabled": torch.is_autocast_enabled(device), "cache_enabled": False,
                         "dtype": torch.get_autocast_dtype(device)}  # fmt: skip
        self.served = self.arrived = self.released = False

    def release(self) -> None:
        """Let go of tensors, so that a loss that is kept does not keep every layer's input with it."""
        self.leaves, self.errors, self.outputs, self.released = [], {}, [], True

    def _guess(self, leaf: Any) -> Axis | None:
        return Axis() if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == self.rows else None

    def place(self, looked: tuple[Sequence[Axis | None], Sequence[Axis | None]]) -> None:
        """Take the axes that a look at other samples found, where they fit what is here."""
        shapes = [t.shape if isinstance(t, Tensor) else () for t in self.leaves]
        for own, sizes, found in ((self.axes, shapes, looked[0]), (self.output_axes, self.shapes, looked[1])):
            if len(found) != len(sizes) or not self.rows:
                continue
            for k, (size, axis) in enumerate(zip(sizes, found, strict=True)):
                own[k] = None
                if axis is not None and axis.dim < len(size) and size[axis.dim] % self.rows == 0:
                    fold = size[axis.dim] // self.rows
                    own[k] = Axis(axis.dim, fold) if fold == 1 or axis.fold > 1 else None

    def overwritten(self) -> bool:
        """Whether an input was changed in place after it was used."""
        return any(t._version != v for t, v in zip(self.leaves, self.versions, strict=True) if isinstance(t, Tensor))

    def tensors(self) -> list[int]:
        return [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]


# -- the gradients of single samples, by running the module again ------------------------------------------------------


class _Again:
    """A call's function of parameters, of one sample's inputs and of the errors at its outputs."""

    def __init__(self, call: Call, parameters: Mapping[str, Tensor]) -> None:
        self.call, module = call, call.module
        self.rest = {name: p.detach() for name, p in module.named_parameters() if name not in parameters}
        self.rest |= {name: b.clone() for name, b in module.named_buffers()}
        self.batched = [k for k in call.tensors() if call.axes[k] is not None]
        spread = [k for k in call.errors if call.output_axes[k] is not None]
        self.ends = spread or list(call.errors)  # a loss among the outputs is made of them, or stands alone
        if not spread and not (self.batched and all(call.errors[k].ndim == 0 for k in self.ends)):
            raise ValueError(f"no axis of {named(call.path, module)} holds the samples")

    def outputs(self, parameters: Mapping[str, Tensor], batched: Sequence[Tensor]) -> list[Tensor]:
        leaves = list(self.call.leaves)
        for k, tensor in zip(self.batched, batched, strict=True):
            leaves[k] = tensor
        args, kwargs = tree_unflatten(leaves, self.call.spec)
        with torch.autocast(**self.call.autocast):
            made = torch.func.functional_call(self.call.module, dict(parameters) | self.rest, args, kwargs)
        found = tensors_in(made)
        return [found[k] for k in self.ends]

    def inner_product(self, parameters: dict, batched: Sequence[Tensor], errors: Sequence[Tensor]) -> tuple:
        """Its gradient is the module's vector-Jacobian product with the errors."""
        outputs = self.outputs(parameters, batched)
        return sum((t * e).sum() for t, e in zip(outputs, errors, strict=True)), outputs

    def by_sample(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and errors, each [B, ...]."""
        call = self.call
        inputs = [by_sample(call.leaves[k], axis) for k in self.batched if (axis := call.axes[k])]
        errors = [by_sample(call.errors[k], axis) if (axis := call.output_axes[k]) else
                  (call.errors[k] / call.rows).expand(call.rows, *call.errors[k].shape) for k in self.ends]  # fmt: skip
        return inputs, errors

    def reproduced(self, outputs: Sequence[Tensor]) -> bool:
        """Whether outputs [B, ...] are those of the forward pass."""
        for k, found in zip(self.ends, outputs, strict=True):
            axis, expected = self.call.output_axes[k], self.call.outputs[k]
            if expected._version != self.call.output_versions[k]:
                return False  # changed since, so that nothing confirms it
            if axis is not None and not _close(found, by_sample(expected, axis)):
                return False
        return True


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, on the scale of the tensor."""
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    tolerance = 1e-5 if a.dtype == torch.float64 else 1e-3 if a.dtype == torch.float32 else 5e-2
    scale = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
    return torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def recomputed(
    call: Call, parameters: Mapping[str, nn.Parameter], entries: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The per-sample gradients of some of a module's parameters, {name: [b, *shape]}, for parts of the batch in order.

    `entries` bounds what is held at once. Raises ValueError by the module's name where a random operation cannot be
    repeated.
    """
    again = _Again(call, parameters)
    constant = {name: p.detach() for name, p in parameters.items()}
    size = max(1, entries // max(1, sum(p.numel() for p in parameters.values())))
    with torch.enable_grad(), unobserved(), ExitStack() as stack:
        if call.random is not None:
            stack.enter_context(torch.random.fork_rng(call.random.devices))
            call.random.restore()
            size = call.rows  # the numbers of all samples come in one stream
        done = 0
        try:
            for part, found in _by_vmap(again, constant, size):
                yield part, found
                done = part.stop
            return
        except (_Unlike, RuntimeError, NotImplementedError, ValueError, TypeError):
            if done:
                raise
        way = _by_loop if call.random is None else _by_masks
        warn_slow(call, way)
        if call.random is not None:
            call.random.restore()
        yield from way(again, constant)


class _Unlike(Exception):
    """A module that ran again gave other outputs."""


_warned: set[tuple[str, type]] = set()


def warn_slow(call: Call, way: Any) -> None:
    kind = (call.path, type(call.module))
    if kind not in _warned:
        _warned.add(kind)
        each = "a backward pass of the whole batch for each sample" if way is _by_masks else "a pass for each sample"
        warnings.warn(
            f"SGSC recomputes {named(call.path, call.module)} by {each}: vmap cannot run it as the forward pass did.",
            stacklevel=2,
        )


def _by_vmap(again: _Again, constant: dict[str, Tensor], size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    inputs, errors = again.by_sample()
    gradient = torch.func.vmap(
        torch.func.grad(again.inner_product, has_aux=True), (None, 0, 0), randomness="different"
    )
    for start in range(0, again.call.rows, size):
        part = slice(start, start + size)
        found, outputs = gradient(constant, [t[part] for t in inputs], [e[part] for e in errors])
        if again.call.random is not None and not again.reproduced(outputs):
            raise _Unlike
        yield part, found


def _by_loop(again: _Again, constant: dict[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    inputs, errors = again.by_sample()
    own = {name: t.clone().requires_grad_() for name, t in constant.items()}
    for i in range(again.call.rows):
        value, _ = again.inner_product(own, [t[i] for t in inputs], [e[i] for e in errors])
        found = torch.autograd.grad(value, list(own.values()), allow_unused=True, materialize_grads=True)
        yield slice(i, i + 1), {name: g.unsqueeze(0) for name, g in zip(own, found, strict=True)}


def _by_masks(again: _Again, constant: dict[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The whole batch once more, and backward from one sample's errors at a time."""
    call = again.call
    own = {name: t.clone().requires_grad_() for name, t in constant.items()}
    outputs = again.outputs(own, [call.leaves[k] for k in again.batched])
    for k, found in zip(again.ends, outputs, strict=True):
        whole = call.outputs[k]
        if whole._version == call.output_versions[k] and not _close(found.detach(), whole):
            raise ValueError(
                f"{named(call.path, call.module)} should compute the same when it is run again with the same random "
                "numbers. Found other outputs. Draw its random numbers by torch's own generator, or freeze it."
            )
    for i in range(call.rows):
        masked = []
        for k in again.ends:
            axis, errors = call.output_axes[k], call.errors[k]
            if axis is None:
                raise ValueError(f"{named(call.path, call.module)} should keep samples apart in its outputs.")
            one = torch.zeros_like(errors)
            own_rows = (slice(None),) * axis.dim + (slice(i * axis.fold, (i + 1) * axis.fold),)
            one[own_rows] = errors[own_rows]
            masked.append(one)
        found = torch.autograd.grad(outputs, list(own.values()), masked, retain_graph=True, allow_unused=True,
                                    materialize_grads=True)  # fmt: skip
        yield slice(i, i + 1), {name: g.unsqueeze(0) for name, g in zip(own, found, strict=True)}
