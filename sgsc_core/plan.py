"""How SGSC will compute the c of each parameter of a model: found before any training, from the modules alone.

Where every module that owns a parameter has a rule, the rules serve it, and its uses add up. Where one has none, the
smallest module that should hold all its uses is run again, sample by sample. A model that no way serves is refused here
by the module's name, with a way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from sgsc_core.checks import couples_samples, is_torchs_own, named, own_parameters
from sgsc_core.rules import RULES, per_sample_rule, transposed_linear_rule


class Owner(NamedTuple):
    """A module that owns a parameter, and the parameter's key there."""

    path: str
    module: nn.Module
    key: str


class Way(NamedTuple):
    """How a parameter's c is computed: by the rules of its owners, or, where `again` is not None, by running that
    module again; `shared` where the first batch showed that what all samples share explains it."""

    parameter: nn.Parameter
    owners: tuple[Owner, ...]
    again: str | None
    shared: bool = False


class Served(NamedTuple):
    """A row of `SGSC.explain`: a parameter, its module, how its c is computed and what that costs, or the problem."""

    parameter: str
    module: str
    rule: str
    cost: str
    problem: str


class Explanation(list[Served]):
    """The rows of `SGSC.explain`; printed, a table."""

    def __str__(self) -> str:
        return as_table(Served._fields, self)


