"""The definition of Soft Gradient Sign Consistency, the factored way to compute it, and the model of the study.

In a batch of B samples, let g_ip be the gradient of sample i's loss with respect to parameter p. The **sign
consistency** of p and the **gate** made from it are

    c_p = | (1/B) Σ_i sign(g_ip) |        in [0, 1]
    gate_p = c_p ** γ                     γ ≥ 0;  γ = 0 leaves everything as it is (0 ** 0 = 1)

A gradient that is zero but for rounding has a sign all the same, of noise: that of a softmax's key bias, say. Its c is
then near `noise_floor`; `SGSC.summary` marks such parameters.

For a Linear layer g_i is an outer product δ_i a_iᵀ of the back-propagated error and the layer's input, and the sign of
a product is the product of the signs. So one extra matrix product, sign(Δ)ᵀ sign(A), gives the exact statistic, and the
B × P per-sample gradients never exist.

Index letters, here and in the notebooks: i sample, p parameter, r run, t step, e epoch; B batch size, P parameters,
R runs, T positions in a sequence, A a layer's inputs (a_i one sample's), Δ the errors at its output (δ_i). Shapes stand
at the ends of lines; b is a part of the batch.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sgsc_core.checks import check, couples_samples, named, unobserved

# ======================================================================================================================
# The definition: per-sample gradients and their sign consistency
# ======================================================================================================================


def per_sample_gradients(
    model: nn.Module,
    x: Any,
    y: Any,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    *,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Every sample's own gradient, by `torch.func.vmap(grad(...))`: the reference all else is tested against.

    `x` is [B, ...], or a tuple of the model's inputs or a dict of its keyword inputs with such tensors in it; `y` is
    [B, ...]; the loss is called on batches of one. Returns {parameter name: [B, *shape]} for the parameters that
    require a gradient. `chunk_size` bounds how many samples are differentiated at once. What vmap cannot batch (GRU,
    checkpointing) takes a pass a sample, with a warning. Raises ValueError naming the module where batch normalisation
    couples the samples.

    >>> gradients = per_sample_gradients(mlp((40, 16, 10), seed=0), torch.ones(8, 40), torch.arange(8))
    >>> gradients["2.weight"].shape
    torch.Size([8, 10, 16])
    """
    for name, module in model.named_modules():
        if couples_samples(module):
            raise ValueError(
                f"`model` should treat samples independently. Found {named(name, module)} in training mode: "
                "call model.eval() first."
            )
    n = {len(t) for t in tree_leaves((x, y)) if isinstance(t, Tensor) and t.ndim}
    if len(n) != 1:
        raise ValueError(f"`y` should have as many rows as `x`. Found tensors with {sorted(n)} rows.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    constant = {name: p.detach() for name, p in parameters.items()}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x_i: Any, y_i: Any) -> Tensor:
        x_i, y_i = tree_map_only(Tensor, lambda t: t.unsqueeze(0), (x_i, y_i))
        args, kwargs = as_call(x_i)
        return loss_fn(torch.func.functional_call(model, parameters | rest, args, kwargs), y_i)

    try:
        batched = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=chunk_size, randomness="different")
        return batched(constant, x, y)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        found = [one_by_one(model, parameters, x, y, loss_fn, [i]) for i in range(n.pop())]
        warnings.warn(f"vmap cannot batch the model, so each sample took its own pass. Found: {error}", stacklevel=2)
        return {name: torch.stack(rows) for name, rows in zip(parameters, zip(*found, strict=True), strict=True)}


def as_call(x: Any) -> tuple[tuple, dict]:
    """The positional and the keyword arguments that x stands for: a tensor, a tuple or a dict."""
    return ((), dict(x)) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})


def one_by_one(
    model: nn.Module, parameters: dict, x: Any, y: Any, loss_fn: Callable, rows: list[int]
) -> tuple[Tensor, ...]:
    """The gradients of one sample, or of copies of it, by a forward and a backward pass of its own."""
    x_i, y_i = tree_map_only(Tensor, lambda t: t[rows], (x, y))
    args, kwargs = as_call(x_i)
    with torch.enable_grad(), unobserved():
        loss = loss_fn(model(*args, **kwargs), y_i)
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)


