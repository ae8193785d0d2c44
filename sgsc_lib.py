"""Soft Gradient Sign Consistency (SGSC) on any model.

`sgsc_core.definition`, offered here too, defines c_p = |(1/B) Σ_i sign(g_ip)| and its gate c_p ** γ. SGSC multiplies
the mean gradient by the gate before the optimizer sees it (placement "before", the method of the research card that
proposes it: `scale_gradients_`), or the optimizer's finished update (placement "after": `scaled_update`).

How a training step goes, in `sgsc_core`: a forward hook keeps each call of a layer, and a hook on its output brings the
error at it (`recorder`). When autograd has added to a parameter's gradient, the layer's rule (`rules`) makes
Σ_i sign(g_i) from the calls that used it (`sums`). So c is of exactly the samples and uses that made `p.grad`. What no
rule serves is recomputed (`again`). On its first batch SGSC checks itself: Σ_i g_i must be the gradient that autograd
gave, parameter by parameter, and a look at two of the samples (`look`) must show that they keep apart. From then on,
where a rule builds every g_i, their sum is the gradient, and autograd makes none of its own (`fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from sgsc_core.calls import RandomState
from sgsc_core.checks import check, named, refuse_unseen
from sgsc_core.definition import (
    as_call,
    factored_sums,
    mlp,
    noise_floor,
    one_by_one,
    per_sample_gradients,
    power_gate,
    sign_consistency,
    statistic_dtype,
)
from sgsc_core.plan import Explanation, as_table, distributed_problems, explain_model, name_of, problems_of, rule_of
from sgsc_core.recorder import Recorder
from sgsc_core.rules import RULES, Rule, per_sample_rule

__all__ = [
    "SGSC",
    "check_consistency",
    "factored_sums",
    "mlp",
    "noise_floor",
    "per_sample_gradients",
    "per_sample_rule",
    "power_gate",
    "sign_consistency",
]

AT_ONCE = 2**18  # gates held while gradients are scaled

if TYPE_CHECKING:
    import pandas as pd  # summary() alone needs it


class SGSC:
    """Soft Gradient Sign Consistency on a PyTorch model: hooks it, and gates its gradients or its updates by c ** γ.

    >>> model = mlp((40, 16, 10), seed=0)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> sgsc = SGSC(model, gamma=0.25)
    >>> x, y = torch.randn(32, 40), torch.randint(10, (32,))
    >>> F.cross_entropy(model(x), y).backward()
    >>> sgsc.scale_gradients_()              # the card's method; or: with sgsc.scaled_update(): optimizer.step()
    >>> optimizer.step()

    Samples lie along the first axis of the model's input, and the loss is a mean or a sum over samples. Several
    backward passes before one gate add up to the c of the whole batch; a parameter's statistic starts anew when its
    gradient was cleared, or after a gate was used. After the first batch, the gradient of a layer whose per-sample
    gradients are built (`Linear` on sequences, convolutions) is their sum: autograd's own but for rounding.

    Parameters: `gamma` ≥ 0. `check`: on the first batch, find the axes of the samples, and compare Σ_i g_i with the
    gradient of autograd; this costs some forward passes on two samples and one more sum a parameter, once. A parameter
    that fails is recomputed in the smallest module that holds, or refused by name. `process_group`: under
    `torch.distributed`, the group whose sign sums are added up, so that c is that of the global batch
    (`dist.group.WORLD` for all processes); every process must then gate at the same time. `count_active`: count the
    non-zero entries too, for `summary`.
    Raises TypeError or ValueError on construction and in the forward pass, RuntimeError for calls out of order and for
    gradients that no call explains.
    """

    rules: dict[type, Rule] = dict(RULES)  # noqa: RUF012 - a table that users extend

    def __init__(
        self,
        model: nn.Module,
        gamma: float,
        *,
        check: bool = True,
        process_group: dist.ProcessGroup | None = None,
        count_active: bool = False,
    ) -> None:
        self.gamma = _check_gamma(gamma)
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
        if problems := [*problems_of(model, self.rules), *distributed_problems(process_group)]:
            raise ValueError("\n".join(problems))
        self._group, self._counts = process_group, count_active
        self._awaits_with = False  # scaled_update() was called, its `with` block not entered
        self._recorder = Recorder(model, self.rules, check=check, active=count_active, on_pass=self._on_pass)
        self._reduced: _Statistic | None = None

    @classmethod
    def explain(cls, model: nn.Module) -> Explanation:
        """How each parameter's c will be computed, or why it cannot be: every problem of the model, before training.

        One `Served(parameter, module, rule, cost, problem)` a parameter, and one for each module that is refused
        although it owns none; it prints as a table. `rule` is "frozen" where nothing is computed.

        >>> print(SGSC.explain(nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, affine=False))))
        parameter  module           rule         cost                    problem
        0.weight   0 (Linear)       linear_rule  its gradient once more
                   1 (BatchNorm1d)                                       SGSC does not serve '1' (BatchNorm1d): \
