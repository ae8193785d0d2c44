"""Σ_i sign(g_i) of a parameter, from the calls that used it: by the rules of its layers, or by running a module again.

Where a parameter was used several times, by one layer or by several that share it, a sample's gradient is the sum over
the uses, and its sign is taken after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sgsc_core.again import recomputed
from sgsc_core.calls import Call, in_front
from sgsc_core.checks import refuse_answer, refuse_overwritten
from sgsc_core.definition import factored_sums, statistic_dtype
from sgsc_core.gradients import Outer, PerSample, Products, built, sums_of
from sgsc_core.rules import (
    CHUNK_ENTRIES,
    RULES,
    bilinear_rule,
    convolution_rule,
    embedding_rule,
    layer_norm_rule,
    linear_rule,
    samples_at_once,
    transposed_convolution_rule,
    transposed_linear_rule,
)

# Rules that act on each position by itself, so that positions may stand anywhere between the first and the last axis.
POSITIONWISE = (linear_rule, transposed_linear_rule, layer_norm_rule, embedding_rule)


BYTES = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()  # it multiplies int8 fast


@dataclass
class Sums:
    """Of a parameter, over samples: Σ sign g_i; Σ g_i while it is checked; the number of g_i ≠ 0 where it counts."""

    sign: Tensor
    total: Tensor | None
    active: Tensor | None

    def __add__(self, other: Sums | None) -> Sums:
        if other is None:
            return self
        pairs = ((self.total, other.total), (self.active, other.active))
        return Sums(self.sign + other.sign, *(None if a is None or b is None else a + b for a, b in pairs))


@dataclass
class Summing:
    """How per-sample gradients are summed: with their total while something is unchecked, with a count where asked."""

    total: bool
    active: bool

    def __call__(self, gradients: PerSample) -> Sums:
        wanted = [f for f, on in ((_itself, self.total), (_active, self.active)) if on]
        *found, sign = sums_of(gradients, *wanted)
        total, active = found[0] if self.total else None, found[-1].sum(dtype=torch.float64) if self.active else None
        return Sums(sign, total, active)

    # -- by rules ------------------------------------------------------------------------------------------------------

    def of_layer(self, call: Call) -> dict[str, Sums]:
        """Of all parameters of a layer that was called once, by key."""
        total, operands = {}, self._operands(call)  # type: dict[str, Sums], Any
        for part in _cut(call.rule, call, operands):
            found = self._of_answer(call, _answer(call.rule, call, operands, part))
            total = {key: sums + total[key] for key, sums in found.items()} if total else found
        return total

    def _of_answer(self, call: Call, found: Mapping[str, PerSample]) -> dict[str, Sums]:
        """Of all that a rule gives, by key."""
        weight, bias = found.get("weight"), found.get("bias")
        if len(found) == 2 and isinstance(weight, Outer) and bias is weight.errors and not (self.total or self.active):
            sign, bias_sign = _signs_of(weight)  # the errors' signs are taken once
            return {"weight": Sums(sign, None, None), "bias": Sums(bias_sign, None, None)}
        own = {key: gradients for key, gradients in found.items() if call.module._parameters.get(key) is not None}
        return {key: self(g) for key, g in own.items()}

    def of_uses(self, uses: Sequence[tuple[Call, str]]) -> Sums | None:
        """Of one parameter, from the calls that used it and its key there."""
        rules = [call.rule for call, _ in uses]
        operands = [self._operands(call) for call, _ in uses]
        cuts = [_cut(rule, call, own) for rule, (call, _), own in zip(rules, uses, operands, strict=True)]
        of_one: Any = uses[0][0].module._parameters[uses[0][1]]  # which is built, for each sample
        built_at_once = max(1, CHUNK_ENTRIES // max(1, of_one.numel()))
        size, total = min(built_at_once, *(part.stop - part.start for cut in cuts for part in cut)), None
        for start in range(0, uses[0][0].rows, size):
            part = slice(start, start + size)
            gradients = [built(_answer(rule, call, own, part)[key])
                         for rule, (call, key), own in zip(rules, uses, operands, strict=True)]  # fmt: skip
            total = self(sum(gradients[1:], gradients[0])) + total
        return total

    def is_placed(self, call: Call) -> bool:
        """Whether a rule can tell a call's samples apart; an input that was overwritten is refused."""
        if call.overwritten():
            refuse_overwritten(call.path, call.module)
        if "placed" not in call.known:
            call.known["placed"] = self._fits(call)
        return call.known["placed"]

    def _fits(self, call: Call) -> bool:
        """Whether, at input and output, the samples lie along one axis, in front."""
        rule = call.rule
        axes = [call.axes[k] for k in call.tensors()]
        if len(call.shapes) != 1 or not axes or None in axes or call.output_axes != axes[:1]:
            return False
        if len(axes) > 1 and rule in RULES.values() and rule is not bilinear_rule:
            return False  # weights of bags, say
        dims, module = len(call.shapes[0]), call.module  # type: int, Any
        if dims < 2 or (rule in (convolution_rule, transposed_convolution_rule) and dims != module.weight.ndim):
            return False  # one sample without an axis for it
        return rule in POSITIONWISE or not any(axis and axis.dim for axis in axes)

    def _operands(self, call: Call) -> tuple[Any, Tensor, int]:
        """A rule's inputs and errors, [B · fold, ...], and the fold: 1 where positions may follow the samples."""
        axis: Any = call.output_axes[0]
        found = [in_front(call.leaves[k], call.axes[k] or axis) for k in call.tensors()]
        inputs: Any = found[0] if len(found) == 1 else tuple(found)
        errors = in_front(call.errors[0], axis)
        if axis.fold > 1 and call.rule in POSITIONWISE:
            return inputs.unflatten(0, (-1, axis.fold)), errors.unflatten(0, (-1, axis.fold)), 1
        return inputs, errors, axis.fold

    # -- by running a module again -------------------------------------------------------------------------------------

    def of_module(self, calls: Sequence[Call], parameters: Mapping[str, nn.Parameter]) -> dict[str, Sums]:
        """Of parameters of a module, by their names in it, from its calls in a pass."""
        if not calls[0].rows:
            return {}
        if any(call.overwritten() for call in calls):
            refuse_overwritten(calls[0].path, calls[0].module)
        streams: list[Iterator[dict[str, Tensor]]] = [
            (found for _, found in recomputed(call, parameters, CHUNK_ENTRIES)) for call in calls
        ]
        if len(calls) > 1:  # their parts may differ in size, so that whole batches are added up
            streams = [iter([_added(streams)])]
        total: dict[str, Sums] = {}
        confirmed = replace(self, total=True)  # in every batch, as a module may do something else when it runs again
        for found in streams[0]:
            for key, gradients in found.items():
                total[key] = confirmed(gradients) + total.get(key)
        return total