def as_table(head: Collection[str], rows: Collection[Collection[Any]]) -> str:
    lines = [list(head), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def rule_of(module: nn.Module, rules: Mapping[type, Callable]) -> Callable | None:
    """The rule that serves a module: its type's, or that of a base class whose forward it runs unchanged."""
    kind: Any = type(module)
    named_rules = {t: RULES.get(t) if rule is per_sample_rule else rule for t, rule in rules.items()}
    rules = {t: rule for t, rule in named_rules.items() if rule}
    if kind in rules and rules[kind] is not RULES.get(kind):
        return rules[kind]  # the user's word
    if "forward" in vars(module) or nn.utils.parametrize.is_parametrized(module):
        return None
    base = next((b for b in kind.__mro__ if b in rules and b.forward is kind.forward), None)
    if base is None:
        is_transposed = kind.__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")
        return transposed_linear_rule if is_transposed else None
    extra = is_torchs_own(module) and not own_parameters(module).keys() <= {"weight", "bias"}  # the older weight norm
    largest = isinstance(module, nn.EmbeddingBag) and module.mode == "max"
    return None if extra or largest else rules[base]


def name_of(rule: Any) -> str:
    return getattr(rule, "__name__", type(rule).__name__)


def owners_of(model: nn.Module) -> dict[nn.Parameter, tuple[str, tuple[Owner, ...]]]:
    """Each parameter's name and its owners."""
    owners: dict[nn.Parameter, list[Owner]] = {}
    for path, module in model.named_modules():
        for key, p in own_parameters(module).items():
            owners.setdefault(p, []).append(Owner(path, module, key))
    names = {p: name for name, p in model.named_parameters()}
    return {p: (names[p], tuple(found)) for p, found in owners.items()}


def runs_itself(model: nn.Module, path: str) -> bool:
    """Whether a module is called, so that it can be run again: a list of parameters is not."""
    module = model.get_submodule(path)
    holders = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict
    unmade = type(module).forward is nn.Module.forward and "forward" not in vars(module)
    return not (unmade or isinstance(module, holders) or ".parametrizations." in f".{path}.")


def above(path: str) -> list[str]:
    """A module's path and those of all modules around it, from the inside out."""
    parts = path.split(".") if path else []
    return [".".join(parts[:k]) for k in range(len(parts), -1, -1)]


def around(model: nn.Module, owners: Collection[Owner]) -> list[str]:
    """The modules that hold all owners and can be run again, from the smallest."""
    shared = [path for path in above(next(iter(owners)).path)
              if all(path in above(owner.path) for owner in owners)]  # fmt: skip
    attention = [path for path in shared if isinstance(model.get_submodule(path), nn.MultiheadAttention)]
    start = shared.index(attention[-1]) if attention else 0  # it reads its projection's weight itself
    return [path for path in shared[start:] if runs_itself(model, path)]


def ways(model: nn.Module, rules: Mapping[type, Callable]) -> dict[str, Way]:
    """By name, how each parameter that is trained or may be is computed."""
    made = {}
    for p, (name, owners) in owners_of(model).items():
        attention = any(isinstance(model.get_submodule(path), nn.MultiheadAttention)
                        for owner in owners for path in above(owner.path))  # fmt: skip
        served = all(rule_of(owner.module, rules) for owner in owners) and not attention
        made[name] = Way(p, owners, None if served else next(iter(around(model, owners)), ""))
    return made


def was_cleared(way: Way | None, left: tuple[Callable, int] | None) -> bool:
    """Whether a gradient was cleared since a backward pass left it: it is None, or it was changed to zeros."""
    grad: Any = way.parameter.grad if way else None
    if grad is None:
        return True
    kept, version = left or (lambda: None, 0)  # type: Any, int
    return bool((kept() is not grad or grad._version != version) and not grad.any())


class Kept:
    """Whose calls are kept: of layers with rules, of modules that run again, of all that an unchecked one may need."""

    def __init__(self, model: nn.Module, ways: Mapping[str, Way], unchecked: Collection[str], rules: Mapping) -> None:
        self.by_rule: dict[str, list[tuple[str, str]]] = {}  # path: [(key, parameter's name)]
        self.rules: dict[str, Any] = {}
        self.again: dict[str, list[str]] = {}  # path: parameters' names
        self.candidates: set[str] = set()
        self.names: dict[str, set[str]] = {}  # path: parameters that its calls serve; only these paths' calls are kept
        for name, way in ways.items():
            if way.again is None:
                for owner in way.owners:
                    self.by_rule.setdefault(owner.path, []).append((owner.key, name))
                    self.rules[owner.path] = rule_of(owner.module, rules)
            else:
                self.again.setdefault(way.again, []).append(name)
            if name in unchecked:
                self.candidates.update(around(model, way.owners))
        for path in {*self.by_rule, *self.again, *self.candidates}:
            self.names[path] = {*(name for _, name in self.by_rule.get(path, ())), *self.again.get(path, ())}


def explain_model(model: nn.Module, rules: Mapping[type, Callable]) -> Iterator[Served]:
    problems = {path: _problem(path, module, rules) for path, module in model.named_modules()}
    found = ways(model, rules)
    for path, module in model.named_modules():
        inherited = next((problems[p] for p in above(path)[1:] if problems[p] and _spreads(model, p)), "")
        problem, who = inherited or problems[path], named(path, module).replace("'", "")
        for key, p in own_parameters(module).items():
            name = f"{path}.{key}" if path else key
            way = found.get(name) or next(w for w in found.values() if w.parameter is p)  # a tied one
            if not p.requires_grad:
                yield Served(name, who, "frozen", "", problem)
            elif way.again is None:
                yield Served(name, who, name_of(rule_of(module, rules)), "its gradient once more", problem)
            else:
                again = named(way.again, model.get_submodule(way.again))
                yield Served(
                    name, who, f"recomputed in {again}", "forward and backward of that again, by sample", problem
                )
        if problem and not own_parameters(module) and not inherited:
            yield Served("", who, "", "", problem)


def _spreads(model: nn.Module, path: str) -> bool:
    return hasattr(model.get_submodule(path), "_orig_mod")


def _problem(path: str, module: nn.Module, rules: Mapping[type, Callable]) -> str:
    """Why no way serves this module, the first reason of a table, and the way out; empty where one does."""
    own = own_parameters(module)
    mine = [p for p in own.values() if p.requires_grad]
    sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None)
    rule = rules.get(type(module))
    sharded = any(hasattr(p, "placements") for p in mine) or type(module).__name__ == "FullyShardedDataParallel"
    reasons = [
        (hasattr(module, "_orig_mod"), "hooks set after torch.compile are not run", "Build SGSC first, then compile"),
        (isinstance(module, nn.DataParallel), "it runs on copies of the model", "Use DistributedDataParallel"),
        (isinstance(module, torch.jit.ScriptModule), "its parts cannot be run one by one", "Use the module as Python"),
        (couples_samples(module), "in training mode it couples the samples", "Call its eval(), or use GroupNorm"),
        (any(map(nn.parameter.is_lazy, own.values())), "its parameters are not initialised", "Run it once first"),
        (sharded, "its parameters are parts of tensors", "Use DistributedDataParallel"),
        (bool(mine) and rule is not None and not _is_rule(rule), "its rule takes no (module, input, error)",
         "Correct the rule"),
        (any(not p.is_floating_point() for p in mine), "its parameters are not real numbers", "Freeze them"),
        (bool(mine) and getattr(module, "scale_grad_by_freq", False), "it scales by how often the batch has a token",
         "Use scale_grad_by_freq=False"),
        (bool(mine) and sparse, "sparse gradients and max_norm are not covered", "Use sparse=False, max_norm=None"),
    ]  # fmt: skip
    found = next((f"{reason}. {way_out}." for applies, reason, way_out in reasons if applies), "")
    return found and f"SGSC does not serve {named(path, module)}: {found}"


def _is_rule(rule: Any) -> bool:
    try:
        inspect.signature(rule).bind(None, None, None)
    except (TypeError, ValueError):  # ValueError: a built-in class, such as dict, has no signature
        return False
    return True


def problems_of(model: nn.Module, rules: Mapping[type, Callable]) -> list[str]:
    """Every problem of a model, each once."""
    return [*dict.fromkeys(row.problem for row in explain_model(model, rules) if row.problem)]


def distributed_problems(group: Any) -> list[str]:
    """Why c would be that of a part of the batch, if it would."""
    dist = torch.distributed
    if group is not None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return []
    return [
        "`process_group` should say whose samples make c, as torch.distributed runs several processes. Found None. "
        "Use dist.group.WORLD for all; for a model of this process alone, dist.new_subgroups(1)[0]."
    ]