in training mode it couples the samples. Call its eval(), or use GroupNorm.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
        return Explanation(explain_model(model, cls.rules))

    # -- the statistic: which samples it covers, and the sums over all processes ---------------------------------------

    def _on_pass(self) -> None:
        if self._group is None:
            self._reduced = None  # the recorder has the sums; they go when the next statistic starts
        if problems := distributed_problems(self._group):  # the processes may have come after SGSC
            raise ValueError(problems[0])
        if self._awaits_with:
            self._awaits_with = False  # so that a corrected notebook cell can go on with this object
            raise RuntimeError(
                "`scaled_update()` was called but not entered, so that the step after it was the plain optimizer's. "
                "Write: with sgsc.scaled_update(): optimizer.step()"
            )

    def _statistic(self) -> _Statistic:
        recorder = self._recorder
        if self._reduced is None or recorder.changed:
            self._reduced = None  # its sums go before others are made
            parameters = {name: way.parameter for name, way in recorder.ways.items() if way.parameter.requires_grad}
            sums = {name: recorder.sums[name].sign if name in recorder.sums
                    else torch.zeros_like(p, dtype=statistic_dtype(p)) for name, p in parameters.items()}  # fmt: skip
            counts = {name: recorder.samples(name) for name in parameters}
            unseen = [name for name, p in parameters.items()
                      if name not in recorder.sums and p.grad is not None and p.grad.any()]  # fmt: skip
            if self._group is not None:
                unseen = []  # a gradient may come from other processes' samples
                sums = {name: tensor.clone() for name, tensor in sums.items()}  # this process's own sums stay
                device = next(iter(sums.values())).device if sums else None
                samples = torch.tensor([*counts.values()], device=device)
                for work in [dist.all_reduce(t, group=self._group, async_op=True) for t in (samples, *sums.values())]:
                    work.wait()
                counts = dict(zip(parameters, samples.tolist(), strict=True))
            refuse_unseen(unseen, max(counts.values(), default=0), hooked=bool(recorder.hooks))
            self._reduced, recorder.changed = _Statistic(parameters, sums, counts), False
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
        parameters, sums, samples = self._statistic()
        signs = {name: s.to(statistic_dtype(parameters[name])) for name, s in sums.items()}
        return {name: s.abs().div_(max(1, samples[name])) for name, s in signs.items()}

    # -- the gate and its two placements -------------------------------------------------------------------------------

    def _use(self) -> tuple[_Statistic, float]:
        """The statistic and γ, for one gate."""
        gamma = _check_gamma(self.gamma)  # it may be set between steps
        if self._recorder.gated and self._group is None:
            raise RuntimeError("This statistic was used already: call loss.backward() again before the next gate.")
        if self._recorder.gated:  # this process had no batch since then, others may have: it takes part without samples
            self._recorder.start_statistic()
        statistic = self._statistic()
        self._recorder.gated = True
        return statistic, gamma

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
        statistic, gamma = self._use()
        for n, grads, sums in _pieces(statistic):  # so that few gates are held at once, by few calls
            gates = power_gate(_flatten_dense_tensors(sums), n, gamma)
            torch._foreach_mul_(grads, _unflatten_dense_tensors(gates, sums))

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
        (parameters, sums, samples), gamma = self._use()
        gated = []
        for name, p in parameters.items():
            gate = power_gate(sums[name].to(statistic_dtype(p)), max(1, samples[name]), gamma)
            gated.append((p, gate.to(p.dtype), p.detach().clone()))
        start = {p: before for p, _, before in gated}
        with register_optimizer_step_pre_hook(lambda optimizer, *_: _decay(optimizer, start)):
            yield
        with torch.no_grad():
            for p, gate, before in gated:
                p.copy_(torch.where(gate == 1, p, torch.lerp(before, p, gate)))  # lerp(p, ∞, 1) is NaN

    # -- looking, and taking it off ------------------------------------------------------------------------------------

    def summary(self) -> pd.DataFrame:
        """One tidy row a parameter: `parameter, computed, entries, samples`; of c the `mean`, the quantiles `q05, q25,
        q50, q75, q95` and `share_zero`, the share of entries with c = 0; `noise_floor`, E[c] under random signs at this
        number of samples; `rounding`, whether the gradient is zero but for rounding, so that c is noise; and, where
        SGSC was built with `count_active=True`, `active_share`, the share of (sample, entry) pairs with a non-zero
        gradient, which caps c. Needs pandas.

        >>> model = mlp((40, 16, 10), seed=0)
        >>> sgsc = SGSC(model, gamma=0.25)
        >>> F.cross_entropy(model(torch.ones(4, 40)), torch.arange(4)).backward()
        >>> sgsc.summary()["parameter"].tolist()
        ['0.weight', '0.bias', '2.weight', '2.bias']
        """
        import pandas as pd

        parameters, _, samples = self._statistic()
        size = {name: float(p.grad.abs().max()) if p.grad is not None and p.numel() else 0.0
                for name, p in parameters.items()}  # fmt: skip
        largest, rows = max(size.values(), default=0.0), []
        for name, c in self.consistency().items():
            values, n, p = pd.Series(c.detach().cpu().double().flatten().numpy()), samples[name], parameters[name]
            quantiles = {f"q{q:02d}": values.quantile(q / 100) for q in (5, 25, 50, 75, 95)}
            row = {"parameter": name, "computed": self._computed(name), "entries": values.size, "samples": n}
            row |= {"mean": values.mean(), **quantiles, "share_zero": (values == 0).mean()}
            row |= {"noise_floor": noise_floor(max(1, n)), "rounding": size[name] <= _rounding(p) * largest}
            if self._counts:
                own = self._recorder.sums.get(name)
                row["active_share"] = float(own.active or 0) / (n * values.size) if own else 0.0
            rows.append(row)
        return pd.DataFrame(rows)

    def _computed(self, name: str) -> str:
        """How c is computed: the rules of the parameter's modules, or the module that is run again."""
        way = self._recorder.ways[name]
        if way.shared:
            return "its part of a broadcast"
        if way.again is not None:
            return f"recomputed in {named(way.again, self._recorder.model.get_submodule(way.again))}"
        return ", ".join(dict.fromkeys(name_of(rule_of(owner.module, self.rules)) for owner in way.owners))

    def remove(self) -> None:
        """Take the hooks off the model; what was computed stays readable.

        >>> model = mlp((40, 10), seed=0)
        >>> with SGSC(model, gamma=0.25):  # removes them at the end of the block
        ...     _ = model(torch.ones(4, 40))
        >>> len(model[0]._forward_hooks)
        0
        """
        self._recorder.remove()

    def __enter__(self) -> SGSC:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _check_gamma(gamma: Any) -> float:
    return check("gamma", gamma, float, low=0.0)


