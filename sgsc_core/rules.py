"""Rules: the gradients of single samples for one kind of layer, from its input and the error at its output.

A rule is a function (module, inputs, errors) -> {parameter's key: every sample's own gradient}, for a part of the
batch. `inputs` A is [b, ...], a tuple of such where the layer takes several tensors; `errors` Δ, the gradient at its
output, is [b, ...]. A gradient is a tensor [b, *shape], or stands for one (`gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc_core.definition import per_sample_gradients
from sgsc_core.gradients import Outer, PerSample, Products, Rows, built, sums_of  # noqa: F401 - offered here too

CHUNK_ENTRIES = 2**19  # of per-sample gradients held at once, but for one sample's: 2 MiB

Rule = Callable[[Any, Any, Tensor], Mapping[str, PerSample]]


def holds(entries: Callable[[Any, Any], int]) -> Callable[[Rule], Rule]:
    """Say how many entries a rule builds for one sample, from (module, inputs): the batch is cut by that number.

    A rule that does not say is taken to build all entries of its module's own parameters.
    """

    def mark(rule: Any) -> Rule:
        rule.entries = entries
        return rule

    return mark


def samples_at_once(rule: Any, module: nn.Module, inputs: Any, errors: Tensor) -> int:
    """So many that neither the gradients that a rule builds nor the activations exceed CHUNK_ENTRIES."""
    entries = getattr(rule, "entries", _own_entries)(module, inputs)
    n = errors.shape[0]
    return max(1, CHUNK_ENTRIES // max(entries, errors.numel() // n)) if entries else n


def _own_entries(module: nn.Module, _: Any) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _vectors(inputs: Tensor) -> bool:
    return inputs.ndim == 2 or math.prod(inputs.shape[1:]) == inputs.shape[-1]  # one outer product a sample


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(len(tensor), -1)


def _steps(tensor: Tensor, last: int = 1) -> Tensor:
    """[b, ..., *shape] -> [b, T, *shape], where `shape` has `last` axes."""
    return tensor.reshape(len(tensor), -1, *tensor.shape[tensor.ndim - last :])


# -- layers that multiply by a matrix ----------------------------------------------------------------------------------


@holds(lambda *_: 0)
def linear_rule(module: nn.Linear, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.Linear`: factors on [b, in]. On [b, ..., in] a sample's gradient is a sum of outer products, whose sign does
    not factor: it is built, some samples at a time.

    >>> a, delta = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[0.5], [0.1]])
    >>> sums_of(linear_rule(nn.Linear(2, 1), a, delta)["weight"])
    [tensor([[ 2., -1.]])]
    """
    if _vectors(inputs):
        a, delta = _flat(inputs), _flat(errors)
        return {"weight": Outer(delta, a if a.dtype == delta.dtype else a.to(delta.dtype)), "bias": delta}
    a, delta = _steps(inputs), _steps(errors)  # [b, T, in], [b, T, out]
    shape = delta.shape[2], a.shape[2]
    return {"weight": Products(delta.mT, a.to(delta.dtype), 1, shape), "bias": delta.sum(1)}


