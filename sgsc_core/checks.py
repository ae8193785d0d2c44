"""What SGSC can't compute exactly is refused, by name and with the way out, apart from what computes.

Here are the refusals of a number, a call, a rule's answer or a statistic; `sgsc_core.plan` looks at a whole model.
"""

from __future__ import annotations

import math
import numbers
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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


_quiet, _peek = threading.local(), torch._C._functorch.peek_interpreter_stack


@contextmanager
def unobserved() -> Iterator[None]:
    """Calls of a hooked model in here are not training passes."""
    before, _quiet.now = getattr(_quiet, "now", False), True
    try:
        yield
    finally:
        _quiet.now = before


def is_training_pass() -> bool:
    # vmap and grad of torch.func call the hooked modules too: those calls are not training passes, nor is evaluation.
    if getattr(_quiet, "now", False) or not torch.is_grad_enabled():
        return False
    return _peek() is None


def couples_samples(module: nn.Module) -> bool:
    """Whether it makes one sample's output depend on another's: batch normalisation by the batch's own statistics."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or not module.track_running_stats)


# -- a call, a rule's answer, a statistic ------------------------------------------------------------------------------


def refuse_coupled(path: str, module: nn.Module, *_: Any) -> None:
    if is_training_pass() and couples_samples(module):  # train() may have been called since construction
        raise ValueError(
            f"SGSC does not serve {named(path, module)} in training mode: it couples the samples. "
            "Call its eval(), again after each model.train(), or use GroupNorm."
        )


def refuse_place(path: str, module: nn.Module, shape: Sequence[int], rows: int) -> None:
    raise ValueError(
        f"{named(path, module)} should see the batch's {rows} samples along its first axis. Found an output of shape "
        f"{tuple(shape)}. Keep the batch in front, [{rows}, ...]; without check=False SGSC looks for the samples."
    )


def refuse_overwritten(path: str, module: nn.Module) -> None:
    raise ValueError(
        f"{named(path, module)} should find its input as it was. Found it changed in place after the call: "
        "write x = x + y for x += y, or clone the input."
    )


def warn_of_direct_calls() -> None:
    warnings.warn(
        "SGSC sees layers called without the model's own forward pass. So it takes their first axis for that of the "
        "samples and does not know whether these keep apart.",
        stacklevel=2,
    )


def refuse_second_backward(path: str) -> None:
    raise RuntimeError(
        f"SGSC needs one backward pass for each forward pass. Found a second one at '{path or 'model'}': a sample's "
        "gradient would be a sum over passes. Add the losses up, or run the model again for each backward pass. "
        "Evaluate under torch.no_grad(). Checkpoint with use_reentrant=False."
    )


def refuse_gradients(names: Collection[str], reasons: Collection[str]) -> None:
    tried = f" Found on the way: {'; '.join(dict.fromkeys(reasons))}"[:600] if reasons else ""
    raise RuntimeError(
        f"SGSC cannot compute c of {sorted(names)}: no module's calls explain their gradients. They are used outside "
        "the model's forward pass, in the loss or a penalty, say, or a hook changes their gradients. Move the use into "
        "the model's forward pass, take a penalty out of the loss and add its gradient after the gate (weight_decay of "
        f"AdamW does), or freeze them.{tried}"
    )


def refuse_answer(path: str, module: nn.Module, found: Any, rows: int) -> None:
    """A rule's answer should be {key: per-sample gradients [b, *shape]} for all that is trained."""
    who = f"The rule for {named(path, module)}"
    if not isinstance(found, Mapping):
        raise TypeError(f"{who} should return {{name: gradients [b, *shape]}}. Found {type(found).__name__}.")
    if unknown := found.keys() - module._parameters.keys():
        raise ValueError(f"{who} should cover {sorted(module._parameters)} and no more. Found {sorted(unknown)}.")
    for key, p in trainable(module).items():
        if key not in found:
            raise KeyError(f"{who} should cover {key!r}. Found {sorted(found)}.")
        if isinstance(found[key], Tensor) and found[key].shape != (rows, *p.shape):
            raise ValueError(
                f"{who} should give for {key!r} each sample's gradient, {(rows, *p.shape)}. "
                f"Found {tuple(found[key].shape)}."
            )
        if not isinstance(found[key], Tensor) and not hasattr(found[key], "build"):
            raise TypeError(f"{who} should give for {key!r} a tensor. Found {type(found[key]).__name__}.")


def refuse_unseen(names: Collection[str], samples: int, *, hooked: bool) -> None:
    if not samples and not hooked:
        raise RuntimeError("No statistic: remove() took the hooks off the model. Build SGSC anew.")
    if not samples:
        raise RuntimeError(
            "No statistic yet: call loss.backward() first, on a forward pass made after SGSC was built, and before "
            "scaled_update(). An optimizer that calls backward itself, such as LBFGS, is not served. A model compiled "
            "and run before SGSC was built runs without its hooks: build SGSC first, then compile."
        )
    if names:
        raise RuntimeError(
            f"{sorted(names)} have gradients that no call of their modules explains: they are used outside the model's "
            "forward pass, or their gradients were not made by backward(). Use per_sample_gradients, or freeze them."
        )
