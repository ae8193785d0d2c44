"""Soft Gradient Sign Consistency (SGSC): the statistic, the method, and what the study needs to test it.

Read top to bottom like a paper. In a batch of B samples, let g_ip be the gradient of sample i's loss with respect to
parameter p. The **sign consistency** of p and the **gate** made from it are

    c_p = | (1/B) Σ_i sign(g_ip) |        in [0, 1]
    gate_p = c_p ** γ                     γ ≥ 0;  γ = 0 leaves everything as it is (0 ** 0 = 1)

SGSC multiplies the mean gradient by the gate before the optimiser sees it (placement ``"before"``), or multiplies the
optimiser's finished update by it (placement ``"after"``).

For a Linear layer g_i is an outer product δ_i a_iᵀ of the back-propagated error and the layer's input, and the sign of
a product is the product of the signs. So one extra matrix product, sign(Δ)ᵀ sign(A), gives the exact statistic, and the
B × P per-sample gradients never exist.

Index letters, here and in the notebooks: i sample, p parameter, r run, t step, e epoch; B batch size, R runs,
A a layer's inputs, Δ the errors at its output. Shapes stand at the ends of lines.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import numbers
import os
import platform
import re
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # optuna is imported where it is used: SGSC on a model of one's own needs neither it nor mnist1d
    import optuna
    from optuna.distributions import BaseDistribution

ROOT = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("SGSC_CACHE", ROOT / ".cache"))  # of trained runs and of tuning; safe to delete
PLACEMENTS = ("before", "after")
CONTROLS = ("none", "permuted", "layer-mean", "frozen")
SCHEDULES = ("constant", "cosine")


def check(name: str, value: Any, kind: type, low: float | None = None, high: float | None = None) -> Any:
    """Return `value`, or raise an error that names the parameter, what it should be and what was found.

    `kind` is int, float, bool or str. A bool is not an int, an int is a float, NaN and infinity are never accepted.
    The bounds are inclusive. Raises TypeError for a wrong type and ValueError for a wrong value.

    >>> check("gamma", 0.25, float, low=0.0)
    0.25
    >>> check("gamma", -0.1, float, low=0.0)
    Traceback (most recent call last):
    ValueError: `gamma` should be ≥ 0.0. Found -0.1.
    """
    accepted: Any = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"`{name}` should be {'an' if kind is int else 'a'} {kind.__name__}. Found {value!r}.")
    if kind in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"`{name}` should be finite. Found {value!r}.")
        if low is not None and value < low:
            raise ValueError(f"`{name}` should be ≥ {low}. Found {value!r}.")
        if high is not None and value > high:
            raise ValueError(f"`{name}` should be ≤ {high}. Found {value!r}.")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    """Return `value` if it is one of `choices`; raise a ValueError that lists them otherwise.

    >>> check_choice("placement", "after", PLACEMENTS)
    'after'
    """
    if value not in choices:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, choices))}. Found {value!r}.")
    return value


KINDS = {"int": int, "float": float, "str": str, "bool": bool}


def coerce(value: Any, kind: str) -> Any:
    """Return a parameter's `value` as the declared type `kind`: int, float, str, bool or list[…] of one, not empty.

    Raises ValueError that says what it should be and what was found. Text that reads as a float becomes one where a
    float is declared, because YAML 1.1 takes 1e-3 for text.

    >>> coerce("1e-3", "float"), coerce([1, 2], "list[int]")
    (0.001, [1, 2])
    """
    if kind.startswith("list[") and kind[5:-1] in KINDS:
        if not isinstance(value, list) or not value:
            raise ValueError(f"should be a non-empty {kind}. Found {value!r}.")
        return [coerce(item, kind[5:-1]) for item in value]
    if kind not in KINDS:
        raise ValueError(f"should be declared as {', '.join(KINDS)} or a list[...] of one. Found {kind}.")
    found = value
    if kind == "float" and type(value) in (int, str):
        with suppress(ValueError):
            value = float(value)
    if type(value) is not KINDS[kind] or (isinstance(value, float) and not math.isfinite(value)):
        words = {"int": "an int", "float": "a finite float", "str": "a str", "bool": "a bool"}
        raise ValueError(f"should be {words[kind]}. Found {found!r}.")
    return value


def check_parameters(notebook: dict[str, Any], **at_least: float | tuple[int, int]) -> None:
    """Check the parameters of a notebook, given as its `globals()`, where papermill or a reader may have set them.

    Every parameter declared in its parameters cell (`name: type = default`) must have its declared type; every number
    must be at least what `at_least` gives for its name, or else 1 for an int and 0 for a float; text may be empty only
    where 0 is given; `name=(10, 10)` asks for at least 10 and a multiple of 10. A name that was injected but is not
    declared is refused. One ValueError tells all that is wrong.

    >>> check_parameters({"__annotations__": {"epochs": int}, "epochs": 1}, epochs=2)
    Traceback (most recent call last):
    ValueError: `epochs` should be ≥ 2. Found 1.
    """
    declared = notebook.get("__annotations__", {})
    kinds = {name: str(kind) if "[" in str(kind) else kind.__name__ for name, kind in declared.items()}
    problems = parameter_problems(kinds, notebook, at_least)
    for source in notebook.get("In", []):  # papermill's cell, which a notebook opened in Jupyter does not have
        if source.startswith("# Parameters\n"):
            names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            unknown = [n.id for n in names if isinstance(n.ctx, ast.Store) and n.id not in declared]
            problems += [f"`{name}` is not a parameter of this notebook: {', '.join(declared)}." for name in unknown]
    if problems:
        raise ValueError("\n".join(problems))


def parameter_problems(
    kinds: Mapping[str, str], values: dict[str, Any], at_least: Mapping[str, float | tuple[int, int]]
) -> list[str]:
    """What is wrong with `values` (coerced in place) of the declared `kinds`, one text each; see `check_parameters`.

    >>> parameter_problems({"n_seeds": "int"}, {"n_seeds": 0}, {})
    ['`n_seeds` should be ≥ 1. Found 0.']
    """
    problems = []
    for name, kind in kinds.items():
        try:
            value = values[name] = coerce(values[name], kind)
            bound = at_least.get(name, 0.0 if "float" in kind else 1)
            low, step = bound if isinstance(bound, tuple) else (bound, 0)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and not item and low:
                    raise ValueError("should not be empty. Found ''.")
                if isinstance(item, int | float) and not isinstance(item, bool) and item < low:
                    raise ValueError(f"should be ≥ {low:g}. Found {item!r}.")
                if step and item % step:
                    raise ValueError(f"should be a multiple of {step}. Found {item!r}.")
        except ValueError as error:
            problems.append(f"`{name}` {error}")
    return problems


# ======================================================================================================================
# Data: MNIST-1D (Greydanus & Kobak, arXiv 2011.14439), generated offline
# ======================================================================================================================

# SHA-256 of the float32 features and int64 labels of `draw_mnist1d(5000, seed=42)`. They equal, bit for bit, the
# float32 arrays of the authors' frozen download.
DATA_SHA256 = "f7e6b4ae1766612049bfa012eb07881b5a4d2a1f4c0fd4cc7ce4b79fb0853cdb"


class Dataset(NamedTuple):
    """A classification data set cut in three; features float32 [N, 40], labels int64 [N]."""

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor


def sha256_of(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes, in order, as 64 hex digits.

    >>> sha256_of(torch.zeros(2))[:8]
    'af5570f5'
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=8)
def draw_mnist1d(num_samples: int = 5000, *, seed: int = 42) -> tuple[Tensor, Tensor]:
    """Draw MNIST-1D with its authors' own generator and default settings, in their order.

    Returns features float32 [num_samples, 40], standardised over the draw, and labels int64 [num_samples].
    Works offline and leaves NumPy's global random state as it found it. Another `seed` gives a fresh sample of the same
    distribution. Raises ValueError where `num_samples` is not a positive multiple of the 10 classes, and RuntimeError
    where the default draw is not the published data set.

    >>> x, y = draw_mnist1d(100, seed=7)
    >>> x.shape, y.shape
    (torch.Size([100, 40]), torch.Size([100]))
    """
    from mnist1d.data import get_dataset_args, make_dataset

    check("num_samples", num_samples, int, low=10)
    check("seed", seed, int, low=0, high=2**32 - 1)
    if num_samples % 10:
        raise ValueError(f"`num_samples` should be a multiple of the 10 classes. Found {num_samples}.")
    args = get_dataset_args()
    args.num_samples, args.seed = num_samples, seed
    state = np.random.get_state()  # make_dataset seeds the global generator
    try:
        arrays = make_dataset(args)
    finally:
        np.random.set_state(state)
    x = torch.from_numpy(np.concatenate([arrays["x"], arrays["x_test"]]).astype(np.float32))
    y = torch.from_numpy(np.concatenate([arrays["y"], arrays["y_test"]]).astype(np.int64))
    if (num_samples, seed) == (5000, 42) and (found := sha256_of(x, y)) != DATA_SHA256:
        raise RuntimeError(f"MNIST-1D should have SHA-256 {DATA_SHA256}. Found {found}: another mnist1d or NumPy?")
    return x, y


def load_mnist1d(
    num_samples: int = 5000, *, seed: int = 42, valid_fraction: float = 0.2, label_noise: float = 0.0
) -> Dataset:
    """Load MNIST-1D, split as its authors split it (80 % training, 20 % test), with validation cut from training.

    The last `valid_fraction` of the training rows becomes the validation set (the rows come shuffled). `label_noise` is
    the exact share of the *remaining training* labels that is replaced by one of the nine other classes; validation and
    test labels stay clean. Returns a `Dataset`. Raises TypeError or ValueError naming the parameter.

    >>> data = load_mnist1d(100)
    >>> len(data.x_train), len(data.x_valid), len(data.x_test)
    (64, 16, 20)
    """
    check("valid_fraction", valid_fraction, float, low=0.0, high=0.9)
    check("label_noise", label_noise, float, low=0.0, high=1.0)
    x, y = draw_mnist1d(num_samples, seed=seed)
    n_known = int(num_samples * 0.8)
    n_train = n_known - round(n_known * valid_fraction)
    y_train = y[:n_train].clone()
    if label_noise:
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.randperm(n_train, generator=generator)[: round(n_train * label_noise)]
        y_train[wrong] = (y_train[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    parts = x[:n_train], y_train, x[n_train:n_known], y[n_train:n_known], x[n_known:], y[n_known:]
    return Dataset(*(part.clone() for part in parts))  # clones: the draw itself is cached


# ======================================================================================================================
# Model
# ======================================================================================================================


def _check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    if len(widths) < 2:
        raise ValueError(f"`widths` should name at least an input and an output width. Found {tuple(widths)}.")
    return tuple(int(check("widths", width, int, low=1)) for width in widths)


def mlp(widths: Sequence[int] = (40, 128, 128, 10), *, seed: int) -> nn.Sequential:
    """A multi-layer perceptron of Linear layers with ReLU between them, from a generator of its own.

    The initialisation is PyTorch's default for `nn.Linear`, drawn in the same order: the parameters equal those of the
    same layers built after `torch.manual_seed(seed)`. The global random state is neither used nor changed.

    >>> mlp((40, 16, 10), seed=0)(torch.zeros(2, 40)).shape
    torch.Size([2, 10])
    """
    widths = _check_widths(widths)
    generator = torch.Generator().manual_seed(check("seed", seed, int, low=0))
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
        nn.init.uniform_(linear.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# ======================================================================================================================
# The definition: per-sample gradients and their sign consistency
# ======================================================================================================================


def _couples_samples(module: nn.Module) -> bool:
    """Whether it makes one sample's output depend on another's: batch normalisation by the batch's own statistics."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or not module.track_running_stats)


def per_sample_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Every sample's own gradient, by `torch.func.vmap(grad(...))`: the reference all else is tested against.

    `x` is [B, ...], `y` is [B, ...]; the loss is called on batches of one. Returns {parameter name: [B, *shape]} for
    the parameters that require a gradient. `chunk_size` bounds how many samples are differentiated at once. Works for
    any model without coupling between samples; raises ValueError naming the module where there is such a coupling.

    >>> gradients = per_sample_gradients(mlp((40, 16, 10), seed=0), torch.ones(8, 40), torch.arange(8))
    >>> gradients["2.weight"].shape
    torch.Size([8, 10, 16])
    """
    for name, module in model.named_modules():
        if _couples_samples(module):
            raise ValueError(
                f"`model` should treat samples independently. Found '{name}' ({type(module).__name__}, training mode): "
                "call model.eval() first."
            )
    if len(x) != len(y):
        raise ValueError(f"`y` should have as many rows as `x`, {len(x)}. Found {len(y)}.")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x_i: Tensor, y_i: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters | rest, (x_i.unsqueeze(0),))
        return loss_fn(output, y_i.unsqueeze(0))

    gradient = torch.func.grad(loss)
    batched = torch.func.vmap(gradient, in_dims=(None, 0, 0), chunk_size=chunk_size, randomness="different")
    return batched(parameters, x, y)


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
    dtype = _statistic_dtype(per_sample)  # bfloat16 counts exactly only to 256
    return (per_sample.sign().sum(0, dtype=dtype) / len(per_sample)).abs()


def _statistic_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def noise_floor(batch_size: int) -> float:
    """E[c] where every per-sample sign is a fair coin: √(2/(πB)), the mean of a folded normal with variance 1/B.

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
# Gates: SGSC and its relatives, from the same factored sums
# ======================================================================================================================


