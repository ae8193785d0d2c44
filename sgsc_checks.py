"""What SGSC can't compute exactly is refused here, by name and with the way out, apart from what computes.

`explain_model` looks at a model before any training and finds every problem at once; the hooks and the rest look at a
call, a rule's answer or a statistic while it is used. `check` does so for a number.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def check(name: str, value: Any, kind: type, low: float | None = None, high: float | None = None) -> Any:
    """Return `value`, or raise an error that names the parameter, what it should be and what was found.

    `kind` is int, float, bool or str. A bool is not an int, an int is a float, NaN and infinity are never accepted.
    The bounds are inclusive. Raises TypeError for a wrong type and ValueError for a wrong value.
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
    """Return `value` if it is one of `choices`; raise a ValueError that lists them otherwise."""
    if value not in choices:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, choices))}. Found {value!r}.")
    return value


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the module itself owns, by key."""
    return {key: p for key, p in module._parameters.items() if p is not None}


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in own_parameters(module).items() if p.requires_grad}


def named(path: str, module: nn.Module) -> str:
    """The name that a message gives to a module: "'2' (ReLU)"."""
    return f"'{path or 'model'}' ({type(module).__name__})"


def is_torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def is_training_pass() -> bool:
    # vmap and grad of torch.func call the hooked modules too: those calls are not training passes, nor is evaluation.
    return torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


# -- a model, before any training --------------------------------------------------------------------------------------

_REFERENCE = "For a reference on any model without coupling, use per_sample_gradients"


class Served(NamedTuple):
    """How a parameter's c is computed: the module that owns it, the rule, or the problem (empty if none)."""

    parameter: str
    module: str
    rule: str
    problem: str


class Explanation(list[Served]):
    """The rows of `SGSC.explain`; printed, a table."""

    def __str__(self) -> str:
        rows = [Served._fields, *self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def explain_model(model: nn.Module, rules: Mapping[type, Callable]) -> Iterator[Served]:
    owners: dict[nn.Parameter, str] = {}  # who was first to own a parameter
    whole: dict[str, str] = {}  # problems that a module's own modules share
    for path, module in model.named_modules():
        own, who = own_parameters(module), named(path, module).replace("'", "")
        inherited = next((text for above, text in whole.items() if path.startswith(above)), "")
        problem = inherited or _problem(path, module, rules, owners)
        if problem and (isinstance(module, nn.MultiheadAttention) or nn.utils.parametrize.is_parametrized(module)):
            whole[path and f"{path}."] = problem
        rule = rules.get(type(module))
        for key, p in own.items():
            owners.setdefault(p, path or "model")
            served_by = getattr(rule, "__name__", type(rule).__name__) if p.requires_grad else "frozen"
            yield Served(f"{path}.{key}" if path else key, who, "" if problem else served_by, problem)
        if problem and not own and not inherited:
            yield Served("", who, "", problem)


def _problem(path: str, module: nn.Module, rules: Mapping[type, Callable], owners: Mapping[nn.Parameter, str]) -> str:
    """Why this module cannot be served, the first reason of a table, and the way out; empty where it can be."""
    kind, own, mine = type(module), own_parameters(module), trainable(module)
    shared = next((owners[p] for p in mine.values() if p in owners), None)
    twice = len(set(mine.values())) < len(mine)
    parametrized = nn.utils.parametrize.is_parametrized(module) and any(p.requires_grad for p in module.parameters())
    older_norm = is_torchs_own(module) and not own.keys() <= {"weight", "bias"}  # the older weight and spectral norm
    computed = "its weight is computed from other parameters", "Remove the parametrisation"
    inside = ", or move them into a layer of their own" * any(True for _ in module.children())
    add_rule = (
        "Freeze its parameters, or, if it maps one tensor to one tensor, sample by sample, add a rule: "
        f"SGSC.rules[{kind.__name__}] = per_sample_rule{inside}. {_REFERENCE}"
    )
    several_tensors = isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)
    sparse = isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None)
    reasons = [
        (hasattr(module, "_orig_mod"), "hooks set after torch.compile are not run", "Build SGSC first, then compile"),
        (isinstance(module, nn.DataParallel), "it runs on copies of the model", "Use DistributedDataParallel"),
        (couples_samples(module), "in training mode it couples the samples", "Call its eval(), or use GroupNorm"),
        (any(map(nn.parameter.is_lazy, own.values())), "its parameters are not initialised", "Run it once first"),
        (parametrized, *computed),
    ]
    reasons += bool(mine) * [
        (shared is not None, f"it shares a parameter with '{shared}'", _REFERENCE),
        (twice, f"of {sorted(mine)}, two are one parameter", _REFERENCE),
        (several_tensors, "it does not map one tensor to one tensor", f"Freeze its parameters. {_REFERENCE}"),
        (kind not in rules, f"no rule for it, and it owns {sorted(mine)}", add_rule),
        (older_norm, *computed),
        (not _is_rule(rules.get(kind)), "its rule takes no (module, input, error)", "Correct the rule"),
        (any(not p.is_floating_point() for p in own.values()), "its parameters are not real numbers", _REFERENCE),
        (sparse, "sparse gradients and max_norm are not covered", "Use sparse=False, max_norm=None"),
    ]
    found = next((f"{reason}. {way_out}." for applies, reason, way_out in reasons if applies), "")
    return found and f"SGSC does not serve {named(path, module)}: {found}"