def _signs_of(weight: Outer) -> tuple[Tensor, Tensor]:
    """Σ_i sign(g_i) for the weight and the bias of a Linear layer on vectors."""
    a, delta = weight.inputs, weight.errors
    if a.is_cpu and BYTES and a.numel() * delta.shape[1] >= 2**22:  # else the casts cost more
        return _in_bytes(a, delta)
    return factored_sums(a, delta, _sign)


def _in_bytes(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """`factored_sums` of signs as int8, summed in int32: the same integers, by a product that is several times faster
    where the processor has instructions for it."""
    dtype, signs = statistic_dtype(delta), delta.sign().to(torch.int8)
    return torch._int_mm(signs.mT, a.sign().to(torch.int8)).to(dtype), signs.sum(0, dtype=dtype)


def _sign(tensor: Tensor) -> Tensor:
    signs, dtype = tensor.sign(), statistic_dtype(tensor)
    return signs if signs.dtype == dtype else signs.to(dtype)


def _cut(rule: Any, call: Call, operands: tuple[Any, Tensor, int]) -> list[slice]:
    """Parts of the batch, in samples."""
    if "at_once" not in call.known:
        inputs, errors, fold = operands
        call.known["at_once"] = max(1, samples_at_once(rule, call.module, inputs, errors) // fold)
    size = call.known["at_once"]
    return [slice(start, start + size) for start in range(0, call.rows, size)]


def _answer(rule: Any, call: Call, operands: tuple[Any, Tensor, int], part: slice) -> Mapping[str, PerSample]:
    """A rule's per-sample gradients of a part of the batch."""
    inputs, errors, fold = operands
    if part.stop - part.start < call.rows:
        rows = slice(part.start * fold, part.stop * fold)
        inputs = tuple(t[rows] for t in inputs) if isinstance(inputs, tuple) else inputs[rows]
        errors = errors[rows]
    found = rule(call.module, inputs, errors)
    if rule not in RULES.values():
        refuse_answer(call.path, call.module, found, len(errors))
    return found if fold == 1 else {key: _joined(g, fold) for key, g in found.items()}


def _joined(gradients: PerSample, fold: int) -> PerSample:
    """Of `fold` rows that are one sample's, their sum."""
    if isinstance(gradients, Products):
        return gradients.joined(fold)
    return built(gradients).unflatten(0, (-1, fold)).sum(1)


def _itself(t: Tensor) -> Tensor:
    return t


def _active(t: Tensor) -> Tensor:
    return t.ne(0).to(t.dtype)


def _added(streams: Sequence[Iterator[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The per-sample gradients of several calls of a module, added up, of the whole batch."""
    whole = []
    for stream in streams:
        found = list(stream)
        whole.append({key: torch.cat([each[key] for each in found]) for key in found[0]})
    return {key: sum((each[key] for each in whole[1:]), whole[0][key]) for key in whole[0]}