def _nonzero(g: Tensor) -> Tensor:
    return (g != 0).to(g.dtype)


# Σ_i f(g_i) for each f; all are multiplicative, so that each is one matrix product. "total" is Σ_i g_i itself.
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "magnitude": torch.abs,
    "square": torch.square,
    "active": _nonzero,
}


def align_runs(values: Tensor, like: Tensor) -> Tensor:
    """Values [R], one a run, as [R, 1, ...] in the dtype of `like` [R, ...], so that they broadcast over it.

    >>> align_runs(torch.tensor([0.5, 2.0], dtype=torch.float64), torch.ones(2, 3)) * torch.ones(2, 3)
    tensor([[0.5000, 0.5000, 0.5000],
            [2.0000, 2.0000, 2.0000]])
    """
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _share(part: Tensor, whole: Tensor, gamma: Tensor) -> Tensor:
    """(part / whole) ** γ with 0 / 0 = 0, and no more than 1 whatever the rounding; γ [R] for part [R, ...]."""
    share = torch.where(whole > 0, part / whole, 0.0).clamp_(max=1.0)
    return share ** align_runs(gamma, part)


def sign_gate(sign: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """SGSC: (|Σ sign g_i| / B) ** γ.

    >>> sign_gate(torch.tensor([[4.0, -1.0]]), batch_size=4, gamma=torch.tensor([0.5], dtype=torch.float64))
    tensor([[1.0000, 0.5000]])
    """
    return power_gate(sign, batch_size, gamma)


def active_gate(sign: Tensor, active: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """SGSC over the samples whose gradient is not zero: (|Σ sign g_i| / Σ [g_i ≠ 0]) ** γ. No ReLU caps it.

    >>> sign, active = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 4.0]])
    >>> active_gate(sign, active, batch_size=4, gamma=torch.tensor([0.5]))
    tensor([[1.0000, 0.5000]])
    """
    return _share(sign.abs(), active, gamma)


def magnitude_gate(total: Tensor, magnitude: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """(|Σ g_i| / Σ |g_i|) ** γ: the mean of GradDrop's random mask, with an exponent (Chen et al., 2010.06808).

    >>> magnitude_gate(torch.tensor([[-1.0]]), torch.tensor([[4.0]]), batch_size=4, gamma=torch.tensor([0.5]))
    tensor([[0.5000]])
    """
    return _share(total.abs(), magnitude, gamma)


def snr_gate(total: Tensor, square: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """(r / (1 + r)) ** γ of the gradient's signal-to-noise ratio r = mean² / variance (GSNR, Liu et al., 2001.07384).

    r / (1 + r) = mean² / mean square, so that it needs no division by a variance that may be zero.

    >>> snr_gate(torch.tensor([[2.0]]), torch.tensor([[4.0]]), batch_size=4, gamma=torch.tensor([0.5]))
    tensor([[0.5000]])
    """
    return _share(total.square(), batch_size * square, gamma)


def and_mask_gate(sign: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """[|Σ sign g_i| / B ≥ τ], over its mean in each tensor (Parascandolo et al., 2009.00329); the threshold τ is γ.

    >>> and_mask_gate(torch.tensor([[4.0, -1.0]]), batch_size=4, gamma=torch.tensor([0.5]))
    tensor([[2., 0.]])
    """
    mask = (sign.abs() >= align_runs(gamma * batch_size, sign)).to(sign.dtype)
    return mask / align_runs(mask.flatten(1).mean(1) + 1e-10, mask)


# A gate's parameter names say which sums it is made of ("total" or of `SUMS`), each [R, *shape]; γ is float64 [R].
# To add one, write such a function and put it here, `GATES["mine"] = mine`: `Run(..., gate="mine")` trains with it.
Gate = Callable[..., Tensor]
GATES: dict[str, Gate] = {
    "sign": sign_gate,
    "active": active_gate,
    "magnitude": magnitude_gate,
    "snr": snr_gate,
    "and-mask": and_mask_gate,
}
# Relatives that are no gate of the batch's sums. "vote": the gradient is replaced by the sign of Σ sign g_i, before
# Adam or, "after", instead of Adam: signSGD with majority vote (Bernstein et al., 1810.05291). "cautious": of Adam's
# update what agrees in sign with the gradient, over the mask's mean (Liang et al., 2411.16085).
RELATIVES = ("vote", "cautious")


def sums_of(gate: Gate) -> list[str]:
    """The names of the sums that a gate is made of.

    >>> sums_of(GATES["active"])
    ['sign', 'active']
    """
    kinds = inspect.signature(gate).parameters.values()
    return [parameter.name for parameter in kinds if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def check_gate(name: str, gate: Gate) -> None:
    """Raise TypeError or ValueError where a gate is not one: by its signature, and by what it makes of a small batch.

    >>> check_gate("half", lambda sign: sign / 2)
    Traceback (most recent call last):
    TypeError: The gate 'half' should have, after its sums and a `*`, the keywords `batch_size` and `gamma`, used or \
not, like (sign, *, batch_size, gamma). Found (sign).
    """
    if name in RELATIVES:
        raise ValueError(f"The gate {name!r} should have another name: {' and '.join(RELATIVES)} are methods of train.")
    signature = inspect.signature(gate)
    keywords = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    if not {"batch_size", "gamma"} <= keywords:
        raise TypeError(
            f"The gate {name!r} should have, after its sums and a `*`, the keywords `batch_size` and `gamma`, used or "
            f"not, like (sign, *, batch_size, gamma). Found {signature}."
        )
    if unknown := set(sums_of(gate)) - {"total", *SUMS}:
        raise ValueError(
            f"The sums of the gate {name!r} should be of {', '.join(['total', *SUMS])}. Found {', '.join(unknown)}."
        )
    for which, shape in (("a weight's", (3, 4)), ("a bias's", (5,))):
        _try_gate(name, gate, which, shape)


def _try_gate(name: str, gate: Gate, which: str, shape: tuple[int, ...]) -> None:
    """Check a gate on the sums of two unlike runs over 8 samples, with entries that all, one or none of them move."""
    g = torch.randn(8, 2, *shape, generator=torch.Generator().manual_seed(0))  # [B, R, *shape]
    g[1:, ..., 1], g[..., 2] = 0.0, g[..., 2] * 1e-30  # whose square is 0 in float32
    g[:, 0, ..., 0], g[:, 1] = g[:, 0, ..., 0].abs(), 100 * g[:, 1]
    gamma = torch.tensor([0.5, 0.25], dtype=torch.float64)
    kinds, expected = sums_of(gate), (2, *shape)

    def sums(g: Tensor) -> list[Tensor]:
        return [g.sum(0) if kind == "total" else SUMS[kind](g).sum(0) for kind in kinds]

    def gates(given: list[Tensor], runs: slice = slice(2)) -> Tensor:
        return gate(*(part[runs] for part in given), batch_size=8, gamma=gamma[runs])

    given = sums(g)
    try:
        both, again, silent = gates(given), gates(sums(g)), gates(sums(torch.zeros_like(g)))
        alone = [gates(sums(g), slice(r, r + 1)) for r in range(2)]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            f"The gate {name!r} should take sums [R, *shape], here {which} {expected}, and `gamma` [R]; "
            f"align_runs(gamma, sum) shapes that to broadcast, and sum.flatten(1) reduces any shape. Found: {error}"
        ) from error
    found = (tuple(both.shape), both.dtype) if isinstance(both, Tensor) else type(both).__name__
    if found != (expected, torch.float32):
        raise ValueError(
            f"The gate {name!r} should return [R, *shape] in the dtype of its sums, here {expected}, torch.float32, as "
            f"gate.expand_as(sum) and gate.to(sum.dtype) make it; `gamma` is float64. Found {found}."
        )
    for made, where in (both, "its sums"), (silent, "its sums where no sample has a gradient, which are all 0"):
        if not made.isfinite().all():
            raise ValueError(
                f"The gate {name!r} should make finite numbers of {where}. Found NaN or infinity. Where it divides by "
                "a sum that may be 0: torch.where(whole > 0, part / whole, 0). Where it takes a power of `sign` or "
                "`total`, which may be negative: sum.abs()."
            )
    if not all(map(torch.equal, given, sums(g))):
        raise ValueError(f"The gate {name!r} should leave its sums as they are. Found them changed in place.")
    if not torch.equal(both, again):
        raise ValueError(f"The gate {name!r} should make the same of the same sums. Found other numbers: is it random?")
    if not torch.allclose(both, torch.cat(alone)):
        raise ValueError(
            f"The gate {name!r} should not mix runs: reduce over the axes after the first only, and give each run its "
            "own γ, as align_runs(gamma, sum) does."
        )
    if (both < 0).any():
        raise ValueError(
            f"The gate {name!r} should make factors of 0 or more: a negative one turns the step round. Found "
            f"{both.min():g}. `sign` and `total` carry the gradient's sign: sum.abs() takes it off."
        )


# ======================================================================================================================
# SGSC on any model
# ======================================================================================================================

# A rule returns, for each parameter of its module, Σ_i sign(g_i) and the number of non-zero entries of all g_i. It is
# given the module, its input A and the error Δ at its output, both with the samples along their first axis.
Rule = Callable[[Any, Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]

CHUNK_ELEMENTS = 2**24  # the most per-sample gradient entries that a rule holds at once: 64 MiB in float32


def _sign_sum(per_sample: Tensor) -> Tensor:
    return per_sample.sign().sum(0, dtype=torch.float32)


def _chunks(inputs: Tensor, errors: Tensor, entries: int) -> Iterator[slice]:
    """Cut the batch so that neither the `entries` of a sample's gradient nor its activations exceed CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // max(1, entries, inputs[0].numel(), errors[0].numel()))
    return (slice(start, start + size) for start in range(0, len(inputs), size))


def linear_rule(module: nn.Linear, inputs: Tensor, errors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Rule for `nn.Linear`: factored on [B, in]; on [B, ..., in] sample i's gradient is a sum of outer products,
    whose sign does not factor, so it is built, [out, in] a sample, chunk by chunk.

    >>> a, delta = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[0.5], [0.1]])
    >>> linear_rule(nn.Linear(2, 1), a, delta)["weight"][0]  # Σ_i sign(g_i)
    tensor([[ 2., -1.]])
    """
    if inputs[0].numel() == inputs.shape[-1]:  # one outer product a sample
        a, delta = (t.view(len(t), t.shape[-1]).sign().float() for t in (inputs, errors))
        weight, bias = factored_sums(a, delta, lambda signs: signs)
        columns, rows = (torch.linalg.vecdot(signs, signs).double() for signs in (a, delta))  # non-zero entries
        return {"weight": (weight, torch.dot(rows, columns)), "bias": (bias, rows.sum())}
    inputs, errors = (t.reshape(len(t), -1, t.shape[-1]) for t in (inputs, errors))  # [B, T, in], [B, T, out]
    weight = torch.zeros_like(module.weight, dtype=torch.float32)
    active = torch.zeros((), dtype=torch.int64, device=weight.device)
    for part in _chunks(inputs, errors, weight.numel()):
        gradients = errors[part].mT @ inputs[part].to(errors.dtype)  # [b, out, in]
        weight += _sign_sum(gradients)
        active += gradients.count_nonzero()
    bias = errors.sum(1)  # [B, out]
    return {"weight": (weight, active), "bias": (_sign_sum(bias), bias.count_nonzero())}


def embedding_rule(module: nn.Embedding, inputs: Tensor, errors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Rule for `nn.Embedding`: the errors of one token in one sample add up before the sign is taken, so memory is one
    row for each distinct (sample, token) pair, never B × the vocabulary.

    >>> tokens, delta = torch.tensor([[0, 2], [0, 0]]), torch.tensor([[[1.0], [1.0]], [[1.0], [-3.0]]])
    >>> embedding_rule(nn.Embedding(3, 1), tokens, delta)["weight"][0].flatten()
    tensor([0., 0., 1.])
    """
    tokens = inputs.reshape(len(inputs), -1)  # [B, T]
    samples = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    pairs, where = (samples * module.num_embeddings + tokens).unique(return_inverse=True)  # [Q], [B, T]
    gradients = errors.new_zeros(len(pairs), errors.shape[-1])
    gradients.index_add_(0, where.flatten(), errors.reshape(-1, errors.shape[-1]))  # [Q, D]
    token_of = pairs % module.num_embeddings
    if module.padding_idx is not None:
        gradients[token_of == module.padding_idx] = 0
    weight = torch.zeros_like(module.weight, dtype=torch.float32)
    weight.index_add_(0, token_of, gradients.sign().float())
    return {"weight": (weight, gradients.count_nonzero())}


def convolution_rule(module: Any, inputs: Tensor, errors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Rule for `nn.Conv1d` and `nn.Conv2d`: a convolution is a Linear layer on the patches of its input, so sample i's
    weight gradient is one product of its errors [out, L] and its patches [L, in · kernel], a group at a time.

    >>> a, delta = torch.tensor([[[1.0, 2.0, -5.0]]]), torch.tensor([[[1.0, 1.0]]])
    >>> convolution_rule(nn.Conv1d(1, 1, kernel_size=2), a, delta)["weight"][0]  # the signs of 1 + 2 and of 2 - 5
    tensor([[[ 1., -1.]]])
    """
    kernel, groups, weight = list(module.weight.shape[1:]), module.groups, module.weight
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = F.pad(inputs.to(errors.dtype), module._reversed_padding_repeated_twice, mode=mode)
    dilation, stride = module.dilation, module.stride
    if inputs.ndim == 3:  # Conv1d is Conv2d on a height of 1
        inputs, kernel, dilation, stride = inputs.unsqueeze(2), [kernel[0], 1, kernel[1]], (1, *dilation), (1, *stride)
    errors = errors.flatten(2)  # [B, out, L]
    sums = torch.zeros_like(weight, dtype=torch.float32)
    active = torch.zeros((), dtype=torch.int64, device=weight.device)
    for part in _chunks(inputs, errors, max(weight.numel(), groups * math.prod(kernel) * errors.shape[-1])):
        patches = F.unfold(inputs[part], tuple(kernel[1:]), dilation, 0, stride)  # [b, in · kernel, L]
        patches = patches.unflatten(1, (groups, -1))
        gradients = (
            errors[part].unflatten(1, (groups, -1)) @ patches.mT
        )  # [b, groups, out / groups, in / groups · kernel]
        sums += _sign_sum(gradients).view_as(sums)
        active += gradients.count_nonzero()
    bias = errors.sum(2)  # [B, out]
    return {"weight": (sums, active), "bias": (_sign_sum(bias), bias.count_nonzero())}


def per_sample_rule(module: nn.Module, inputs: Tensor, errors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Rule for any layer that maps one tensor to one tensor, sample by sample: the layer's own per-sample gradients,
    by vmap, a chunk at a time. `SGSC.rules[MyLayer] = per_sample_rule` makes it serve a layer of one's own. It covers
    the parameters that the layer itself owns; the layers inside it need rules of their own. The layer is run again, so
    that it must compute the same each time: ValueError for a random operation in it.

    >>> per_sample_rule(nn.LayerNorm(2), torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))["weight"]
    (tensor([-1.,  1.]), tensor(2))
    """
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    rest = {name: p.detach() for name, p in module.named_parameters() if name not in parameters}
    rest |= dict(module.named_buffers())
    if inputs.is_floating_point():  # under autocast a layer casts its input itself; here it is off
        inputs = inputs.to(next(iter(parameters.values())).dtype)

    def inner_product(parameters: dict[str, Tensor], a: Tensor, delta: Tensor) -> Tensor:
        output = torch.func.functional_call(module, parameters | rest, (a.unsqueeze(0),))
        return (output * delta).sum()  # its gradient is the layer's vector-Jacobian product with δ_i

    gradient = torch.func.vmap(torch.func.grad(inner_product), in_dims=(None, 0, 0), randomness="error")
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    active = {name: torch.zeros((), dtype=torch.int64, device=p.device) for name, p in parameters.items()}
    for part in _chunks(inputs, errors, sum(p.numel() for p in parameters.values())):
        try:
            per_samples = gradient(parameters, inputs[part], errors[part])
        except RuntimeError as error:
            if "random" not in str(error):
                raise
            raise ValueError(
                f"{type(module).__name__} should compute the same whenever it is run. Found a random operation in it: "
                "put that into a layer of its own, such as nn.Dropout."
            ) from error
        for name, per_sample in per_samples.items():
            sums[name] += _sign_sum(per_sample)
            active[name] += per_sample.count_nonzero()
    return {name: (sums[name], active[name]) for name in sums}


class SGSC:
    """Soft Gradient Sign Consistency on a PyTorch model: hooks it, and gates its gradients or its updates by c ** γ.

    >>> model = mlp((40, 16, 10), seed=0)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> sgsc = SGSC(model, gamma=0.25)
    >>> x, y = torch.randn(32, 40), torch.randint(10, (32,))
    >>> F.cross_entropy(model(x), y).backward()
    >>> sgsc.scale_gradients_()              # the card's method; or: with sgsc.scaled_update(): optimizer.step()
    >>> optimizer.step()

    Exact for the layers in `SGSC.rules`, under three conditions that are checked where they can be: samples lie along
    the first axis everywhere; each layer is used once per sample; the loss is a mean or a sum over samples. A model
    that breaks one is refused by the name of the module, with the way out. `SGSC.rules[MyLayer] = per_sample_rule`
    adds a layer of one's own. Several backward passes before one gate add up to the c of the whole batch; a new
    statistic starts when the gradients were cleared, or after a gate was used.

    Parameters: `gamma` ≥ 0. `process_group`: under `torch.distributed`, the group whose sign sums are added up, so that
    c is that of the global batch (`dist.group.WORLD` for all processes); every process must then gate at the same time.
    Raises TypeError or ValueError on construction, ValueError in the forward pass, RuntimeError for calls out of order.
    """

    rules: dict[type, Rule] = {  # noqa: RUF012 - a table that users extend
        nn.Linear: linear_rule,
        nn.Embedding: embedding_rule,
        **dict.fromkeys((nn.Conv1d, nn.Conv2d), convolution_rule),
        **dict.fromkeys((nn.LayerNorm, nn.GroupNorm), per_sample_rule),
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), per_sample_rule),  # in eval mode only
    }

    # What was summed over all processes: parameters, sign sums, active counts, samples.
    _reduced: tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, Tensor], int] | None
    _gated: bool

    def __init__(self, model: nn.Module, gamma: float, *, process_group: dist.ProcessGroup | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
        self.gamma = check("gamma", gamma, float, low=0.0)
        self._model, self._group = model, process_group
        self._refuse_unsupported()
        self._batch_norms = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._pass: _Pass | None = None  # the forward pass under way
        self._awaits_with = False  # scaled_update() was called, its `with` block not entered
        self._start_statistic()
        # prepend=True: another hook may replace the output, and the rules need the layer's own.
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._model_hook(), prepend=True, with_kwargs=True)]
        self._hooks.append(model.register_forward_hook(self._output_hook()))
        for name, module in model.named_modules():
            if self._owned(module) and type(module) in self.rules:
                hook = self._layer_hook(name, module)
                self._hooks.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    # -- what can't be gated exactly is refused, by name and with the way out ------------------------------------------

    @staticmethod
    def _owned(module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module._parameters.items() if p is not None}

    def _refuse_unsupported(self) -> None:
        def refuse(name: str, module: nn.Module, reason: str, way_out: str) -> None:
            raise ValueError(f"SGSC does not serve '{name}' ({type(module).__name__}): {reason}. {way_out}.")

        reference = "For a reference on any model without coupling, use per_sample_gradients"
        first_owner: dict[nn.Parameter, str] = {}
        for name, module in self._model.named_modules():
            name, owned = name or "model", self._owned(module)
            if isinstance(module, torch._dynamo.OptimizedModule):
                refuse(name, module, "hooks set after torch.compile are not run", "Build SGSC first, then compile")
            if isinstance(module, nn.DataParallel):
                refuse(name, module, "it runs on copies of the model", "Use DistributedDataParallel")
            if _couples_samples(module):
                refuse(name, module, "in training mode it couples the samples", "Call its eval(), or use GroupNorm")
            if any(nn.parameter.is_lazy(p) for p in owned.values()):
                refuse(name, module, "its parameters are not initialised yet", "Run the model once first")
            if nn.utils.parametrize.is_parametrized(module) and any(p.requires_grad for p in module.parameters()):
                refuse(name, module, "its weight is computed from other parameters", "Remove the parametrisation")
            trainable = {key for key, p in owned.items() if p.requires_grad}
            for parameter in (owned[key] for key in trainable):
                if parameter in first_owner:
                    refuse(name, module, f"it shares a parameter with '{first_owner[parameter]}'", reference)
                first_owner[parameter] = name
            if not trainable:
                continue
            if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
                reason = "it does not map one tensor to one tensor, so that no rule can serve it"
                refuse(name, module, reason, f"Freeze its parameters. {reference}")
            if type(module) not in self.rules:
                way_out = f"add a rule: SGSC.rules[{type(module).__name__}] = per_sample_rule"
                if any(True for _ in module.children()):
                    way_out += ", or move them into a layer of their own"
                refuse(
                    name,
                    module,
                    f"no rule for it, and it owns {sorted(trainable)}",
                    f"Freeze its parameters, or, if it maps one tensor to one tensor, sample by sample, {way_out}. "
                    f"{reference}",
                )
            try:
                inspect.signature(self.rules[type(module)]).bind(module, None, None)
            except TypeError as error:
                raise TypeError(
                    f"The rule for '{name}' ({type(module).__name__}) should be a function of the module, its input "
                    f"and the error at its output. Found {self.rules[type(module)]!r}: {error}."
                ) from error
            if any(not p.is_floating_point() for p in owned.values()):
                refuse(name, module, "its parameters are not real floating-point numbers", reference)
            if _is_torchs_own(module) and not owned.keys() <= {"weight", "bias"}:  # the older weight and spectral norm
                refuse(name, module, "its weight is computed from other parameters", "Remove the parametrisation")
            if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
                refuse(name, module, "sparse gradients and max_norm are not covered", "Use sparse=False, max_norm=None")

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _start_pass(self, rows: int) -> _Pass:
        if self._awaits_with:
            self._awaits_with = False  # so that a corrected notebook cell can go on with this object
            raise RuntimeError(
                "`scaled_update()` was called but not entered, so that the step after it was the plain optimizer's. "
                "Write: with sgsc.scaled_update(): optimizer.step()"
            )
        for name, module in self._batch_norms:  # train() may have been called since construction
            if _couples_samples(module):
                raise ValueError(
                    f"SGSC does not serve '{name}' ({type(module).__name__}) in training mode: it couples "
                    "the samples. Call its eval(), or use GroupNorm."
                )
        self._pass = _Pass(rows)
        return self._pass

    def _model_hook(self) -> Callable:
        @torch.compiler.disable
        def on_model(called: nn.Module, args: tuple, kwargs: dict) -> None:
            if called is not self._model or not _is_training_pass():
                return
            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), None)
            if first is None:
                self._pass = None  # the first layer tells how many samples there are
            else:
                self._start_pass(len(first))

        return on_model

    def _output_hook(self) -> Callable:
        checked = False

        @torch.compiler.disable
        def on_output(called: nn.Module, _: tuple, output: Any) -> None:
            nonlocal checked
            if not checked and called is self._model and _is_training_pass():
                self._refuse_second_uses(output)
                checked = True  # the graph of the first training pass stands for all

        return on_output

    def _refuse_second_uses(self, output: Any) -> None:
        """Refuse a weight that enters the graph twice, as with F.linear(h, embedding.weight): no hook sees that use."""
        tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
        pending: set[Any] = {t.grad_fn for t in tensors if t.grad_fn is not None}
        seen, uses = set(pending), Counter[nn.Parameter]()
        while pending:
            for following, _ in pending.pop().next_functions:
                if hasattr(following, "variable"):  # the graph's end at a parameter
                    uses[following.variable] += 1
                elif following is not None and following not in seen:
                    seen.add(following)
                    pending.add(following)
        for name, module in self._model.named_modules():
            if _is_torchs_own(module) and any(uses[p] > 1 for p in self._owned(module).values()):
                raise ValueError(
                    f"SGSC does not serve '{name}' ({type(module).__name__}): its parameters are used a "
                    "second time outside it. Give each use a layer of its own, or use "
                    "per_sample_gradients."
                )

    def _layer_hook(self, name: str, module: nn.Module) -> Callable:
        @torch.compiler.disable
        def on_layer(called: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if called is not module or not _is_training_pass():
                return
            if not any(p.requires_grad for p in self._owned(module).values()):
                return
            where = f"'{name}' ({type(module).__name__})"
            if torch._C._current_graph_task_id() != -1:  # a backward pass is under way
                raise ValueError(
                    f"{where} should run in the forward pass only. Found it run again in the backward "
                    "pass, by activation checkpointing: take that off, or use per_sample_gradients."
                )
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if len(tensors) != 1 or not isinstance(output, Tensor):
                raise ValueError(f"{where} should map one tensor to one tensor. Found {len(tensors)} tensor inputs.")
            inputs, held = tensors[0], [tensors[0].detach()]
            this = self._pass if self._pass and not self._pass.counted else self._start_pass(len(inputs))
            if name in this.layers:
                raise ValueError(
                    f"{where} should be used once in a forward pass. Found a second use: a sample's "
                    "gradient would be a sum over the uses. Give each use a layer of its own, or use "
                    "per_sample_gradients."
                )
            least = {nn.Embedding: 1, nn.Conv1d: 3, nn.Conv2d: 4}.get(type(module), 2)
            if inputs.ndim < least or len(inputs) != this.rows:
                raise ValueError(
                    f"{where} should see the batch's {this.rows} samples along its first axis. Found an "
                    f"input of shape {tuple(inputs.shape)}. Keep the batch in front, [{this.rows}, ...], "
                    "in every layer, and expand what all samples share."
                )
            this.layers[name] = False
            # A Linear's output on [B, ..., in] is a view; an in-place ReLU behind it would go round a hook on the view.
            hooked: Any = output._base if output._is_view() and _is_torchs_own(module) else output
            shape = output.shape
            hooked.register_hook(lambda errors: self._on_errors(this, name, module, held, errors.detach().view(shape)))

        return on_layer

    def _on_errors(self, this: _Pass, name: str, module: nn.Module, held: list[Tensor], errors: Tensor) -> None:
        if this is not self._pass or this.layers[name]:
            raise RuntimeError(
                "SGSC needs one backward pass for each forward pass, before the next forward pass: else "
                "a sample's gradient is a sum over passes. Evaluate under torch.no_grad()."
            )
        this.layers[name] = True
        inputs = held.pop()  # popped, so that a loss that is kept does not keep every layer's input with it
        if not this.counted:  # the first layer reached by this backward pass
            this.counted = True
            if self._gated or self._cleared():
                self._start_statistic()
            self._samples += this.rows
            self._reduced = None
        if not this.rows:  # an empty shard
            return
        kind = errors.device.type
        autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.no_grad(), autocast:
            rule = self.rules[type(module)]
            found = rule(module, inputs, errors)
            _check_rule(f"The rule for '{name}' ({type(module).__name__})", rule, module, found, this.rows)
            for key, p in self._owned(module).items():
                if not p.requires_grad:
                    continue
                full, (sign_sum, active) = f"{name}.{key}" if name else key, found[key]
                if full in self._sums:
                    self._sums[full] += sign_sum
                    self._active[full] += active
                else:
                    self._sums[full], self._active[full] = sign_sum, active

    # -- the statistic and its uses ------------------------------------------------------------------------------------

    def _cleared(self) -> bool:
        """Whether the gradients were cleared: None, or all zero (set_to_none=False) although some sample's were not."""
        gradients = [p.grad for p in self._model.parameters() if p.requires_grad and p.grad is not None]
        return not gradients or (not any(g.any() for g in gradients) and any(self._active.values()))

    def _start_statistic(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._active: dict[str, Tensor] = {}
        self._samples = 0
        self._reduced = None
        self._gated = False

    def _statistic(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, Tensor], int]:
        """Parameters, sign sums and active counts by name, and the number of samples, of all processes together."""
        if self._reduced is None:
            sums, active, samples = {}, {}, self._samples
            parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
            for name, p in parameters.items():
                seen = name in self._sums
                sums[name] = self._sums[name] if seen else torch.zeros_like(p, dtype=torch.float32)
                active[name] = self._active[name] if seen else torch.zeros((), dtype=torch.int64, device=p.device)
            if self._group is not None:
                sums = {name: tensor.clone() for name, tensor in sums.items()}  # this process's own sums stay
                active = {name: tensor.to(torch.int64, copy=True) for name, tensor in active.items()}
                total = torch.tensor(samples, device=next(iter(sums.values())).device if sums else None)
                tensors = (total, *sums.values(), *active.values())
                for work in [dist.all_reduce(tensor, group=self._group, async_op=True) for tensor in tensors]:
                    work.wait()
                samples = int(total)
            if not samples:
                if not self._hooks:
                    raise RuntimeError("No statistic: remove() took the hooks off the model. Build SGSC anew.")
                raise RuntimeError(
                    "No statistic yet: call loss.backward() first, on a forward pass made after SGSC was built, and "
                    "before the block of scaled_update(), so that an optimizer that calls backward itself, such as "
                    "LBFGS, is not served. A model compiled and run before SGSC was built runs without its hooks: "
                    "build SGSC first, then compile."
                )
            for name, p in parameters.items():
                if name not in self._sums and p.grad is not None and not active[name] and p.grad.any():
                    raise RuntimeError(
                        f"'{name}' has a gradient, but its module's forward was not seen: it is used "
                        "outside that module, or was frozen when SGSC was built. Build SGSC anew, or "
                        "use per_sample_gradients."
                    )
            self._reduced = parameters, sums, active, samples
        return self._reduced

    def _gates(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gate, one at a time: all gates at once would take the parameters' memory again."""
        gamma = check("gamma", self.gamma, float, low=0.0)
        if self._gated and self._group is None:
            raise RuntimeError("This statistic was used already: call loss.backward() again before the next gate.")
        if self._gated:  # this process had no batch since then, others may have: it takes part with no samples
            self._start_statistic()
        parameters, sums, _, samples = self._statistic()
        self._gated = True
        for name, p in parameters.items():
            yield p, power_gate(sums[name].to(_statistic_dtype(p)), samples, gamma)

    def consistency(self) -> dict[str, Tensor]:
        """{parameter name: c, [*shape] in [0, 1]} of the samples since the gradients were last cleared.

        float64 for float64 parameters, float32 otherwise. Raises RuntimeError before the first backward pass.

        >>> model = mlp((40, 16, 10), seed=0)
        >>> sgsc = SGSC(model, gamma=0.25)
        >>> F.cross_entropy(model(torch.ones(4, 40)), torch.arange(4)).backward()
        >>> sgsc.consistency()["2.bias"][:5]  # classes 0 to 3 are one sample's label each, class 4 is none's
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 1.0000])
        """
        parameters, sums, _, samples = self._statistic()
        return {name: s.to(_statistic_dtype(parameters[name])).abs() / samples for name, s in sums.items()}

    @torch.no_grad()
    def scale_gradients_(self) -> None:
        """p.grad ← p.grad · c ** γ, in place (the card's method). Call after `backward()`, before clipping.

        >>> model = mlp((40, 10), seed=0)
        >>> sgsc = SGSC(model, gamma=1.0)
        >>> F.cross_entropy(model(torch.ones(4, 40)), torch.arange(4)).backward()
        >>> before = model[0].bias.grad.clone()
        >>> sgsc.scale_gradients_()
        >>> (model[0].bias.grad / before)[:5]
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 1.0000])
        """
        for p, gate in self._gates():
            if p.grad is not None:
                p.grad.mul_(gate)

    def scaled_update(self) -> AbstractContextManager[None]:
        """Gate the finished update instead: p ← p_before + c ** γ · (p_after − p_before) around `optimizer.step()`.

        All that the step does to a parameter is gated, decoupled weight decay included. Holds a copy of the parameters
        for the length of the step; c = 1 gives the ungated step bit for bit. A call that no `with` entered is a
        RuntimeError in the next forward pass.

        >>> model = mlp((40, 16, 10), seed=0)
        >>> sgsc, optimizer = SGSC(model, gamma=0.25), torch.optim.Adam(model.parameters())
        >>> F.cross_entropy(model(torch.ones(4, 40)), torch.arange(4)).backward()
        >>> with sgsc.scaled_update():
        ...     optimizer.step()
        """
        self._awaits_with = True
        return self._scaled_update()

    @contextmanager
    def _scaled_update(self) -> Iterator[None]:
        self._awaits_with = False
        gated = [(p, gate.to(p.dtype), p.detach().clone()) for p, gate in self._gates()]
        yield
        with torch.no_grad():
            for p, gate, before in gated:
                p.copy_(torch.where(gate == 1, p, torch.lerp(before, p, gate)))  # lerp alone: ∞ and -0 change

    def summary(self) -> pd.DataFrame:
        """One tidy row a parameter: `parameter, entries, samples`; of c the `mean`, the quantiles `q05, q25, q50, q75,
        q95` and `share_zero`, the share of entries with c = 0; `active_share`, the share of (sample, entry) pairs with
        a non-zero gradient, which caps c; and `noise_floor`, E[c] under random signs at this number of samples.

        >>> model = mlp((40, 16, 10), seed=0)
        >>> sgsc = SGSC(model, gamma=0.25)
        >>> F.cross_entropy(model(torch.ones(4, 40)), torch.arange(4)).backward()
        >>> sgsc.summary()["parameter"].tolist()
        ['0.weight', '0.bias', '2.weight', '2.bias']
        """
        _, _, active, samples = self._statistic()
        rows = []
        for name, c in self.consistency().items():
            values = c.detach().cpu().double().flatten().numpy()
            quantiles = dict(
                zip(
                    ("q05", "q25", "q50", "q75", "q95"), np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)), strict=True
                )
            )
            rows.append(
                {
                    "parameter": name,
                    "entries": values.size,
                    "samples": samples,
                    "mean": values.mean(),
                    **quantiles,
                    "share_zero": (values == 0).mean(),
                    "active_share": int(active[name]) / (samples * values.size),
                    "noise_floor": noise_floor(samples),
                }
            )
        return pd.DataFrame(rows)

    def remove(self) -> None:
        """Take the hooks off the model; what was computed stays readable.

        >>> model = mlp((40, 10), seed=0)
        >>> with SGSC(model, gamma=0.25):  # removes them at the end of the block
        ...     _ = model(torch.ones(4, 40))
        >>> len(model[0]._forward_hooks)
        0
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> SGSC:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass
class _Pass:
    """One forward pass of a hooked model: its samples, its layers (True once their errors arrived)."""

    rows: int
    counted: bool = False

    def __post_init__(self) -> None:
        self.layers: dict[str, bool] = {}


def _check_rule(who: str, rule: Rule, module: nn.Module, found: Any, rows: int) -> None:
    """Refuse what a rule should not return, by the rule's, the module's and the parameter's name."""
    if not isinstance(found, dict):
        raise TypeError(f"{who} should return {{name: (Σ sign g, count)}}. Found {type(found).__name__}.")
    if unknown := found.keys() - module._parameters.keys():
        raise ValueError(f"{who} should cover {sorted(module._parameters)} and no more. Found {sorted(unknown)}.")
    for key, p in module._parameters.items():
        if p is None or not p.requires_grad:
            continue
        if key not in found:
            raise KeyError(f"{who} should cover {key!r}. Found {sorted(found)}.")
        parts: Sequence[Any] = found[key] if isinstance(found[key], tuple | list) else (found[key],)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if shapes != [tuple(p.shape), ()]:
            raise ValueError(
                f"{who} should give for {key!r} two tensors: Σ sign g over the batch, {tuple(p.shape)}, and "
                f"the number of all g ≠ 0, (). Found {type(found[key]).__name__} of {', '.join(map(str, shapes))}."
            )
        if getattr(rule, "__module__", "") == __name__:  # those are tested; the check would cost another pass
            continue
        total, count = parts[0].double(), parts[1].double()
        if not (total == total.round()).all() or not (total.abs() <= rows).all():  # neither holds for NaN
            raise ValueError(
                f"{who} should give for {key!r} the sum over the batch's {rows} samples of the sign of each one's "
                f"gradient, `gradients.sign().sum(0)`: whole numbers from {-rows} to {rows}. "
                f"Found {total.min():g} to {total.max():g}."
            )
        least, most = int(total.abs().sum()), rows * p.numel()
        if count != count.round() or not least <= count <= most:
            raise ValueError(
                f"{who} should give for {key!r} the number of non-zero entries of all samples' gradients, "
                f"`gradients.count_nonzero()`: a whole number, here from Σ |Σ sign g| = {least} to {most}. "
                f"Found {count:g}."
            )


def _is_torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_training_pass() -> bool:
    # vmap and grad of torch.func call the hooked modules too: those calls are not training passes, nor is evaluation.
    return torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


# ======================================================================================================================
# Training many runs at once
# ======================================================================================================================

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults (Kingma & Ba, arXiv 1412.6980), as in torch.optim.Adam


@dataclass(frozen=True)
class Run:
    """One training run. Runs of one `seed` share initial weights and batches, whatever else differs.

    >>> Run(seed=0, lr=0.01, gamma=0.25).placement
    'before'
    >>> Run(seed=0, lr=0.0)
    Traceback (most recent call last):
    ValueError: `lr` should be > 0. Found 0.0.

    `gamma` 0 is plain Adam. `placement` "before" gates the gradient that enters Adam (the card's method), "after" gates
    Adam's finished update. `control` replaces the gate by one that keeps a part of it: "permuted" shuffles it over the
    entries of each weight or bias afresh each step, "layer-mean" puts its mean over each weight or bias in every
    entry, "frozen" keeps the first step's gate for good. `gate` names another gate of `GATES`, or one of `RELATIVES`,
    which have no exponent and take `gamma` 1. `schedule` "cosine" lowers the learning rate to 0 over the run,
    `weight_decay` is AdamW's, `label_smoothing` that of the training loss. Raises TypeError or ValueError naming the
    field.
    """

    seed: int
    lr: float
    gamma: float = 0.0
    placement: str = "before"
    control: str = "none"
    gate: str = "sign"
    schedule: str = "constant"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check("seed", self.seed, int, low=0)
        if check("lr", self.lr, float) <= 0:
            raise ValueError(f"`lr` should be > 0. Found {self.lr!r}.")
        check("gamma", self.gamma, float, low=0.0)
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("control", self.control, CONTROLS)
        check_choice("gate", self.gate, (*GATES, *RELATIVES))
        check_choice("schedule", self.schedule, SCHEDULES)
        check("weight_decay", self.weight_decay, float, low=0.0)
        check("label_smoothing", self.label_smoothing, float, low=0.0, high=1.0)
        if self.gate == "and-mask":
            check("gamma", self.gamma, float, high=1.0)  # a threshold of c
        if self.gate in RELATIVES and (self.gamma, self.control) != (1, "none"):
            raise ValueError(f"`gamma` should be 1, and `control` 'none', for the gate {self.gate!r}. Found {self}.")
        if self.gate == "cautious" and self.placement != "after":
            raise ValueError(f"`placement` should be 'after' for the gate 'cautious'. Found {self.placement!r}.")


EPOCH_CURVES = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy")


def _fields_of(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run: seed, learning rate, γ, placement, and each other field that is not its default in all of them."""
    frame = pd.DataFrame([asdict(run) for run in runs])
    usual = asdict(Run(seed=0, lr=1.0))
    return frame[[name for name in usual if name in list(usual)[:4] or (frame[name] != usual[name]).any()]]


@dataclass
class Curves:
    """What `train` recorded, as NumPy arrays: R runs, T steps, E epochs. A diverged run keeps its NaNs.

    `step_loss` is the loss of each step's batch before the update; `probe_loss` the loss of a fixed batch after it
    (T = 0 unless asked for). The epoch curves are full passes after the epochs in `evaluated`. `fresh_*` are of the
    final model on the fresh sample (NaN unless given).

    >>> curves = train([Run(0, lr=0.01)], load_mnist1d(100), epochs=4, batch_size=16, widths=(40, 10), n_jobs=1)
    >>> curves.step_loss.shape, curves.test_loss.shape  # 64 rows are 4 batches an epoch
    ((1, 16), (1, 4))
    """

    runs: list[Run]
    step_loss: np.ndarray  # [R, T]
    probe_loss: np.ndarray  # [R, T]
    train_loss: np.ndarray  # [R, E]
    train_accuracy: np.ndarray  # [R, E]
    valid_loss: np.ndarray  # [R, E]
    valid_accuracy: np.ndarray  # [R, E]
    test_loss: np.ndarray  # [R, E]
    test_accuracy: np.ndarray  # [R, E]
    fresh_loss: np.ndarray  # [R]
    fresh_accuracy: np.ndarray  # [R]
    evaluated: np.ndarray  # [E]

    def frame(self) -> pd.DataFrame:
        """Tidy: one row a run and evaluated epoch, with the run's fields and the six epoch curves.

        >>> train([Run(0, lr=0.01)], load_mnist1d(100), epochs=2, batch_size=16, widths=(40, 10)).frame().shape
        (2, 11)
        """
        n_runs, n_evaluated = self.train_loss.shape
        runs = _fields_of(self.runs).loc[np.repeat(np.arange(n_runs), n_evaluated)]
        runs = runs.reset_index(drop=True).assign(epoch=np.tile(self.evaluated, n_runs))
        return runs.assign(**{name: getattr(self, name).ravel() for name in EPOCH_CURVES})

    def final(self) -> pd.DataFrame:
        """Tidy: one row a run, with the run's fields, last and best test accuracy, last losses, the fresh sample's
        accuracy and loss, and every smoothness measure of the training loss by epoch (`epoch_*`, where every epoch was
        evaluated) and, where a probe batch was recorded, of the probe loss by step (`probe_*`).

        >>> curves = train([Run(0, lr=0.01)], load_mnist1d(100), epochs=4, batch_size=16, widths=(40, 10))
        >>> curves.final().filter(like="roughness").columns.tolist()
        ['epoch_roughness']
        """
        frame = _fields_of(self.runs).assign(
            final_test_accuracy=self.test_accuracy[:, -1],
            best_test_accuracy=self.test_accuracy.max(1),
            final_test_loss=self.test_loss[:, -1],
            final_train_loss=self.train_loss[:, -1],
            final_valid_accuracy=self.valid_accuracy[:, -1],
            final_valid_loss=self.valid_loss[:, -1],
            fresh_accuracy=self.fresh_accuracy,
            fresh_loss=self.fresh_loss,
        )
        by_epoch = self.train_loss if len(self.evaluated) == self.evaluated[-1] else self.train_loss[:, :0]
        for kind, loss in (("epoch", by_epoch), ("probe", self.probe_loss)):
            if loss.shape[1] >= 4:
                frame = frame.assign(**{f"{kind}_{name}": value for name, value in smoothness(loss).items()})
        return frame


def _stacked_parameters(runs: Sequence[Run], widths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    models = [mlp(widths, seed=run.seed) for run in runs]
    return [
        torch.stack([p.detach() for p in ps]).to(dtype) for ps in zip(*(m.parameters() for m in models), strict=True)
    ]


def _forward(parameters: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All runs' forward pass on x [R, B, in]: the inputs A of each layer and the outputs of each layer."""
    inputs, outputs = [x], []
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        outputs.append(torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT))  # [R, B, out]
        if not outputs[-1].requires_grad and torch.is_grad_enabled():
            outputs[-1].requires_grad_()  # the errors Δ are the gradients at these outputs
        inputs.append(outputs[-1].relu())
    return inputs[:-1], outputs


def _losses(logits: Tensor, y: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """Each run's mean cross-entropy: logits [R, B, classes], labels [R, B], label smoothing [R] -> [R]."""
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    if smoothing is not None:  # towards the uniform distribution (Szegedy et al., arXiv 1512.00567, section 7)
        loss = loss.lerp(-logits.log_softmax(-1).mean(-1), smoothing.unsqueeze(1))
    return loss.mean(1)


@torch.no_grad()
def _evaluate(parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [R] and accuracy [R] of every run on all of x [N, in], in blocks that stay in cache."""
    n_runs, n = len(parameters[0]), len(x)
    loss, correct = torch.zeros(n_runs, dtype=x.dtype), torch.zeros(n_runs, dtype=torch.int64)
    for x_block, y_block in zip(x.split(125), y.split(125), strict=True):
        logits = _forward(parameters, x_block.expand(n_runs, *x_block.shape))[1][-1]
        labels = y_block.expand(n_runs, -1)
        loss += _losses(logits, labels) * len(x_block)
        correct += (logits.argmax(-1) == labels).sum(1)
    return loss / n, correct / n if n else torch.full((n_runs,), math.nan)


def adam_step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[tuple[Tensor, Tensor]],
    lr: Tensor,
    step: int,
    gates: list[Tensor] | None = None,
    weight_decay: Tensor | None = None,
    cautious: bool = False,
) -> None:
    """One step of Adam (Kingma & Ba, algorithm 1) on tensors [R, ...] with a learning rate a run, lr float64 [R].

    Operation by operation what torch.optim.Adam does to one tensor; with `weight_decay` float64 [R], torch.optim.AdamW.
    `gates` scale the finished update; `cautious` keeps of it only what has the gradient's sign. `step` counts from 1;
    `parameters` and `moments` are changed in place.

    >>> p, moments = torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2, 3))
    >>> adam_step_([p], [torch.ones(2, 3)], [moments], torch.tensor([0.1, 0.2], dtype=torch.float64), step=1)
    >>> p[:, 0]  # the first step has the length of the learning rate
    tensor([-0.1000, -0.2000])
    """
    correction1, correction2 = 1 - BETA1**step, 1 - BETA2**step
    for k, (p, g, (m, v)) in enumerate(zip(parameters, gradients, moments, strict=True)):
        if weight_decay is not None:
            p.mul_(align_runs(1 - lr * weight_decay, p))
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        denominator = (v.sqrt() / correction2**0.5).add_(EPSILON)
        update = m * align_runs(-lr / correction1, p)
        if gates is not None:
            update.mul_(gates[k])
        if cautious:
            agrees = (update * g < 0).to(p.dtype)
            update.mul_(agrees / align_runs(agrees.flatten(1).mean(1).clamp_(min=1e-3), p))
        p.addcdiv_(update, denominator)


def _controlled(
    gates: list[Tensor], control: str, first: list[Tensor] | None, generators: list[torch.Generator]
) -> list[Tensor]:
    """Replace gates [R, ...] by the part of them that `control` keeps (see `Run`)."""
    if control == "permuted":
        orders = [torch.stack([torch.randperm(g[0].numel(), generator=own) for own in generators]) for g in gates]
        return [g.flatten(1).gather(1, order).view_as(g) for g, order in zip(gates, orders, strict=True)]
    if control == "layer-mean":
        return [align_runs(g.flatten(1).mean(1), g).expand_as(g) for g in gates]
    return first if control == "frozen" and first is not None else gates


def _stream(seed: int, purpose: int) -> torch.Generator:
    """A generator of its own for each purpose of a seed: 1 the order of batches, 2 the permuted control."""
    state = np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


@torch.no_grad()
def _train_stack(
    runs: Sequence[Run],
    data: Dataset,
    fresh: tuple[Tensor, Tensor] | None,
    gate: Gate | None,
    *,
    epochs: int,
    batch_size: int,
    widths: tuple[int, ...],
    probe_size: int,
    evaluate_every: int,
) -> dict[str, np.ndarray]:
    """Train runs of one placement, control and `gate` (None: plain Adam or a relative) together; see `train`."""
    torch.set_num_threads(1)
    x_train, y_train = data.x_train, data.y_train
    n_runs, n = len(runs), len(x_train)
    gammas, peak_rates, decays, smoothings = (
        torch.tensor([getattr(run, field) for run in runs], dtype=torch.float64)
        for field in ("gamma", "lr", "weight_decay", "label_smoothing")
    )
    weight_decay = decays if decays.any() else None
    smoothing = smoothings.to(x_train.dtype) if smoothings.any() else None
    cosine = torch.tensor([run.schedule == "cosine" for run in runs])
    placement, control = runs[0].placement, runs[0].control
    relative = runs[0].gate if runs[0].gate in RELATIVES else None
    orders, shuffles = [_stream(run.seed, 1) for run in runs], [_stream(run.seed, 2) for run in runs]
    parameters = _stacked_parameters(runs, widths, x_train.dtype)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    probe = x_train[:probe_size].expand(n_runs, -1, -1), y_train[:probe_size].expand(n_runs, -1)
    first_gates, step, log = None, 0, {name: [] for name in ("step_loss", "probe_loss", *EPOCH_CURVES)}
    n_steps = epochs * math.ceil(n / batch_size)

    for epoch in range(1, epochs + 1):
        order = torch.stack([torch.randperm(n, generator=generator) for generator in orders])  # [R, n]
        for batch in order.split(batch_size, dim=1):  # [R, B]
            rates = torch.where(cosine, peak_rates * (1 + math.cos(math.pi * step / n_steps)) / 2, peak_rates)
            step += 1
            with torch.enable_grad():
                inputs, outputs = _forward(parameters, x_train[batch])
                losses = _losses(outputs[-1], y_train[batch], smoothing)  # [R]
                # Runs do not interact, so the gradient of the summed loss is every run's own.
                errors = torch.autograd.grad(losses.sum(), outputs)  # Δ, [R, B, out] a layer
            layers = list(zip(inputs, errors, strict=True))
            gradients = [s for a, delta in layers for s in factored_sums(a, delta, lambda t: t)]
            gates = None
            if gate is not None:
                sums = {"total": gradients}
                for name in set(sums_of(gate)) - {"total"}:
                    sums[name] = [s for a, delta in layers for s in factored_sums(a, delta, SUMS[name])]
                of_tensor = zip(*(sums[name] for name in sums_of(gate)), strict=True)
                gates = [gate(*tensors, batch_size=batch.shape[1], gamma=gammas) for tensors in of_tensor]
                first_gates = first_gates or gates
                gates = _controlled(gates, control, first_gates, shuffles)
                if placement == "before":
                    gradients, gates = [g * own for g, own in zip(gradients, gates, strict=True)], None
            if relative == "vote":
                gradients = [s.sign() for a, delta in layers for s in factored_sums(a, delta, torch.sign)]
            if relative == "vote" and placement == "after":  # signSGD: the votes are the update, without Adam
                for p, votes in zip(parameters, gradients, strict=True):
                    p.sub_(votes * align_runs(rates, p))
            else:
                adam_step_(parameters, gradients, moments, rates, step, gates, weight_decay, relative == "cautious")
            log["step_loss"].append(losses.detach())
            if probe_size:
                with torch.no_grad():
                    log["probe_loss"].append(_losses(_forward(parameters, probe[0])[1][-1], probe[1]))
        if epoch % evaluate_every and epoch != epochs:
            continue
        for part, x, y in (("train", x_train, y_train), ("valid", *data[2:4]), ("test", *data[4:6])):
            loss, accuracy = _evaluate(parameters, x, y)
            log[f"{part}_loss"].append(loss)
            log[f"{part}_accuracy"].append(accuracy)

    curves = {name: torch.stack(rows, 1).numpy() if rows else np.empty((n_runs, 0)) for name, rows in log.items()}
    fresh_loss, fresh_accuracy = _evaluate(parameters, *fresh) if fresh else [torch.full((n_runs,), math.nan)] * 2
    return curves | {"fresh_loss": fresh_loss.numpy(), "fresh_accuracy": fresh_accuracy.numpy()}


def _seal(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays: what a damaged cache entry no longer has."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _sealed_stack(key: str, compute: Callable[[], dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], str]:
    """What is cached: a stack's arrays and their seal. `key` says what `compute` computes."""
    arrays = compute()
    return arrays, _seal(arrays)


def cached(folder: Path, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the named arrays that `compute` computes, read from `folder` where the same `key` was computed before.

    `key` has to say all that they depend on: code (`source_of`), data, settings. joblib notices an entry that can't be
    read, a SHA-256 one that was altered; either is computed again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = cached(Path(folder), "two zeros", lambda: {"zeros": np.zeros(2)})
    ...     again = cached(Path(folder), "two zeros", lambda: {"zeros": np.ones(2)})  # not called
    >>> again["zeros"].tolist()
    [0.0, 0.0]
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    recall = joblib.Memory(folder, verbose=0).cache(_sealed_stack, ignore=["compute"])
    entry = recall(key, compute)
    if not _intact(entry):
        print(f"An entry of the cache in {folder} is damaged: training it again.", file=sys.stderr, flush=True)
        recall.call_and_shelve(key, compute).clear()
        entry = recall(key, compute)
    return entry[0]


def _intact(entry: Any) -> bool:
    try:
        arrays, seal = entry
        return seal == _seal(arrays)
    except (AttributeError, TypeError, ValueError):  # it can be unpickled, but is something else
        return False


def source_of(function: Callable, seen: set[str] | None = None) -> str:
    """The source of a function and of all in this module that it uses: what a cached result depends on.

    Comments, docstrings and layout are left out, so that rewording them keeps the cache.

    >>> print(source_of(noise_floor).splitlines()[1])
        return math.sqrt(2 / (math.pi * check('batch_size', batch_size, int, low=1)))
    """
    seen = set() if seen is None else seen
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    parts = [ast.unparse(tree)]
    names = set(itertools.chain.from_iterable(code.co_names for code in _codes(function)))
    for name in sorted(names & globals().keys() - seen):
        value = globals()[name]
        seen.add(name)
        if callable(value) and getattr(value, "__module__", None) == __name__:
            parts.append(source_of(value, seen))
        elif isinstance(value, dict):
            own = {key: f for key, f in value.items() if getattr(f, "__module__", None) == __name__}
            parts += [f"{name}[{key!r}] = {getattr(f, '__name__', f)}" for key, f in value.items()]
            parts += [source_of(f, seen) for f in own.values()]
        elif isinstance(value, int | float | str | tuple):
            parts.append(f"{name} = {value!r}")
    return "\n".join(parts)


def _codes(function: Any) -> Iterator[Any]:
    """The code objects of a function, or of a class's methods, with those nested in them."""
    functions = vars(function).values() if inspect.isclass(function) else [function]
    pending = [inspect.unwrap(f).__code__ for f in functions if inspect.isfunction(f)]
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if inspect.iscode(constant)]


def train(
    runs: Iterable[Run],
    data: Dataset,
    *,
    epochs: int = 50,
    batch_size: int = 128,
    widths: Sequence[int] = (40, 128, 128, 10),
    probe_size: int = 0,
    fresh: tuple[Tensor, Tensor] | None = None,
    evaluate_every: int = 1,
    stack_size: int = 8,
    n_jobs: int = -1,
    scheduler: str = "",
    cache: str | os.PathLike | None = None,
    progress: str | None = None,
) -> Curves:
    """Train multi-layer perceptrons with Adam and SGSC, many runs at once; return their `Curves` in order of `runs`.

    >>> runs = [Run(seed, lr=0.01, gamma=gamma) for seed in (0, 1) for gamma in (0.0, 0.25)]
    >>> curves = train(runs, load_mnist1d(500), epochs=2, widths=(40, 8, 10), n_jobs=1)
    >>> curves.test_accuracy.shape, len(curves.frame())
    ((4, 2), 8)

    Up to `stack_size` runs are stacked on a leading axis and trained together on one thread, stacks in parallel on
    `n_jobs` processes (-1: one a core), or on the workers of the Dask cluster whose `scheduler` has this address
    ("tcp://host:port"; they need this module installed). Run r gives the same numbers, bit for bit, alone and in any
    stack: it has own generators for its initial weights and its batches. The last batch of an epoch may be smaller, as
    with a DataLoader.

    `probe_size` > 0 also records the loss of the first `probe_size` training rows after every step. `fresh` is a sample
    (x [N, in], y [N]) on which the final models are evaluated. All rows are evaluated after each `evaluate_every`-th
    epoch, and the last. `cache` is a folder: a stack computed before by the same code on the same data is read from it
    instead. `progress` is a label under which stacks done and time left are printed to stderr. Raises TypeError or
    ValueError, naming the parameter, before any training.
    """
    runs = list(runs)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise TypeError(f"`runs` should be a non-empty list of Run. Found {runs[:3]!r}.")
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "widths": widths, "probe_size": probe_size}
    settings = check_training(data, **settings)
    settings["evaluate_every"] = min(check("evaluate_every", evaluate_every, int, low=1), epochs)
    check("stack_size", stack_size, int, low=1)
    groups: dict[Any, list[int]] = {}  # a stack shares placement, control and gate; without a gate none of them matters
    for r, run in enumerate(runs):
        groups.setdefault((run.placement, run.control, run.gate) if run.gamma else None, []).append(r)
    for name in {run.gate for run in runs if run.gamma} & GATES.keys():
        check_gate(name, GATES[name])
    stacks = [group[i : i + stack_size] for group in groups.values() for i in range(0, len(group), stack_size)]

    engine = engine_version()
    made_by = [engine, sha256_of(*data), sha256_of(*fresh) if fresh else None, settings]

    def job(stack: list[int]) -> Any:
        stacked = [runs[r] for r in stack]
        gate = GATES.get(stacked[0].gate) if stacked[0].gamma else None
        compute = partial(by_same_engine, engine, _train_stack, stacked, data, fresh, gate, **settings)
        if cache is None:
            return joblib.delayed(compute)()
        key = json.dumps([made_by, source_of(gate) if gate else None, [asdict(run) for run in stacked]])
        return joblib.delayed(cached)(Path(cache) / "runs", key, compute)

    threads = torch.get_num_threads()
    try:
        with on_workers(scheduler, n_jobs, len(stacks)):
            results = joblib.Parallel(return_as="generator")(map(job, stacks))
            label = progress and f"{progress}, stacks of up to {stack_size} runs"
            results = list(with_progress(results, len(stacks), label))
    finally:
        torch.set_num_threads(threads)
    back = np.argsort(np.concatenate(stacks))
    last = settings["evaluate_every"]
    evaluated = np.unique([*range(last, epochs + 1, last), epochs])
    arrays = {name: np.concatenate([result[name] for result in results])[back] for name in results[0]}
    curves = Curves(runs, **arrays, evaluated=evaluated)
    lost = [run for run, loss in zip(runs, curves.train_loss, strict=True) if not np.isfinite(loss).all()]
    for name in {run.gate for run in lost if run.gamma} & GATES.keys():
        if getattr(GATES[name], "__module__", "") != __name__:  # of a tested gate it is the learning rate
            warnings.warn(
                f"The loss of {sum(run.gate == name for run in lost)} runs with the gate {name!r} is not finite: the "
                "gate makes NaN or infinity of some sums, or the learning rate is too high.",
                stacklevel=2,
            )
    return curves


def check_training(
    data: Dataset, *, epochs: int, batch_size: int, widths: Sequence[int], probe_size: int = 0
) -> dict[str, Any]:
    """Return the settings of a training run, checked against the data; TypeError or ValueError names what is wrong.

    >>> check_training(load_mnist1d(100), epochs=2, batch_size=16, widths=[40, 10])
    {'epochs': 2, 'batch_size': 16, 'widths': (40, 10), 'probe_size': 0}
    """
    widths, classes = _check_widths(widths), int(data.y_train.max()) + 1
    if widths[0] != data.x_train.shape[1] or widths[-1] < classes:
        raise ValueError(
            f"`widths` should start with {data.x_train.shape[1]}, the number of features, and end with at "
            f"least {classes}, the number of classes. Found {widths}."
        )
    return {
        "epochs": check("epochs", epochs, int, low=1),
        "batch_size": check("batch_size", batch_size, int, low=1, high=len(data.x_train)),
        "widths": widths,
        "probe_size": check("probe_size", probe_size, int, low=0, high=len(data.x_train)),
    }


def by_same_engine(version: list[str], function: Callable[..., Any], *given: Any, **settings: Any) -> Any:
    """Return `function(*given, **settings)`, or raise RuntimeError where this process has not that `engine_version`.

    A worker on another machine may have another sgsc_lib, another torch, or a processor that rounds otherwise.

    >>> by_same_engine(engine_version(), abs, -1)
    1
    """
    if version != engine_version():
        raise RuntimeError(
            "A worker should have the sgsc_lib, the torch and the arithmetic of the process that calls it, "
            f"{version}. Found {engine_version()}: install the same on the workers, and start them with the same "
            "ATEN_CPU_CAPABILITY, MKL_CBWR, ONEDNN_MAX_CPU_ISA and NPY_DISABLE_CPU_FEATURES."
        )
    return function(*given, **settings)


def engine_version() -> list[str]:
    """What a trained run's bits depend on, beside its own settings: the code, torch and the `arithmetic`.

    >>> engine_version()[1] == torch.__version__
    True
    """
    return [hashlib.sha256(source_of(_train_stack).encode()).hexdigest(), torch.__version__, arithmetic()]


@lru_cache
def arithmetic() -> str:
    """Fingerprint of how this process rounds: where two differ, the same runs end in other bits.

    The width of a processor's vectors decides in which order a sum is taken, and PyTorch, MKL, oneDNN and NumPy each
    choose their instructions by it, or by a variable of the environment. Some steps of training, a convolution and some
    logarithms show the choice, whatever made it.

    >>> len(arithmetic())
    12
    """
    threads = torch.get_num_threads()
    x, y = torch.randn(512, 40, generator=_stream(0, 1)), torch.arange(512) % 10
    runs = [Run(seed, lr=0.01, gamma=0.25) for seed in range(8)]
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 128, "widths": (40, 128, 128, 10), "probe_size": 0}
    try:
        shown = _train_stack(runs, Dataset(*(x, y) * 3), None, GATES["sign"], evaluate_every=1, **settings)
        kernels = torch.randn(25, 25, 3, generator=_stream(1, 1))
        shown["convolution"] = F.conv1d(x[:500].view(20, 25, 40), kernels, stride=2, padding=1).numpy()
    finally:
        torch.set_num_threads(threads)
    for kind in (np.float32, np.float64):
        numbers = np.linspace(0.01, 9, 1000, dtype=kind)
        shown |= {f"{f.__name__} {numbers.dtype}": f(numbers) for f in (np.log, np.exp)}
    return _seal(shown)[:12]


@contextmanager
def on_workers(scheduler: str, n_jobs: int, n_tasks: int) -> Iterator[None]:
    """Where joblib runs what it is given: processes on this machine, or the workers of a Dask scheduler.

    >>> with on_workers("", n_jobs=1, n_tasks=2):
    ...     joblib.Parallel()(joblib.delayed(abs)(k) for k in (-1, -2))
    [1, 2]
    """
    if not scheduler:
        own = {"initializer": _end_with, "initargs": (os.getpid(),)}
        with joblib.parallel_config("loky", n_jobs=min(joblib.effective_n_jobs(n_jobs), n_tasks), **own):
            yield
        return
    from distributed import Client  # only a cluster needs it

    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`scheduler` should be the address of a running Dask scheduler, like 'tcp://127.0.0.1:8786'. "
            f"Found {scheduler!r}: {error}"
        ) from None
    with client, joblib.parallel_config("dask", client=client, n_jobs=-1):
        yield


def _end_with(parent: int) -> None:
    """Have this worker end when the process that it works for is gone.

    A worker whose parent was killed in the middle of handing it a task would wait for the rest of it for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def duration(seconds: float) -> str:
    """A length of time as it is told.

    >>> duration(48.2), duration(200)
    ('48 s', '3 min 20 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def with_progress(items: Iterable, total: int, label: str | None) -> Iterator:
    """Pass `items` on, printing how many of `total` are done and about how long the rest takes, every 10 seconds.

    To stderr, under the `label`; None prints nothing.

    >>> sum(with_progress((k * k for k in range(4)), 4, "squares"))
    14
    """
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        now = time.monotonic()
        if label and (now - last > 10 or done == total):
            left = (now - start) / done * (total - done)
            print(
                f"  {label}: {done}/{total} done, {duration(now - start)} so far, about {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )
            last = now
        yield item


# ======================================================================================================================
# Tuning
# ======================================================================================================================


def tune(
    arms: Mapping[str, Mapping[str, Any]],
    data: Dataset,
    *,
    study: str,
    n_studies: int = 1,
    n_trials: int = 24,
    ask_batch: int = 8,
    n_seeds: int = 1,
    first_seed: int = 10_000,
    storage: str = "",
    cache: str | os.PathLike = CACHE,
    progress: str | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Search every arm's space for the best final validation accuracy; one tidy row a trial, its `Run` fields included.

    An arm is {field of `Run`: Optuna distribution to search, or value to keep}. Each arm has `n_studies` independent
    TPE studies of `n_trials` trials; a trial's value is a mean over `n_seeds` seeds. All studies advance together,
    `ask_batch` trials at a time, so that their runs fill stacks. `settings` go to `train`. Returns the columns `arm`,
    `study`, `trial` (0, 1, … in order), `seed` (its first), the fields, and `valid_accuracy`.

    Trials are kept in an Optuna storage: a journal file in the folder `cache`, or the database at the URL `storage`. A
    search on a journal that was stopped anywhere goes on with the history it would have had; a second one on the same
    journal waits. Several processes on one database share the studies, `n_trials` in all, and lose none to a stop; then
    the history depends on their timing. A study's name ends with a hash of what its trials depend on. Raises TypeError
    or ValueError for a bad setting, number or URL, RuntimeError for a storage that can't be read.

    >>> import tempfile
    >>> from optuna.distributions import FloatDistribution
    >>> arms = {"SGSC": {"lr": FloatDistribution(1e-3, 1e-1, log=True), "gamma": 0.25}}
    >>> small = {"epochs": 1, "widths": (40, 10), "n_jobs": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trials = tune(arms, load_mnist1d(500), study="example", n_trials=4, cache=folder, **small)
    >>> list(trials.columns), len(trials)
    (['arm', 'study', 'trial', 'seed', 'gamma', 'lr', 'valid_accuracy'], 4)
    """
    import optuna
    from optuna.distributions import BaseDistribution, distribution_to_json
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    numbers = {"n_studies": n_studies, "n_trials": n_trials, "ask_batch": ask_batch, "n_seeds": n_seeds}
    for name, value in numbers.items():
        check(name, value, int, low=1)
    searched = {arm: {f: d for f, d in space.items() if isinstance(d, BaseDistribution)} for arm, space in arms.items()}
    kept = {arm: {f: value for f, value in space.items() if f not in searched[arm]} for arm, space in arms.items()}
    if not len(data.x_valid):
        raise ValueError("`data` should have validation rows, on which trials are judged. Found none.")
    training = inspect.signature(train).bind([], data, **settings)
    training.apply_defaults()
    same = check_training(data, **{name: training.arguments[name] for name in ("epochs", "batch_size", "widths")})
    search = [optuna.__version__, source_of(_ask), numbers, first_seed]
    made_by = [engine_version(), sha256_of(*data), same, search]
    studies, journal = {}, Path(cache) / "tuning" / f"{study}.journal"

    def finished(each: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        return each.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

    with _storage(storage, journal) as opened:
        for s, (arm, k) in enumerate(itertools.product(arms, range(n_studies))):
            space = [f"{field} {distribution_to_json(d)}" for field, d in searched[arm].items()]
            gate = GATES.get(kept[arm].get("gate", "sign"))
            depends = [made_by, s, space, kept[arm], source_of(gate) if gate else None]
            digest = hashlib.sha256(json.dumps(depends, default=str).encode()).hexdigest()
            name = f"{study}, {arm}, {k}, {digest[:12]}"
            studies[arm, k] = optuna.create_study(
                study_name=name, storage=opened, direction="maximize", load_if_exists=True
            )
        while left := sum(max(0, n_trials - len(finished(each))) for each in studies.values()):
            asked = []
            for s, ((arm, k), each) in enumerate(studies.items()):
                each.sampler = optuna.samplers.TPESampler(seed=_sampler_seed(s, len(finished(each)), bool(storage)))
                for number, fields in _ask(each, searched[arm], n_trials, ask_batch, shared=bool(storage)):
                    asked.append((k, each, number, kept[arm] | fields))
            runs = [Run(seed=first_seed + 100 * k + i, **fields) for k, _, _, fields in asked for i in range(n_seeds)]
            if not runs and not storage:
                raise RuntimeError(f"The trials in {journal} are not those that a search leaves. Delete it.")
            if not runs:  # another process has the rest
                time.sleep(1)
                continue
            label = f"{progress}, {left} trials left" if progress else None
            curves = train(runs, data, evaluate_every=sys.maxsize, cache=cache, progress=label, **settings)
            scores = curves.valid_accuracy[:, -1].reshape(-1, n_seeds).mean(1)
            for (_, each, number, _), score in zip(asked, scores, strict=True):
                with suppress(UpdateFinishedTrialError):  # another process told the same value in this very moment
                    each.tell(number, float(score), skip_if_finished=True)
            if not storage:
                _seal_journal(journal)
        return pd.DataFrame(
            {
                "arm": arm,
                "study": k,
                "trial": number,
                "seed": first_seed + 100 * k,
                **kept[arm],
                **trial.params,
                "valid_accuracy": trial.value,
            }
            for (arm, k), each in studies.items()
            for number, trial in enumerate(finished(each)[:n_trials])
        )


def _sampler_seed(study: int, n_finished: int, shared: bool) -> int:
    """A seed for a study's next questions; processes that share the study ask with seeds of their own."""
    if not shared:
        return 1_000 * study + n_finished
    process = int.from_bytes(hashlib.sha256(f"{platform.node()} {os.getpid()}".encode()).digest()[:4])
    return int(np.random.SeedSequence([study, n_finished, process]).generate_state(1)[0])


@contextmanager
def _storage(url: str, journal: Path) -> Iterator[optuna.storages.BaseStorage]:
    """Open the trials' storage, a journal for this process alone; errors name it and the way out."""
    from filelock import FileLock, Timeout
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if url:
        yield _database(url)
        return
    journal.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(journal.with_suffix(".held"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Waiting for another search on {journal}; give `storage` to share one.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        try:
            _check_journal(journal)
            opened = JournalStorage(JournalFileBackend(str(journal)))
        except (ValueError, KeyError, TypeError) as error:  # a line that is not what a journal has
            way_out = f"Delete {journal}: the runs are cached, only the search is made again."
            raise RuntimeError(f"The trials' storage can't be read ({error!r}). {way_out}") from error
        yield opened
    finally:
        lock.release()


def _seal_journal(journal: Path) -> None:
    """Write beside a journal how long it is and its SHA-256: what was told by now may only be added to."""
    whole = journal.read_bytes()
    write_text(f"{len(whole)} {hashlib.sha256(whole).hexdigest()}", journal.with_suffix(".seal"))


def _check_journal(journal: Path) -> None:
    """Cut a line that a power cut left unfinished off a journal's end; ValueError where what was sealed has changed."""
    if not journal.exists():
        journal.with_suffix(".seal").unlink(missing_ok=True)
        return
    whole, seal = journal.read_bytes(), journal.with_suffix(".seal")
    if seal.exists():
        length, digest = seal.read_text(encoding="utf-8").split(" ")
        if hashlib.sha256(whole[: int(length)]).hexdigest() != digest:
            raise ValueError("it is not what its seal says: truncated, edited or damaged")
    if not whole.endswith(b"\n"):
        os.truncate(journal, whole.rfind(b"\n") + 1)


def check_services(*, storage: str = "", scheduler: str = "") -> None:
    """Raise ValueError, naming the parameter, where a database or a Dask scheduler that is given does not answer.

    >>> check_services(storage="here")
    Traceback (most recent call last):
    ValueError: `storage` should be empty or a database URL, like 'postgresql+psycopg://…'. Found 'here'.
    """
    if storage:
        _database(storage)
    if scheduler:
        with on_workers(scheduler, 1, 1):
            pass


def _database(url: str) -> optuna.storages.RDBStorage:
    if "://" not in url:
        raise ValueError(f"`storage` should be empty or a database URL, like 'postgresql+psycopg://…'. Found {url!r}.")
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    for wait in (1, 2, 4):
        with suppress(SQLAlchemyError):  # processes that make an empty database's tables at once collide
            return RDBStorage(url)
        time.sleep(wait)
    try:
        return RDBStorage(url)
    except SQLAlchemyError as error:  # the URL stays out of the message: it may hold a password
        raise ValueError(f"`storage` should be the URL of a database that can be opened: {error}") from error


def _ask(
    study: optuna.Study, space: dict[str, BaseDistribution], n_trials: int, ask_batch: int, *, shared: bool
) -> list[tuple[int, dict[str, Any]]]:
    """The trials of a study to train next, by number and fields: new ones, or those that a stop has left open."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    n_finished = sum(t.state == TrialState.COMPLETE for t in trials)
    running = [t for t in trials if t.state == TrialState.RUNNING]
    if n_finished == n_trials:
        return []
    # Training the same fields again gives the same value, so whoever finds an open trial may finish it. Alone, a stop
    # among a batch's answers leaves trials that were asked in full; a stop among its questions is a batch to ask again.
    take_over = n_finished + len(running) >= n_trials if shared else n_finished % ask_batch
    if not shared and not take_over:
        fail, running = running, []
    else:
        fail = [t for t in running if take_over and t.params.keys() != space.keys()]
    for left_open in fail:
        with suppress(UpdateFinishedTrialError):
            study.tell(left_open.number, state=TrialState.FAIL, skip_if_finished=True)
    if take_over:
        return [(t.number, t.params) for t in running if t not in fail][: n_trials - n_finished]
    asked = []
    for _ in range(min(ask_batch, n_trials - n_finished - len(running))):
        with suppress(UpdateFinishedTrialError):  # another process gave up on this one before it was asked in full
            asked.append(study.ask(space))
    if shared:  # two processes may have asked for the last trial at once: the later one is too many
        others = study.get_trials(deepcopy=False)
        for trial in list(asked):
            if sum(t.number < trial.number and t.state != TrialState.FAIL for t in others) >= n_trials:
                asked.remove(trial)
                with suppress(UpdateFinishedTrialError):
                    study.tell(trial, state=TrialState.FAIL)
    return [(trial.number, trial.params) for trial in asked]


# ======================================================================================================================
# Measures
# ======================================================================================================================


def smoothness(loss: Any, *, window: int = 25, spike_threshold: float = 5.0) -> dict[str, np.ndarray]:
    """Smoothness measures of loss curves [..., T], each [...], NaN where a curve is not finite.

    - `total_rise`: Σ max(0, L_t − L_{t−1}), in units of the loss; 0 for a falling curve.
    - `upward_share`: the fraction of steps that rise.
    - `normalised_total_variation`: Σ|L_t − L_{t−1}| / (L_0 − L_{T−1}); 1 for a falling curve, NaN without a net fall.
    - `roughness`: mean squared second difference of log L; NaN where the loss is not positive.
    - `spike_count`: steps above the median of the `window` around them by `spike_threshold` robust deviations
      (1.4826 × the median absolute deviation in the same window); whole windows only, 0 for a monotone curve.
    - `lag1_autocorrelation`: of the changes L_t − L_{t−1}; negative where the loss oscillates from step to step.

    Raises ValueError for fewer than 4 points or an even window.

    >>> float(smoothness([4.0, 2.0, 3.0, 1.0])["total_rise"])
    1.0
    """
    loss = np.asarray(loss, dtype=np.float64)
    if loss.ndim == 0 or loss.shape[-1] < 4:
        raise ValueError(f"`loss` should be [..., T] with T ≥ 4. Found shape {loss.shape}.")
    if check("window", window, int, low=3) % 2 == 0:
        raise ValueError(f"`window` should be odd. Found {window}.")
    check("spike_threshold", spike_threshold, float, low=0.0)
    finite = np.isfinite(loss).all(-1)
    safe = np.where(finite[..., None], loss, 1.0)
    change = np.diff(safe)
    fall = safe[..., 0] - safe[..., -1]
    positive = np.asarray((safe > 0).all(-1))
    centred = change - change.mean(-1, keepdims=True)
    variance = (centred**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        measures = {
            "total_rise": np.maximum(change, 0).sum(-1),
            "upward_share": (change > 0).mean(-1),
            "normalised_total_variation": np.where(fall > 0, np.abs(change).sum(-1) / fall, np.nan),
            "roughness": (np.diff(np.log(np.where(positive[..., None], safe, np.nan)), n=2) ** 2).mean(-1),
            "spike_count": _spikes(safe, window, spike_threshold).sum(-1).astype(float),
            "lag1_autocorrelation": (centred[..., 1:] * centred[..., :-1]).sum(-1) / variance,
        }
    return {name: np.where(finite, value, np.nan) for name, value in measures.items()}


def _spikes(loss: np.ndarray, window: int, threshold: float) -> np.ndarray:
    """[..., T] -> bool [..., T − window + 1]: which points with a whole window around them are spikes."""
    if loss.shape[-1] < window:
        return np.zeros((*loss.shape[:-1], 0), dtype=bool)
    windows = np.lib.stride_tricks.sliding_window_view(loss, window, axis=-1)  # [..., T - window + 1, window]
    deviation = scipy.stats.median_abs_deviation(windows, axis=-1, scale="normal")
    centre = np.median(windows, axis=-1)
    return loss[..., window // 2 : loss.shape[-1] - window // 2] > centre + threshold * deviation


class PairedComparison(NamedTuple):
    """What `compare_paired` found about a − b; the fields in the order in which a table shows them.

    >>> compare_paired([1.0, 2.0, 4.0], [1.0, 1.0, 1.0], margin=0.5).n
    3
    """

    n: int
    mean_difference: float
    ci_low: float  # 95 % t interval
    ci_high: float
    ci90_low: float  # 90 % t interval: inside ± margin is equivalence (two one-sided tests at 5 %)
    ci90_high: float
    p: float
    probability_greater: float  # P(a > b), ties counted half
    probability_low: float
    probability_high: float
    effect_size: float
    correlation: float
    margin: float
    verdict: str


def compare_paired(a: Any, b: Any, *, margin: float) -> PairedComparison:
    """Compare paired values a[k], b[k] (same seed), where more is better, against the smallest difference that matters.

    - mean difference a − b with 95 % and 90 % t intervals;
    - `p` of the two-sided sign-flip permutation test of no difference: all 2ⁿ flips to n = 13, 9,999 random beyond;
    - P(a > b) with a 95 % Wilson interval whose lower end counts ties as losses and upper end as wins;
    - `effect_size`: mean difference in standard deviations of the difference (Cohen's d_z); the pair correlation;
    - `verdict`, in this order: "equivalent" where the 90 % interval lies inside ± `margin` (Schuirmann 1987), "better"
      or "worse" where the 95 % interval lies above or below 0, else "inconclusive".

    For a measure where less is better, negate both. Raises ValueError for unequal or short input, for a value that is
    not finite (a diverged run must be given a value openly, not dropped), and for a margin that is not positive.

    >>> found = compare_paired([0.71, 0.69, 0.73, 0.72], [0.66, 0.65, 0.67, 0.68], margin=0.01)
    >>> round(found.mean_difference, 4), found.verdict
    (0.0475, 'better')
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"`a` and `b` should be equally long, with at least 2 pairs. Found {a.shape} and {b.shape}.")
    if bad := int((~np.isfinite(a) | ~np.isfinite(b)).sum()):
        raise ValueError(f"`a` and `b` should be finite. Found {bad} pairs that are not: give diverged runs a value.")
    if check("margin", margin, float) <= 0:
        raise ValueError(f"`margin` should be > 0. Found {margin!r}.")
    difference, n = a - b, len(a)
    mean, deviation = float(difference.mean()), float(difference.std(ddof=1))
    half95, half90 = (float(scipy.stats.t.ppf(q, n - 1)) * deviation / math.sqrt(n) for q in (0.975, 0.95))
    p = (
        scipy.stats.permutation_test(
            (difference,),
            lambda d, axis: np.abs(d.mean(axis)),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9_999,
            alternative="greater",
            rng=np.random.default_rng(0),
        ).pvalue
        if difference.any()
        else 1.0
    )
    wins, ties = int((difference > 0).sum()), int((difference == 0).sum())
    wilson = [scipy.stats.binomtest(k, n).proportion_ci(method="wilson") for k in (wins, wins + ties)]
    varied = a.std() > 0 and b.std() > 0
    if -margin < mean - half90 and mean + half90 < margin:
        verdict = "equivalent"
    elif abs(mean) > half95:
        verdict = "better" if mean > 0 else "worse"
    else:
        verdict = "inconclusive"
    return PairedComparison(
        n,
        mean,
        mean - half95,
        mean + half95,
        mean - half90,
        mean + half90,
        float(p),
        (wins + ties / 2) / n,
        float(wilson[0].low),
        float(wilson[1].high),
        mean / deviation if deviation else math.copysign(math.inf, mean) if mean else 0.0,
        float(np.corrcoef(a, b)[0, 1]) if varied else math.nan,
        margin,
        verdict,
    )


# ======================================================================================================================
# Results, tables and figures
# ======================================================================================================================


def results_folder(results: str) -> Path:
    """The folder for a notebook's results, made if need be; a relative path counts from the project's root.

    >>> results_folder("report/results/full").relative_to(ROOT).as_posix()
    'report/results/full'
    """
    folder = ROOT / check("results", results, str)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all: beside its place, then moved into it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text("whole", Path(folder) / "note.txt")
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['note.txt']
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV whole or not at all. Floats keep every digit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(pd.DataFrame({"loss": [0.1 + 0.2]}), Path(folder) / "loss.csv")
    ...     (Path(folder) / "loss.csv").read_text()
    'loss\\n0.30000000000000004\\n'
    """
    write_text(frame.to_csv(index=False), path)


CLAIM_COLUMNS = (
    "id",
    "claim",
    "source",
    "setting",
    "measure",
    "n",
    "estimate",
    "ci_low",
    "ci_high",
    "p",
    "verdict",
    "notebook",
    "figure",
)


def write_claims(rows: Sequence[Mapping[str, Any]], folder: Path, *, notebook: str) -> pd.DataFrame:
    """Put a notebook's rows into the folder's `claims.csv`, in place of the rows it put there before, and return them.

    Each row gives all `CLAIM_COLUMNS` but `notebook`. Raises ValueError for another set of columns.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_claims([{"id": "C1", "claim": "no other columns"}], Path(folder), notebook="03")
    Traceback (most recent call last):
    ValueError: claims should have the columns ('id', 'claim', 'source', 'setting', 'measure', 'n', 'estimate', \
'ci_low', 'ci_high', 'p', 'verdict', 'notebook', 'figure'). Found ('id', 'claim', 'notebook').
    """
    own = pd.DataFrame([{**row, "notebook": notebook} for row in rows])
    if set(own.columns) != set(CLAIM_COLUMNS):
        raise ValueError(f"claims should have the columns {CLAIM_COLUMNS}. Found {tuple(own.columns)}.")
    path, own = folder / "claims.csv", own[list(CLAIM_COLUMNS)]
    if path.exists():
        others = _read_csv(path, dtype={"id": str, "notebook": str})
        if tuple(others.columns) != CLAIM_COLUMNS:
            raise ValueError(
                f"{path} should have the columns {CLAIM_COLUMNS}. Found {tuple(others.columns)}: delete it."
            )
        own = pd.concat([others[others["notebook"] != notebook], own])
    write_table(own.sort_values("id", kind="stable"), path)
    return own[own["notebook"] == notebook]


def build_command(profile: str) -> str:
    """The command that builds a profile, by the Python that runs this, if it is the project's own.

    >>> build_command("smoke").endswith("python report/build.py --profile smoke")
    True
    """
    interpreter = Path(sys.executable)
    own = interpreter.is_relative_to(ROOT)
    return f"{interpreter.relative_to(ROOT) if own else 'python'} report/build.py --profile {profile}"


def read_table(path: str | os.PathLike, *, made_by: str) -> pd.DataFrame:
    """Read a CSV that another notebook made; errors name the command that makes it.

    Raises FileNotFoundError where it is missing, and ValueError where it is no table, or where a `manifest.json` beside
    it says otherwise or does not list it.

    >>> read_table("report/results/full/claims.csv", made_by="03_evaluation").columns[:2].tolist()
    ['id', 'claim']
    """
    path = ROOT / path
    manifest, command = path.with_name("manifest.json"), build_command(path.parent.name)
    profile = ROOT / "report" / "profiles" / f"{path.parent.name}.yaml"
    order = f"where {made_by} stands before this notebook in {profile.relative_to(ROOT)}."
    if manifest.exists():
        try:
            listed = json.loads(manifest.read_text(encoding="utf-8"))
            made, digest = made_by in listed["notebooks"], listed["results"].get(path.name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{manifest} is not a manifest ({error!r}). Make it anew: {command}") from error
        if digest is None and path.exists():
            anew = f"{command} --only {made_by}" if made else f"{command}, {order}"
            raise ValueError(f"{path} is of an earlier build: manifest.json does not list it. Make it anew: {anew}")
        if digest and (problem := result_problem(path, digest)):
            raise ValueError(f"{problem} Make it anew: {command}" + f" --only {made_by}" * made)
    if not path.exists():
        how = f"Make it: {command}, {order}" if profile.exists() else f"A relative path starts at {ROOT}."
        raise FileNotFoundError(f"{path} is not there yet: notebook {made_by} makes it. {how}")
    return _read_csv(path)


def result_problem(path: Path, sha256: str) -> str:
    """What is wrong with a result file of which manifest.json gives this SHA-256; empty where nothing is.

    >>> result_problem(ROOT / "none.csv", "0" * 64).removeprefix(str(ROOT))
    '/none.csv is missing.'
    """
    if not path.exists():
        return f"{path} is missing."
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        return f"{path} is not what manifest.json says: truncated, edited or damaged."
    return ""


def _read_csv(path: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **options)
    except (ValueError, pd.errors.EmptyDataError) as error:  # ParserError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not a table ({error}). Delete it and make it anew.") from error


def _check_label(label: str) -> str:
    if not re.fullmatch(r"[\w-]+", label):
        raise ValueError(f"`label` should be letters, digits and hyphens, for links to it. Found {label!r}.")
    return label


def figure(fig: Any, label: str, *, caption: str, alt: str) -> None:
    """Display a matplotlib figure as SVG with a caption and a written alternative, and close it.

    `label`, of letters, digits and hyphens, becomes the id `fig-<label>` that text refers to. Caption and alternative
    are escaped. Raises ValueError for another label, and where caption or alternative are empty.

    >>> import matplotlib.pyplot as plt
    >>> figure(plt.figure(), "empty", caption="Nothing.", alt="An empty figure.")
    <IPython.core.display.HTML object>
    """
    import matplotlib.pyplot as plt
    from IPython.display import HTML, display

    if not alt.strip() or not caption.strip():
        raise ValueError(
            f"Figure {label!r} should have a caption and an alternative text. Found {caption!r} and {alt!r}."
        )
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(fig)
    source = base64.b64encode(buffer.getvalue()).decode()
    display(
        HTML(
            f'<figure id="fig-{_check_label(label)}"><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,'
            f'{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    )


def table(frame: pd.DataFrame, label: str, *, caption: str, formats: Mapping[str, str] | None = None) -> None:
    """Display a table with a caption; `formats` gives a format string a column, like "{:.3f}". Text is escaped.

    >>> table(pd.DataFrame({"p": [0.0312]}), "p", caption="One p value.", formats={"p": "{:.2f}"})
    <IPython.core.display.HTML object>
    """
    from IPython.display import HTML, display

    shown = frame.rename_axis(columns=None)  # pandas would print the axis's name as one more column
    for column, pattern in (formats or {}).items():
        shown[column] = [pattern.format(value) if pd.notna(value) else "–" for value in frame[column]]
    body = shown.to_html(index=False, border=0, escape=True, na_rep="–")
    display(
        HTML(
            f'<figure id="tbl-{_check_label(label)}" class="table"><figcaption>{html.escape(caption)}</figcaption>'
            f'<div class="scroll">{body}</div></figure>'
        )
    )