def _rounding(p: Tensor) -> float:
    """How small a gradient is, beside the model's largest, that may well be zero but for rounding."""
    return 100 * torch.finfo(p.dtype).eps


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


def _pieces(statistic: _Statistic) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """The number of samples, and gradients with their sign sums: small ones together, large ones cut."""
    grads, sums, held, kind = [], [], 0, None  # type: list[Tensor], list[Tensor], int, Any
    for name, p in statistic.parameters.items():
        if (grad := p.grad) is None:
            continue
        own, dtype = statistic.sums[name], statistic_dtype(p)
        if own.dtype != dtype:
            own = own.to(dtype)
        mine, pieces = (max(1, statistic.samples[name]), dtype, own.device), [(grad, own)]
        if own.numel() > AT_ONCE and grad.is_contiguous() and own.is_contiguous():
            pieces = list(zip(*(t.view(-1).split(AT_ONCE) for t in (grad, own)), strict=True))
        for piece, its_sums in pieces:
            size = its_sums.numel()
            if grads and (mine != kind or held + size > AT_ONCE):
                yield kind[0], grads, sums
                grads, sums, held = [], [], 0
            kind, held = mine, held + size
            grads.append(piece)
            sums.append(its_sums)
    if grads:
        yield kind[0], grads, sums


