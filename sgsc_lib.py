"""Soft Gradient Sign Consistency (SGSC): the statistic, the factored way to compute it, and the method on any model.

Read top to bottom like a paper. In a batch of B samples, let g_ip be the gradient of sample i's loss with respect to
parameter p. The **sign consistency** of p and the **gate** made from it are

    c_p = | (1/B) Σ_i sign(g_ip) |        in [0, 1]
    gate_p = c_p ** γ                     γ ≥ 0;  γ = 0 leaves everything as it is (0 ** 0 = 1)

SGSC multiplies the mean gradient by the gate before the optimizer sees it (placement "before", the method of the
research card that proposes it: `scale_gradients_`), or the optimizer's finished update (placement "after":
`scaled_update`).

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sgsc_checks import (
    Explanation,
    check,
    couples_samples,
    coupling_hook,
    explain_model,
    is_torchs_own,
    is_training_pass,
    named,
    own_parameters,
    refuse_call,
    refuse_place,
    refuse_sums,
    refuse_unseen,
    second_use_hook,
    trainable,
)

if TYPE_CHECKING:
    import pandas as pd  # summary() alone needs it


# ======================================================================================================================
# The definition: per-sample gradients and their sign consistency
# ======================================================================================================================


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
    any model without coupling between samples; raises ValueError naming the module where batch normalisation couples.

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
# Rules: the statistic of one layer from its input and the error at its output
# ======================================================================================================================

# A rule returns, for each parameter of its module, Σ_i sign(g_i) and the number of non-zero entries of all g_i, which
# tells `summary` how many samples take part. It is given the module, its input A and the error Δ at its output, both
# with the samples along their first axis.
Sums = dict[str, tuple[Tensor, Tensor]]
Rule = Callable[[Any, Tensor, Tensor], Sums]

CHUNK_ELEMENTS = 2**24  # per-sample gradient entries held at once, but for one sample's: 64 MiB in float32


def _sign_sum(per_sample: Tensor) -> Tensor:
    return per_sample.sign().sum(0, dtype=torch.float32)


def _chunks(inputs: Tensor, errors: Tensor, entries: int) -> Iterator[slice]:
    """Cut the batch so that neither the `entries` of a sample's gradient nor its activations exceed CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // max(1, entries, inputs[0].numel(), errors[0].numel()))
    return (slice(start, start + size) for start in range(0, len(inputs), size))


def linear_rule(module: nn.Linear, inputs: Tensor, errors: Tensor) -> Sums:
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


def embedding_rule(module: nn.Embedding, inputs: Tensor, errors: Tensor) -> Sums:
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


def convolution_rule(module: Any, inputs: Tensor, errors: Tensor) -> Sums:
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
        patches = F.unfold(inputs[part], tuple(kernel[1:]), dilation, 0, stride).unflatten(1, (groups, -1))
        gradients = errors[part].unflatten(1, (groups, -1)) @ patches.mT  # [b, groups, out / groups, in · kernel]
        sums += _sign_sum(gradients).view_as(sums)
        active += gradients.count_nonzero()
    bias = errors.sum(2)  # [B, out]
    return {"weight": (sums, active), "bias": (_sign_sum(bias), bias.count_nonzero())}


def per_sample_rule(module: nn.Module, inputs: Tensor, errors: Tensor) -> Sums:
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