def _is_rule(rule: Any) -> bool:
    try:
        inspect.signature(rule).bind(None, None, None)
    except (TypeError, ValueError):  # ValueError: a built-in class, such as dict, has no signature
        return False
    return True


def couples_samples(module: nn.Module) -> bool:
    """Whether it makes one sample's output depend on another's: batch normalisation by the batch's own statistics."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or not module.track_running_stats)


# -- a call, a rule's answer, a statistic ------------------------------------------------------------------------------


def coupling_hook(path: str, module: nn.Module) -> Callable:
    @torch.compiler.disable
    def on_batch_norm(called: nn.Module, _: tuple) -> None:  # train() may have been called since construction
        if called is module and is_training_pass() and couples_samples(module):
            raise ValueError(
                f"SGSC does not serve {named(path, module)} in training mode: it couples the samples. "
                "Call its eval(), or use GroupNorm."
            )

    return on_batch_norm


def refuse_call(path: str, module: nn.Module, tensors: list[Tensor], output: Any) -> None:
    where = named(path, module)
    if torch._C._current_graph_task_id() != -1:  # a backward pass is under way
        raise ValueError(
            f"{where} should run in the forward pass only. Found it run again in the backward pass, by activation "
            "checkpointing: take that off, or use per_sample_gradients."
        )
    if len(tensors) != 1 or not isinstance(output, Tensor):
        raise ValueError(f"{where} should map one tensor to one tensor. Found {len(tensors)} tensor inputs.")


def refuse_place(path: str, module: nn.Module, inputs: Tensor, rows: int, used: Collection[str]) -> None:
    where = named(path, module)
    if path in used:
        raise ValueError(
            f"{where} should be used once in a forward pass. Found a second use: a sample's gradient would be a sum "
            "over the uses. Give each use a layer of its own, or use per_sample_gradients."
        )
    least = {nn.Embedding: 1, nn.Conv1d: 3, nn.Conv2d: 4}.get(type(module), 2)
    if inputs.ndim < least or len(inputs) != rows:
        raise ValueError(
            f"{where} should see the batch's {rows} samples along its first axis. Found an input of shape "
            f"{tuple(inputs.shape)}. Keep the batch in front, [{rows}, ...], and expand what all samples share."
        )


def second_use_hook(model: nn.Module) -> Callable:
    """A hook that looks at the first training pass's graph for a weight that enters it twice, as with
    F.linear(h, embedding.weight): no layer's hook sees that use."""
    checked = False

    @torch.compiler.disable
    def on_output(called: nn.Module, _: tuple, output: Any) -> None:
        nonlocal checked
        if checked or called is not model or not is_training_pass():
            return
        leaves = torch.utils._pytree.tree_leaves(output)
        pending: set[Any] = {t.grad_fn for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None}
        seen, uses = set(pending), Counter[nn.Parameter]()
        while pending:
            for following, _ in pending.pop().next_functions:
                if hasattr(following, "variable"):  # the graph's end at a parameter
                    uses[following.variable] += 1
                elif following is not None and following not in seen:
                    seen.add(following)
                    pending.add(following)
        for path, module in model.named_modules():
            if is_torchs_own(module) and any(uses[p] > 1 for p in own_parameters(module).values()):
                raise ValueError(
                    f"SGSC does not serve {named(path, module)}: its parameters are used a second time "
                    "outside it. Give each use a layer of its own, or use per_sample_gradients."
                )
        checked = True

    return on_output


def refuse_sums(path: str, module: nn.Module, found: Any) -> None:
    who = f"The rule for {named(path, module)}"
    if not isinstance(found, dict):
        raise TypeError(f"{who} should return {{name: (Σ sign g, count)}}. Found {type(found).__name__}.")
    if unknown := found.keys() - module._parameters.keys():
        raise ValueError(f"{who} should cover {sorted(module._parameters)} and no more. Found {sorted(unknown)}.")
    for key, p in trainable(module).items():
        if key not in found:
            raise KeyError(f"{who} should cover {key!r}. Found {sorted(found)}.")
        parts: Sequence[Any] = found[key] if isinstance(found[key], tuple | list) else (found[key],)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if shapes != [tuple(p.shape), ()]:
            raise ValueError(
                f"{who} should give for {key!r} two tensors: Σ sign g over the batch, {tuple(p.shape)}, and the "
                f"number of all g ≠ 0, (). Found {type(found[key]).__name__} of {', '.join(map(str, shapes))}."
            )


def refuse_unseen(
    parameters: dict[str, nn.Parameter], seen: Mapping, active: Mapping[str, Tensor], samples: int, *, hooked: bool
) -> None:
    if not samples and not hooked:
        raise RuntimeError("No statistic: remove() took the hooks off the model. Build SGSC anew.")
    if not samples:
        raise RuntimeError(
            "No statistic yet: call loss.backward() first, on a forward pass made after SGSC was built, and before "
            "scaled_update(). An optimizer that calls backward itself, such as LBFGS, is not served. A model compiled "
            "and run before SGSC was built runs without its hooks: build SGSC first, then compile."
        )
    for name, p in parameters.items():
        if name not in seen and p.grad is not None and not active[name] and p.grad.any():
            raise RuntimeError(
                f"'{name}' has a gradient, but its module's forward was not seen: it is used outside that module, or "
                "was frozen when SGSC was built. Build SGSC anew, or use per_sample_gradients."
            )
