"""A second look at a model, with two of a batch's samples: which axes hold the samples, and do they keep apart?

The forward pass runs on two samples, on the first of them twice, and on three. What grows from two to three holds the
samples; what differs from the first to the second in the place of the first sample depends on a neighbour.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sgsc_core.calls import Axis, RandomState, as_it_was, is_close, tensors_in
from sgsc_core.checks import named, unobserved
from sgsc_core.shared import Shape, meetings

Axes = tuple[list[Axis | None], list[Axis | None]]  # of a call's inputs, None for what is no tensor, and its outputs
COUPLED = Axis(-1, 0)
TRIES = 8  # a permutation of two samples leaves them in place every second time


class Seen(NamedTuple):
    """A call in one of the passes."""

    path: str
    inputs: list[Any]
    outputs: list[Tensor]


class Look(NamedTuple):
    """What was found: the axes of each call, by the module's path; where what samples share meets them, by the
    parameter's name, or by the path and the number of the layer's call."""

    axes: dict[str, list[Axes]]
    met: dict[Any, list[int]]


Pass = tuple[list[Seen], dict[Any, list[tuple[Shape, Shape]]]]


def second_look(model: nn.Module, args: tuple, kwargs: dict, rows: int) -> Look:
    """Three passes on at most three samples, more where the model draws random numbers.

    Raises ValueError by a module's name where a sample depends on its neighbours. Where it cannot be found out it
    warns, and returns a Look that says nothing.
    """
    target: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    prefix, leaves = "module." if target is not model else "", tree_flatten((args, kwargs))[0]
    batched = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim and len(t) == rows]
    error = first = None  # type: Exception | None
    for chosen in (batched, batched[:1]):  # a mask [T, T] is no batch, though T be B
        try:
            passes = _passes(target, args, kwargs, rows, prefix, chosen)
        except Exception as found:
            error = found
            continue
        by_path = [_by_path(calls) for calls, _ in passes]
        same = {path for path in by_path[0] if len({len(found.get(path, ())) for found in by_path}) == 1}
        if not all(_equal(a, b) for path in same for a, b in zip(by_path[0][path], by_path[1][path], strict=True)):
            return _unknown("it gives other outputs when it runs again")
        axes = {
            path: [_axes(calls) for calls in zip(*(found[path] for found in by_path), strict=True)] for path in same
        }
        error = _coupling(model, prefix.rstrip("."), axes, [seen.path for seen in passes[0][0]])
        first = first or error
        if error is None:
            break
    if error is not None and isinstance(first, Coupled):
        raise first
    if error is None and chosen != batched and isinstance(first, Coupled):
        warnings.warn(
            "SGSC takes the rows of the first input alone for samples: the outputs depend on pairs of them with the "
            "rows of other inputs. Where these are samples too, c is not defined.",
            stacklevel=2,
        )
    if error is not None:
        return _unknown(f"{type(error).__name__}: {error}")
    axes = {path: [_known(call) for call in calls] for path, calls in axes.items()}
    (_, met), _, (_, met_by_three), *_ = passes
    shared = {key: _axes_of(places, met_by_three[key]) for key, places in met.items() if key in met_by_three}
    return Look(axes, {key: found for key, found in shared.items() if found})


class Coupled(ValueError):
    """A model does not keep samples apart."""


def _coupling(model: nn.Module, top: str, axes: dict[str, list[Axes]], order: list[str]) -> Coupled | None:
    """The first module where a sample depends on its neighbours, if the model's outputs show that one does."""
    outputs = axes[top][0][1]
    if COUPLED not in outputs and any(outputs):  # inside, rows may be in an order of their own
        return None
    for path in dict.fromkeys(order):
        for leaves, what in zip(axes.get(path, [([], [])])[0], ("input", "output"), strict=True):
            if COUPLED in leaves:
                return Coupled(
                    f"`model` should keep the samples apart. Found that a sample's {what} of "
                    f"{named(path, model.get_submodule(path))} depends on its neighbours in the batch. Take that "
                    "operation out, or, if the samples do not lie along the first axis of the model's input, put "
                    "them there (batch_first=True)."
                )
    return None


def _unknown(why: str) -> Look:
    warnings.warn(
        f"SGSC could not look at two of the model's samples ({why[:200]}), so it takes the first axis for that of the "
        "samples and does not know whether they keep apart. check_consistency compares c with a loop over samples.",
        stacklevel=2,
    )
    return Look({}, {})


def _by_path(calls: Sequence[Seen]) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = {}
    for call in calls:
        found.setdefault(call.path, []).append(call)
    return found


def _axes(calls: Sequence[Seen]) -> Axes:
    """The axes of one call, from how it was in each of the passes."""
    two, _, three, *tries = calls
    found: Axes = ([], [])
    for part, leaves in zip((1, 2), found, strict=True):
        for n in range(len(two[part])):
            pairs = [(tries[i][part][n], tries[i + 1][part][n]) for i in range(0, len(tries), 2)]
            leaves.append(_axis(two[part][n], three[part][n], pairs, is_output=part == 2))
    return found