# ======================================================================================================================
# SGSC on any model
# ======================================================================================================================


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

    def __init__(self, model: nn.Module, gamma: float, *, process_group: dist.ProcessGroup | None = None) -> None:
        self.gamma = check("gamma", gamma, float, low=0.0)
        if problems := dict.fromkeys(row.problem for row in self.explain(model) if row.problem):
            raise ValueError("\n".join(problems))
        self._model, self._group = model, process_group
        self._pass: _Pass | None = None  # the forward pass under way
        self._awaits_with = False  # scaled_update() was called, its `with` block not entered
        self._start_statistic()
        # prepend=True: another hook may replace the output, and the rules need the layer's own.
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._model_hook(), prepend=True, with_kwargs=True)]
        self._hooks.append(model.register_forward_hook(second_use_hook(model)))
        for name, module in model.named_modules():
            if own_parameters(module) and type(module) in self.rules:
                hook = self._layer_hook(name, module)
                self._hooks.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._hooks.append(module.register_forward_pre_hook(coupling_hook(name, module)))

    @classmethod
    def explain(cls, model: nn.Module) -> Explanation:
        """How each parameter's c will be computed, or why it cannot be: every problem of the model, before training.

        One `Served(parameter, module, rule, problem)` a parameter, and one for each module that is refused although it
        owns none; it prints as a table. `rule` is "frozen" where nothing is computed.

        >>> print(SGSC.explain(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False))))
        parameter  module           rule         problem
        0.weight   0 (Linear)       linear_rule
        0.bias     0 (Linear)       linear_rule
                   1 (BatchNorm1d)               SGSC does not serve '1' (BatchNorm1d): in training mode it couples \
the samples. Call its eval(), or use GroupNorm.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
        return Explanation(explain_model(model, cls.rules))

    # -- a forward hook keeps each layer's input, a tensor hook brings the error at its output, a rule makes the sums --

    def _model_hook(self) -> Callable:
        @torch.compiler.disable
        def on_model(called: nn.Module, args: tuple, kwargs: dict) -> None:
            if called is not self._model or not is_training_pass():  # a deep copy of the model has its hooks
                return
            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), None)
            if first is None:
                self._pass = None  # the first layer tells how many samples there are
            else:
                self._start_pass(first)

        return on_model

    def _start_pass(self, inputs: Tensor) -> _Pass:
        if self._awaits_with:
            self._awaits_with = False  # so that a corrected notebook cell can go on with this object
            raise RuntimeError(
                "`scaled_update()` was called but not entered, so that the step after it was the plain optimizer's. "
                "Write: with sgsc.scaled_update(): optimizer.step()"
            )
        self._pass = _Pass(inputs.shape[:1].numel())
        return self._pass

    def _start_statistic(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._active: dict[str, Tensor] = {}
        self._samples = 0
        self._reduced: _Statistic | None = None
        self._gated = False

    def _layer_hook(self, name: str, module: nn.Module) -> Callable:
        @torch.compiler.disable
        def on_layer(called: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if called is not module or not is_training_pass() or not trainable(module):
                return
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            refuse_call(name, module, tensors, output)
            this = self._pass if self._pass and not self._pass.counted else self._start_pass(tensors[0])
            refuse_place(name, module, tensors[0], this.rows, this.layers)
            held, shape = [tensors[0].detach()], output.shape
            this.layers[name] = False
            # A Linear's output on [B, ..., in] is a view; an in-place ReLU behind it would go round a hook on the view.
            hooked: Any = output._base if output._is_view() and is_torchs_own(module) else output
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
            found = self.rules[type(module)](module, inputs, errors)
        refuse_sums(name, module, found)
        for key in trainable(module):
            full = f"{name}.{key}" if name else key
            total, count = found[key]
            if full in self._sums:
                total, count = self._sums[full].add_(total), self._active[full] + count
            self._sums[full], self._active[full] = total, count

    # -- the statistic: which samples it covers, and the sums over all processes ---------------------------------------

    def _cleared(self) -> bool:
        """Whether the gradients were cleared: None, or all zero (set_to_none=False) although some sample's were not."""
        gradients = [p.grad for p in self._model.parameters() if p.requires_grad and p.grad is not None]
        return not gradients or (not any(g.any() for g in gradients) and any(self._active.values()))

    def _statistic(self) -> _Statistic:
        if self._reduced is None:
            parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
            sums, active, samples = {}, {}, self._samples
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
            refuse_unseen(parameters, self._sums, active, samples, hooked=bool(self._hooks))
            self._reduced = _Statistic(parameters, sums, active, samples)
        return self._reduced

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

    # -- the gate and its two placements -------------------------------------------------------------------------------

    def _gates(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gate, one at a time, so that scaling gradients holds one gate and not all."""
        gamma = check("gamma", self.gamma, float, low=0.0)  # it may be set between steps
        if self._gated and self._group is None:
            raise RuntimeError("This statistic was used already: call loss.backward() again before the next gate.")
        if self._gated:  # this process had no batch since then, others may have: it takes part with no samples
            self._start_statistic()
        parameters, sums, _, samples = self._statistic()
        self._gated = True
        for name, p in parameters.items():
            yield p, power_gate(sums[name].to(_statistic_dtype(p)), samples, gamma)

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

        Weight decay that torch's optimizer decouples from the gradient (AdamW, Adafactor, Muon, and the others'
        `decoupled_weight_decay=True`) is not gated: it acts whatever c is. All else that the step does to a parameter
        is gated, so also what an optimizer from elsewhere calls decoupled. Holds the gates and a copy of the
        parameters for the length of the step; c = 1 gives the ungated step bit for bit. A call that no `with` entered
        is a RuntimeError in the next forward pass.

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
        start = {p: before for p, _, before in gated}
        with register_optimizer_step_pre_hook(lambda optimizer, *_: _decay(optimizer, start)):
            yield
        with torch.no_grad():
            for p, gate, before in gated:
                p.copy_(torch.where(gate == 1, p, torch.lerp(before, p, gate)))  # lerp(p, ∞, 1) is NaN

    # -- looking, and taking it off ------------------------------------------------------------------------------------

    def summary(self) -> pd.DataFrame:
        """One tidy row a parameter: `parameter, entries, samples`; of c the `mean`, the quantiles `q05, q25, q50, q75,
        q95` and `share_zero`, the share of entries with c = 0; `active_share`, the share of (sample, entry) pairs with
        a non-zero gradient, which caps c; and `noise_floor`, E[c] under random signs at this number of samples. Needs
        pandas.

        >>> model = mlp((40, 16, 10), seed=0)
        >>> sgsc = SGSC(model, gamma=0.25)
        >>> F.cross_entropy(model(torch.ones(4, 40)), torch.arange(4)).backward()
        >>> sgsc.summary()["parameter"].tolist()
        ['0.weight', '0.bias', '2.weight', '2.bias']
        """
        import pandas as pd

        _, _, active, samples = self._statistic()
        rows = []
        for name, c in self.consistency().items():
            values = pd.Series(c.detach().cpu().double().flatten().numpy())
            quantiles = {f"q{q:02d}": values.quantile(q / 100) for q in (5, 25, 50, 75, 95)}
            row = {"parameter": name, "entries": values.size, "samples": samples, "mean": values.mean(), **quantiles}
            row |= {"share_zero": (values == 0).mean(), "active_share": int(active[name]) / (samples * values.size)}
            rows.append(row | {"noise_floor": noise_floor(samples)})
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


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, start: dict[nn.Parameter, Tensor]) -> None:
    """Decay copies of parameters as the optimizer is about to decay the parameters, where it decouples that."""
    found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler's: the fused step will do nothing
    if found_inf is not None and found_inf.item():
        return
    always = isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon))
    for group in optimizer.param_groups:
        if (always or group.get("decoupled_weight_decay")) and group["weight_decay"]:
            for p in group["params"]:
                if p in start and p.grad is not None:
                    start[p].mul_(1 - group["lr"] * group["weight_decay"])


@dataclass
class _Pass:
    """One forward pass of a hooked model: its samples, whether they count by now (its backward pass has begun), and its
    layers (True once their errors arrived)."""

    rows: int
    counted: bool = False
    layers: dict[str, bool] = field(default_factory=dict)


class _Statistic(NamedTuple):
    """By name, of all processes together: the parameters, their sign sums and active counts; the number of samples."""

    parameters: dict[str, nn.Parameter]
    sums: dict[str, Tensor]
    active: dict[str, Tensor]
    samples: int


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