def sign_consistency(per_sample: Tensor | Mapping[str, Tensor]) -> Any:
    """|mean_i sign g_i|: per-sample gradients [B, *shape] -> consistency [*shape], in [0, 1].

    A mapping of them, as `per_sample_gradients` returns, gives a dict. An exactly zero gradient has sign 0 and so
    counts against consistency. Raises ValueError for an empty batch.

    >>> sign_consistency(torch.tensor([[0.1, -3.0], [2.0, 5.0], [0.3, -1.0], [7.0, 0.0]]))
    tensor([1.0000, 0.2500])
    """
    if isinstance(per_sample, Mapping):
        return {name: sign_consistency(tensor) for name, tensor in per_sample.items()}
    if per_sample.ndim == 0 or len(per_sample) == 0:
        raise ValueError(f"`per_sample` should be [B, *shape] with B ≥ 1. Found shape {tuple(per_sample.shape)}.")
    return (per_sample.sign().sum(0, dtype=statistic_dtype(per_sample)) / len(per_sample)).abs()


def statistic_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all else: bfloat16 counts exactly only to 256."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def noise_floor(batch_size: int) -> float:
    """E[c] where every per-sample sign is a fair coin, for large B: √(2/(πB)), the mean of a folded normal of variance
    1/B. A sample without a gradient lowers it.

    >>> round(noise_floor(128), 3)
    0.071
    """
    return math.sqrt(2 / (math.pi * check("batch_size", batch_size, int, low=1)))


# ======================================================================================================================
# The factored statistic: the same number from one matrix product
# ======================================================================================================================


def factored_sums(inputs: Tensor, errors: Tensor, f: Callable[[Tensor], Tensor] = torch.sign) -> tuple[Tensor, Tensor]:
    """Σ_i f(g_i) for the weight and the bias of a Linear layer used once per sample, without any g_i.

    Sample i's weight gradient is δ_i a_iᵀ. For every f with f(xy) = f(x) f(y) (sign, |·|, square, [·≠0], the identity)
    Σ_i f(δ_i a_iᵀ) = f(Δ)ᵀ f(A). BackPACK takes its second moment this way (Dangel et al., arXiv 1912.10985,
    section 2.2), with the square for f. `inputs` A is [..., B, in] and `errors` Δ is [..., B, out]; leading axes are
    independent. Returns sums [..., out, in] and [..., out].

    >>> inputs, errors = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.5], [0.1]])
    >>> factored_sums(inputs, errors)
    (tensor([[2., 0.]]), tensor([2.]))
    """
    f_errors = f(errors)
    return f_errors.mT @ f(inputs), f_errors.sum(-2)


def power_gate(sign_sums: Tensor, batch_size: int, gamma: float | Tensor) -> Tensor:
    """c ** γ from Σ_i sign(g_i): integers in [-B, B], so a table of 2B + 1 powers and a look-up replace P powers.

    `sign_sums` is [*shape] with a number `gamma`, or [R, *shape] with one gamma a run as a tensor [R].
    Returns the gate in the same shape and dtype. Raises ValueError for a negative or non-finite `gamma`.

    >>> power_gate(torch.tensor([4.0, -2.0, 0.0]), batch_size=4, gamma=0.5)
    tensor([1.0000, 0.7071, 0.0000])
    """
    gammas = tuple(gamma.tolist()) if isinstance(gamma, Tensor) else (gamma,)
    levels = 2 * batch_size + 1
    table = _power_table(batch_size, gammas, sign_sums.dtype, sign_sums.device)  # [R · (2B + 1)]
    row = sign_sums.to(torch.int32).add_(batch_size).view(len(gammas), -1)
    if len(gammas) > 1:
        row += torch.arange(0, len(table), levels, dtype=torch.int32, device=table.device).unsqueeze(1)
    return table.index_select(0, row.view(-1)).view_as(sign_sums)


@lru_cache(maxsize=64)
def _power_table(batch_size: int, gammas: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    exponents = [check("gamma", gamma, float, low=0.0) for gamma in gammas]
    levels = torch.arange(-batch_size, batch_size + 1, dtype=torch.float64).abs() / batch_size
    return (levels ** torch.tensor(exponents, dtype=torch.float64).unsqueeze(1)).flatten().to(device, dtype)


# ======================================================================================================================
# The model of the study
# ======================================================================================================================


def mlp(widths: Sequence[int] = (40, 128, 128, 10), *, seed: int) -> nn.Sequential:
    """A multi-layer perceptron of Linear layers with ReLU between them, from a generator of its own.

    The initialisation is PyTorch's default for `nn.Linear`, drawn in the same order: the parameters equal those of the
    same layers built after `torch.manual_seed(seed)`. The global random state is neither used nor changed.

    >>> mlp((40, 16, 10), seed=0)(torch.zeros(2, 40)).shape
    torch.Size([2, 10])
    """
    if len(widths) < 2:
        raise ValueError(f"`widths` should name at least an input and an output width. Found {tuple(widths)}.")
    widths = tuple(int(check("widths", width, int, low=1)) for width in widths)
    generator = torch.Generator().manual_seed(check("seed", seed, int, low=0))
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
        nn.init.uniform_(linear.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