def _known(axes: Axes) -> Axes:
    return tuple([None if axis is COUPLED else axis for axis in leaves] for leaves in axes)  # type: ignore[return-value]


def _equal(a: Seen, b: Seen) -> bool:
    tensors = [[t for t in (*seen.inputs, *seen.outputs) if isinstance(t, Tensor)] for seen in (a, b)]
    return all(is_close(x, y) for x, y in zip(*tensors, strict=True))


def _grown(two: Sequence[int], three: Sequence[int]) -> list[int]:
    return [d for d in range(len(two)) if two[d] != three[d]] if len(two) == len(three) else []


def _axis(two: Any, three: Any, pairs: Sequence[tuple[Any, Any]], *, is_output: bool) -> Axis | None:
    """Where the samples lie in a tensor of two and of three samples; COUPLED where the first sample's part differs in
    one of the pairs of passes, with another neighbour and with a copy of itself."""
    if not all(isinstance(t, Tensor) for t in (two, three, *itertools.chain(*pairs))):
        return None
    grown = _grown(two.shape, three.shape)
    if len(grown) > 1 and is_output:
        return COUPLED  # pairs of samples
    if len(grown) != 1:
        return None
    (dim,) = grown
    fold = three.shape[dim] - two.shape[dim]
    if two.shape[dim] != 2 * fold:
        return None
    if not all(a.shape == b.shape and is_close(a.narrow(dim, 0, fold), b.narrow(dim, 0, fold)) for a, b in pairs):
        return COUPLED if fold == 1 else None  # several rows a sample may lie in another order
    if fold > 1 and all(is_close(a, b) for a, b in pairs):
        return None  # another neighbour changes nothing, which does not show in which order the rows lie
    return Axis(dim, fold)


def _axes_of(of_two: list[tuple[Shape, Shape]], of_three: list[tuple[Shape, Shape]]) -> list[int]:
    """The samples' axis at each place where something shared meets them; [] where it does not do so everywhere."""
    found = []
    for (before, made), (same, other) in zip(of_two, of_three, strict=False):
        grown = _grown(made, other)
        if before != same or len(grown) != 1 or (made[grown[0]], other[grown[0]]) != (2, 3):
            return []
        found.append(grown[0])
    return found if len(found) == len(of_two) == len(of_three) else []


def _passes(model: nn.Module, args: tuple, kwargs: dict, rows: int, prefix: str, batched: Sequence[int]) -> list[Pass]:
    """On two samples, the same again, on three, and then pairs of passes: two samples, and the first of them twice."""
    leaves, spec = tree_flatten((args, kwargs))
    random, last = RandomState(model), rows - 1

    def run(index: list[int]) -> Pass:
        picked = [leaf.detach()[index] if k in batched else leaf for k, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(picked, spec)
        with as_it_was(model):
            return _seen(model, args, kwargs, prefix)

    with torch.random.fork_rng(random.devices), torch.enable_grad(), unobserved():
        random.restore()
        found = [run([0, last])]
        drawn = RandomState(model)
        for index in ([0, last], [0, last, rows // 2]):
            random.restore()
            found.append(run(index))
        state = random
        for _ in range(TRIES if drawn != random else 1):  # other random numbers each time
            for index in ([0, last], [0, 0]):
                state.restore()
                found.append(run(index))
            state = RandomState(model)
    return found


def _seen(model: nn.Module, args: tuple, kwargs: dict, prefix: str) -> Pass:
    seen: list[Seen] = []
    starts: dict[Any, tuple[Any, Shape]] = {p: (prefix + name, tuple(p.shape)) for name, p in model.named_parameters()}

    def keep(path: str, args: tuple, kwargs: dict, output: Any) -> None:
        def copies(leaves: Sequence[Any]) -> list[Any]:  # what is there may be overwritten
            return [t.detach().clone() if isinstance(t, Tensor) else None for t in leaves]

        if isinstance(output, Tensor) and output.grad_fn is not None:
            number = sum(other.path == path for other in seen)
            starts[output.grad_fn] = (path, number), tuple(output.shape)
        seen.append(Seen(path, copies(tree_flatten((args, kwargs))[0]), copies(tensors_in(output))))

    def hook(path: str) -> Any:
        return lambda _, args, kwargs, output: keep(path, args, kwargs, output)

    hooks = [module.register_forward_hook(hook(prefix + path), prepend=True, with_kwargs=True)
             for path, module in model.named_modules() if path]  # fmt: skip
    try:
        output = model.forward(*args, **kwargs)  # not by its own hooks, nor compiled
        keep(prefix.rstrip("."), args, kwargs, output)
    finally:
        for handle in hooks:
            handle.remove()
    met = meetings(tensors_in(output), {start: shape for start, (_, shape) in starts.items()})
    return seen, {starts[start][0]: [(m.before, m.made) for m in places] for start, places in met.items()}
