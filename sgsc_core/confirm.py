"""Is Σ_i g_i what autograd says? Where it is not, which module holds all uses of a parameter?

That is asked on the first batch, and of what is run again on every batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgsc_core.checks import refuse_gradients
from sgsc_core.plan import around
from sgsc_core.sums import Sums


def confirm(recorder: Any) -> None:
    """Compare a `Recorder`'s sums of unchecked parameters with the gradients that a backward pass has given them.

    A parameter whose sum differs is used where no rule looks. The modules around it are run again, from the smallest,
    until one explains its gradient; that one serves it from now on. Raises RuntimeError where none does.
    """
    current, made, tried = recorder.current, recorder.made, recorder.tried
    told = [name for name in recorder.fresh if name in recorder.given]
    given = {name: recorder.given[name] for name in told if name not in made or made[name].total is not None}
    given = {name: g for name, g in given.items() if g.isfinite().all()}  # else a scaler looks for its scale
    if not given or (current is not None and not current.rows):
        return
    largest = max(float(g.abs().max()) if g.numel() else 0.0 for g in given.values())
    autocast = bool(current and current.autocast)

    def rows(name: str) -> int:  # of a loss that a module makes inside
        return current.rows if current and recorder.ways[name].again is not None else 1

    wrong = {name for name, g in given.items() if not agrees(made.get(name), g, largest, autocast, rows(name))}
    for name in given.keys() - wrong:
        if name in recorder.shared and recorder.shared[name].used:
            recorder.ways[name] = recorder.ways[name]._replace(shared=True)
    for path in sorted(tried, key=len, reverse=True) if wrong else ():  # from the inside out
        calls = tried[path]
        held = [name for name in sorted(wrong) if path in around(recorder.model, recorder.ways[name].owners)]
        if not held or len({id(call.this) for call in calls}) > 1:
            continue
        try:
            found = recorder.of_module(path, calls, held)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            recorder.misplaced.append(f"{type(error).__name__}: {error}")
            continue
        for name in held:
            if name in found and agrees(found[name], given[name], largest, autocast, calls[0].rows):
                recorder.ways[name] = recorder.ways[name]._replace(again=path, shared=False)
                recorder.add(name, calls, found[name])
                wrong.discard(name)
    if wrong and not tried and not made:
        return  # no hook ran, as in a model that was compiled before: there is no statistic
    if wrong:
        recorder.start_statistic()
        refuse_gradients(wrong, recorder.misplaced)
    if not recorder.unchecked.isdisjoint(given):
        if current is None or current.rows > 1:  # one sample does not show where samples lie
            recorder.unchecked.difference_update(given)
        recorder.learnt |= {name: recorder.ways[name] for name in given}
        recorder.plan()


def agrees(found: Sums | None, given: Tensor, largest: float, autocast: bool, rows: int = 1) -> bool:
    """Whether Σ_i g_i is the gradient, but for rounding. A loss that is made inside may be a sum, where a mean is
    taken for granted: `rows` times as much."""
    if found is None or found.total is None or not given.numel():
        return not given.any()
    coarse = given.dtype in (torch.float16, torch.bfloat16) or autocast
    coarse = coarse or (given.is_cuda and torch.backends.cuda.matmul.allow_tf32)
    precise = 5e-2 if coarse else 2e-4 if given.dtype == torch.float32 else 1e-5
    allowed = precise * float(given.abs().max()) + 100 * torch.finfo(given.dtype).eps * largest
    if any(float(given.sub(found.total, alpha=factor).abs_().max()) <= allowed for factor in {1, rows}):
        return True  # autograd may add samples up in bfloat16, where a sum stands still: then its direction counts
    return coarse and float(torch.cosine_similarity(found.total.flatten(), given.flatten().float(), dim=0)) > 0.9
