"""The gradients of single samples, by running a module again.

What no rule serves is recomputed: the module's function on one sample, whose gradient vmap takes for all of them. That
works for any module whose call is a function of its arguments and parameters, and keeps samples apart. Random
operations are repeated with the random numbers of the forward pass, which the outputs must confirm.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_unflatten

from sgsc_core.calls import Call, as_it_was, by_sample, is_close, tensors_in
from sgsc_core.checks import named, unobserved


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
            if axis is not None and not is_close(found, by_sample(expected, axis)):
                return False
        return True


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
    with torch.enable_grad(), unobserved(), as_it_was(call.module), ExitStack() as stack:
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
        warn_slow(call, parameters, way)
        if call.random is not None:
            call.random.restore()
        yield from way(again, constant)


class _Unlike(Exception):
    """A module that ran again gave other outputs."""


_warned: set[tuple] = set()


def warn_slow(call: Call, names: Iterable[str], way: Any) -> None:
    kind = (call.path, type(call.module), *names)
    if kind not in _warned:
        _warned.add(kind)
        each = f"{call.rows} backward passes of the batch" if way is _by_masks else f"{call.rows} passes of one sample"
        warnings.warn(
            f"SGSC runs {named(call.path, call.module)} again for {', '.join(names)}, by {each}: vmap cannot run it as "
            "the forward pass did. Faster: no dropout inside a recurrent or attention layer; a bare parameter in a "
            "small module of its own, or as an nn.Embedding.",
            stacklevel=2,
        )


def _by_vmap(again: _Again, constant: dict[str, Tensor], size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    inputs, errors = again.by_sample()
    gradient = torch.func.vmap(torch.func.grad(again.inner_product, has_aux=True), (None, 0, 0), randomness="different")
    for start in range(0, again.call.rows, size):
        part = slice(start, start + size)
        found, outputs = gradient(constant, [t[part] for t in inputs], [e[part] for e in errors])
        if again.call.random is not None and not again.reproduced(outputs):
            raise _Unlike
        yield part, found


def _by_loop(again: _Again, constant: dict[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    inputs, errors = again.by_sample()
    own = {name: t.clone().requires_grad_() for name, t in constant.items()}
    with _reparametrize_module(
        again.call.module, own | again.rest, tie_weights=True
    ):  # for a checkpoint's backward too
        for i in range(again.call.rows):
            value, _ = again.inner_product(own, [t[i] for t in inputs], [e[i] for e in errors])
            value.backward()  # reentrant checkpoints refuse autograd.grad
            yield slice(i, i + 1), _taken(own)


def _taken(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One sample's gradients, [1, *shape], which are cleared."""
    found = {name: (torch.zeros_like(t) if t.grad is None else t.grad).unsqueeze(0) for name, t in own.items()}
    for t in own.values():
        t.grad = None
    return found


def _by_masks(again: _Again, constant: dict[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The whole batch once more, and backward from one sample's errors at a time."""
    call = again.call
    own = {name: t.clone().requires_grad_() for name, t in constant.items()}
    with _reparametrize_module(call.module, own | again.rest, tie_weights=True):
        outputs = again.outputs(own, [call.leaves[k] for k in again.batched])
        for k, output in zip(again.ends, outputs, strict=True):
            whole = call.outputs[k]
            if whole._version == call.output_versions[k] and not is_close(output.detach(), whole):
                raise ValueError(
                    f"{named(call.path, call.module)} should compute the same when it is run again with the same "
                    "random numbers. Found other outputs. Draw random numbers by torch's own generator, or freeze it."
                )
        for i in range(call.rows):
            torch.autograd.backward(outputs, [_of_sample(call, k, i) for k in again.ends], retain_graph=True)
            yield slice(i, i + 1), _taken(own)


def _of_sample(call: Call, k: int, i: int) -> Tensor:
    """The errors at an output, where they are of sample i, and zeros."""
    axis, errors = call.output_axes[k], call.errors[k]
    if axis is None:
        raise ValueError(f"{named(call.path, call.module)} should keep samples apart in its outputs.")
    one, rows = torch.zeros_like(errors), (slice(None),) * axis.dim + (slice(i * axis.fold, (i + 1) * axis.fold),)
    one[rows] = errors[rows]
    return one
