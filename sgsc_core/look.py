"""A second look at a model, with two of a batch's samples: which axes hold the samples, and do they keep apart?

The forward pass runs on samples 0 and B-1, on sample 0 twice, and on sample 0 alone. What doubles from the last to the
first holds the samples; what differs from the first to the second in the place of sample 0 depends on a neighbour.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sgsc_core.calls import Axis, RandomState, is_close, tensors_in
from sgsc_core.checks import named, unobserved

Axes = tuple[list[Axis | None], list[Axis | None]]  # of a call's inputs, None for what is no tensor, and its outputs
COUPLED = Axis(-1, 0)


class Seen(NamedTuple):
    """A call in one of the passes."""

    path: str
    inputs: list[Any]
    outputs: list[Tensor]


def second_look(model: nn.Module, args: tuple, kwargs: dict, rows: int) -> dict[str, list[Axes]]:
    """The axes of each call of each module, {path: [axes of its calls]}, from three passes on at most two samples.

    Raises ValueError by a module's name where a sample depends on its neighbours. Where it cannot be found out it
    warns, and returns {}.
    """
    target: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    prefix = "module." if target is not model else ""
    try:
        pair, same, alone = _passes(target, args, kwargs, rows, prefix)
        again = _passes(target, args, kwargs, rows, prefix)[0]
    except Exception as error:
        return _unknown(f"{type(error).__name__}: {error}")
    if not [seen.path for seen in pair] == [seen.path for seen in same] == [seen.path for seen in alone]:
        return _unknown("its forward pass takes other ways with other samples")
    if not all(_equal(a, b) for a, b in zip(pair, again, strict=True)):
        return _unknown("it draws random numbers that torch's generator does not give")
    axes: dict[str, list[Axes]] = {}
    for a, b, c in zip(pair, same, alone, strict=True):
        found = [[_axis(*three) for three in zip(*part, strict=True)]
                 for part in ((a.inputs, b.inputs, c.inputs), (a.outputs, b.outputs, c.outputs))]  # fmt: skip
        for leaves, what in zip(found, ("input", "output"), strict=True):
            if COUPLED in leaves:
                module = model.get_submodule(a.path)
                raise ValueError(
                    f"`model` should keep the samples apart. Found that a sample's {what} of {named(a.path, module)} "
                    "depends on its neighbours in the batch. Take that operation out, or, if the samples do not lie "
                    "along the first axis of the model's input, put them there (batch_first=True)."
                )
        axes.setdefault(a.path, []).append((found[0], found[1]))
    return axes


def _unknown(why: str) -> dict[str, list[Axes]]:
    warnings.warn(
        f"SGSC could not run the model on two of its samples ({why[:200]}), so it takes the first axis for that of the "
        "samples and does not know whether they keep apart. check_consistency compares c with a loop over samples.",
        stacklevel=2,
    )
    return {}


def _equal(a: Seen, b: Seen) -> bool:
    tensors = [[t for t in (*seen.inputs, *seen.outputs) if isinstance(t, Tensor)] for seen in (a, b)]
    return all(is_close(x, y) for x, y in zip(*tensors, strict=True))


def _axis(a: Any, b: Any, c: Any) -> Axis | None:
    """Where the samples lie in a tensor that three passes saw; COUPLED where sample 0's part differs."""
    if not isinstance(a, Tensor) or not isinstance(c, Tensor) or a.ndim != c.ndim or a.shape != b.shape:
        return None
    differing = [d for d in range(a.ndim) if a.shape[d] != c.shape[d]]
    if len(differing) != 1 or a.shape[differing[0]] != 2 * c.shape[differing[0]]:
        return None
    dim = differing[0]
    fold = c.shape[dim]
    if is_close(a.narrow(dim, 0, fold), b.narrow(dim, 0, fold)):
        return Axis(dim, fold)
    return COUPLED if fold == 1 else None  # several rows a sample may lie in another order


def _passes(model: nn.Module, args: tuple, kwargs: dict, rows: int, prefix: str) -> list[list[Seen]]:
    leaves, spec = tree_flatten((args, kwargs))
    batched = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim and len(t) == rows]
    random, buffers = RandomState(model), [(b, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(random.devices), torch.enable_grad(), unobserved():
        try:
            for chosen in (batched, batched[:1]):  # a mask [T, T] is no batch, though T be B
                try:
                    found = []
                    for index in ([0, rows - 1], [0, 0], [0]):
                        picked = list(leaves)
                        for k in chosen:
                            picked[k] = leaves[k].detach()[index]
                        random.restore()
                        args, kwargs = tree_unflatten(picked, spec)
                        found.append(_seen(model, args, kwargs, prefix))
                    return found
                except Exception:
                    if chosen == batched[:1]:
                        raise
            return []
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _seen(model: nn.Module, args: tuple, kwargs: dict, prefix: str) -> list[Seen]:
    seen: list[Seen] = []

    def keep(path: str, args: tuple, kwargs: dict, output: Any) -> None:
        def copies(leaves: Sequence[Any]) -> list[Any]:  # what is there may be overwritten
            return [t.detach().clone() if isinstance(t, Tensor) else None for t in leaves]

        seen.append(Seen(path, copies(tree_flatten((args, kwargs))[0]), copies(tensors_in(output))))

    def hook(path: str) -> Any:
        return lambda _, args, kwargs, output: keep(path, args, kwargs, output)

    hooks = [module.register_forward_hook(hook(prefix + path), prepend=True, with_kwargs=True)
             for path, module in model.named_modules() if path]  # fmt: skip
    try:
        keep(prefix.rstrip("."), args, kwargs, model.forward(*args, **kwargs))  # not by its own hooks, nor compiled
    finally:
        for handle in hooks:
            handle.remove()
    return seen