class _Statistic(NamedTuple):
    """By name, of all processes together: the parameters, their sign sums, and the number of samples."""

    parameters: dict[str, nn.Parameter]
    sums: dict[str, Tensor]
    samples: dict[str, int]


# ======================================================================================================================
# A check of one's own model
# ======================================================================================================================


class Compared(NamedTuple):
    """A row of `check_consistency`."""

    parameter: str
    served_by: str
    entries: int
    differing: int
    largest: float


class Comparison(list[Compared]):
    """The rows of `check_consistency`; printed, a table."""

    def __str__(self) -> str:
        return as_table(Compared._fields, [(*row[:4], f"{row.largest:.2g}") for row in self])


def check_consistency(
    model: nn.Module, x: Any, y: Any, loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy
) -> Comparison:
    """Compare c of one batch with that of a loop over its samples, a forward and a backward pass each.

    `x` is [B, ...], or a tuple of the model's inputs or a dict of its keyword inputs; `y` is [B, ...]. One row a
    parameter: how c was computed, the number of entries, of those that differ, and the largest difference of c. An
    entry does not count where a sample's gradient is zero but for rounding. Use float64 where you can. The model's own
    gradients stay. Raises ValueError for a model that draws random numbers, such as dropout's.

    >>> print(check_consistency(mlp((40, 10), seed=0), torch.ones(8, 40), torch.arange(8)))
    parameter  served_by    entries  differing  largest
    0.weight   linear_rule  400      0          0
    0.bias     linear_rule  10       0          0
    """
    args, kwargs = as_call(x)
    kept = {p: p.grad for p in model.parameters()}
    before = RandomState(model)
    try:
        for p in kept:
            p.grad = None
        with SGSC(model, gamma=0.0) as sgsc, torch.enable_grad():
            random = RandomState(model)
            output = model(*args, **kwargs)
            if random != RandomState(model):
                before.restore()
                raise ValueError("`model` should draw no random numbers. Found that it does: call model.eval() first.")
            loss_fn(output, y).backward()
        c = sgsc.consistency()
        given = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    finally:
        for p, grad in kept.items():
            p.grad = grad
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n = next(len(t) for t in tree_leaves(x) if isinstance(t, Tensor) and t.ndim)
    # two copies of a sample: a batch of one is a case of its own for some layers (squeeze(), batch norm's kernels)
    found = [one_by_one(model, parameters, x, y, loss_fn, [i, i]) for i in range(n)]
    largest = max(float(g.abs().max()) for each in found for g in each if g.numel())
    rows = Comparison()
    for name, *g in zip(parameters, *found, strict=True):
        per_sample = torch.stack(g)
        off = (c[name] - sign_consistency(per_sample).to(c[name].dtype)).abs()
        # what two ways to the same gradient differ by is rounding; a float64 model may well compute in float32
        rounding = min(float((made - given[name]).abs().max()) for made in (per_sample.mean(0), per_sample.sum(0) / 2))
        near = per_sample.abs() <= 10 * n * rounding + _rounding(per_sample) * largest
        doubtful = ((per_sample != 0) & near).sum(0)
        wrong = off * n > 2 * doubtful + 1e-3
        size = float(off[wrong].max()) if wrong.any() else 0.0
        rows.append(Compared(name, sgsc._computed(name), wrong.numel(), int(wrong.sum()), size))
    return rows