@holds(lambda *_: 0)
def transposed_linear_rule(module: Any, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`Conv1D` of the package transformers: a Linear layer whose weight is [in, out]."""
    found = linear_rule(module, inputs, errors)
    weight: Any = found["weight"]
    if isinstance(weight, Outer):
        turned: PerSample = Outer(weight.inputs, weight.errors)
    else:
        turned = Products(weight.inputs.mT, weight.errors.mT, 1, weight.shape[::-1])
    return {"weight": turned, "bias": found["bias"]}


def bilinear_rule(module: nn.Bilinear, inputs: tuple[Tensor, Tensor], errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.Bilinear`, on two tensors [b, ..., in]."""
    left, right, delta = (_steps(t) for t in (*inputs, errors))
    return {"weight": torch.einsum("bto,bti,btj->boij", delta, left, right), "bias": delta.sum(1)}


def _held_by_convolution(module: Any, inputs: Tensor) -> int:
    steps = [1] * len(module.stride) if module.transposed else module.stride
    positions = math.prod(-(-size // step) for size, step in zip(inputs.shape[2:], steps, strict=True))  # about as many
    return module.in_channels * math.prod(module.kernel_size) * positions


@holds(_held_by_convolution)
def convolution_rule(module: Any, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.Conv1d` to `nn.Conv3d`: a Linear layer on the patches of its input, so that a sample's gradient is one
    product of its errors [out, L] and its patches [L, in · kernel], a group at a time.

    >>> a, delta = torch.tensor([[[1.0, 2.0, -5.0]]]), torch.tensor([[[1.0, 1.0]]])
    >>> built(convolution_rule(nn.Conv1d(1, 1, kernel_size=2), a, delta)["weight"])  # 1 + 2 and 2 - 5
    tensor([[[[ 3., -3.]]]])
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs.to(errors.dtype), module._reversed_padding_repeated_twice, mode=mode)
    return {"weight": _patch_products(module, padded, errors), "bias": errors.flatten(2).sum(2)}


@holds(_held_by_convolution)
def transposed_convolution_rule(module: Any, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.ConvTranspose1d` to `nn.ConvTranspose3d`: a convolution with input and output exchanged."""
    padding = [side for one in reversed(module.padding) for side in (one, one)]
    products = _patch_products(module, F.pad(errors, padding), inputs.to(errors.dtype))
    return {"weight": products, "bias": errors.flatten(2).sum(2)}


def _patch_products(module: Any, image: Tensor, positions: Tensor) -> Products:
    """Σ over positions l of positions[:, o, l] · (the patch of the image at l)[c, k]: [b, *weight.shape]."""
    weight, groups, n = module.weight, module.groups, image.ndim - 2
    out, (batch, channel, *axes) = positions.shape[2:], image.contiguous().stride()
    steps = [axis * d for axis, d in zip(axes, module.dilation, strict=True)]
    strides = [axis * s for axis, s in zip(axes, module.stride, strict=True)]
    size = (len(image), groups, image.shape[1] // groups, *module.kernel_size, *out)
    patches = image.contiguous().as_strided(size, (batch, channel * size[2], channel, *steps, *strides))
    patches = patches.flatten(3 + n).flatten(2, 2 + n).flatten(0, 1).contiguous()  # [b · groups, in · kernel, L]
    positions = positions.reshape(len(patches), -1, patches.shape[2])  # [b · groups, out / groups, L]
    return Products(positions, patches.mT, groups, weight.shape)


# -- layers that look up rows ------------------------------------------------------------------------------------------


def _rows(module: Any, tokens: Tensor, errors: Tensor) -> Rows:
    """The errors of one token in one sample add up before a sign is taken: tokens [b, T], errors [b, T, D]."""
    n = module.num_embeddings
    samples = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    pairs, where = (samples * n + tokens).unique(return_inverse=True)  # [Q], [b, T]
    values = errors.new_zeros(len(pairs), errors.shape[-1]).index_add_(0, where.flatten(), errors.flatten(0, 1))
    if module.padding_idx is not None:
        values[pairs % n == module.padding_idx] = 0
    return Rows(pairs // n, pairs % n, values, (len(tokens), n, errors.shape[-1]))


@holds(lambda *_: 0)
def embedding_rule(module: nn.Embedding, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.Embedding`: one row for each distinct (sample, token) pair, never b × the vocabulary.

    >>> tokens, delta = torch.tensor([[0, 2], [0, 0]]), torch.tensor([[[1.0], [1.0]], [[1.0], [-3.0]]])
    >>> sums_of(embedding_rule(nn.Embedding(3, 1), tokens, delta)["weight"])[0].flatten()
    tensor([0., 0., 1.])
    """
    return {"weight": _rows(module, inputs.reshape(len(inputs), -1), _steps(errors))}


@holds(lambda *_: 0)
def embedding_bag_rule(module: nn.EmbeddingBag, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.EmbeddingBag` that sums or averages bags of one length, [b, T]."""
    kept = torch.ones_like(inputs) if module.padding_idx is None else inputs != module.padding_idx  # [b, T]
    if module.mode == "mean":
        errors = errors / kept.sum(1, keepdim=True).clamp(min=1)
    return {"weight": _rows(module, inputs, errors.unsqueeze(1).expand(-1, inputs.shape[1], -1))}


# -- layers that scale what they normalised, or a part of it -----------------------------------------------------------


def layer_norm_rule(module: Any, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.LayerNorm` and `nn.RMSNorm`.

    >>> layer_norm_rule(nn.LayerNorm(2), torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 2.0]]))["bias"]
    tensor([[1., 2.]])
    """
    normalise = F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
    scaled = normalise(inputs.to(errors.dtype), module.normalized_shape, eps=module.eps) * errors
    axes = len(module.normalized_shape)
    weight = {"weight": _steps(scaled, axes).sum(1)}
    return weight if isinstance(module, nn.RMSNorm) else weight | {"bias": _steps(errors, axes).sum(1)}


def channel_norm_rule(module: Any, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.GroupNorm`, `nn.InstanceNorm1d` to `3d`, and `nn.BatchNorm1d` to `3d` in eval mode, on [b, channels, ...]."""
    a = inputs.to(errors.dtype)
    if isinstance(module, nn.GroupNorm):
        normalised = F.group_norm(a, module.num_groups, eps=module.eps)
    else:  # by the input's own statistics, or by those that are kept
        own = isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.training or not module.track_running_stats
        )
        if own:
            normalised = F.instance_norm(a, eps=module.eps)
        else:
            mean, variance = module.running_mean.to(a.dtype), module.running_var.to(a.dtype)
            normalised = F.batch_norm(a, mean, variance, eps=module.eps)
    scaled = (normalised * errors).reshape(*a.shape[:2], -1)
    return {"weight": scaled.sum(2), "bias": errors.reshape(scaled.shape).sum(2)}


def prelu_rule(module: nn.PReLU, inputs: Tensor, errors: Tensor) -> Mapping[str, PerSample]:
    """`nn.PReLU`, with one slope or one a channel."""
    slopes = torch.where(inputs < 0, inputs.to(errors.dtype) * errors, 0.0)
    channels = slopes.shape[1] if slopes.ndim > 1 else 1
    by_channel = slopes.reshape(len(slopes), channels, -1).sum(2)
    return {"weight": by_channel if module.num_parameters > 1 else by_channel.sum(1, keepdim=True)}


RULES: dict[type, Rule] = {
    nn.Linear: linear_rule,
    nn.Bilinear: bilinear_rule,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution_rule),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_convolution_rule),
    nn.Embedding: embedding_rule,
    nn.EmbeddingBag: embedding_bag_rule,
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), layer_norm_rule),
    **dict.fromkeys((nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), channel_norm_rule),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), channel_norm_rule),  # in eval mode only
    nn.PReLU: prelu_rule,
}


def per_sample_rule(module: nn.Module, inputs: Any, errors: Tensor) -> Mapping[str, PerSample]:
    """The gradients by definition, of any layer that keeps samples apart: what a rule of one's own is compared with.

    `SGSC.rules[MyLayer] = per_sample_rule` says that the layer has no rule of its own, which is so without it.

    >>> per_sample_rule(nn.LayerNorm(2), torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))["weight"]
    tensor([[-1.0000,  1.0000]])
    """
    # of the inner product with δ_i: the layer's vector-Jacobian product
    found = per_sample_gradients(module, inputs, errors, lambda output, delta: (output * delta).sum())
    return {key: g for key, g in found.items() if key in module._parameters}
