"""The hooks of SGSC: which calls of a model's modules made which parameter's gradient, and from which samples.

A forward hook keeps a module's call; a hook on its output brings the error; a hook on each parameter tells when
autograd has added to its gradient, and only then do the samples count.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgsc_core.backward import Backward
from sgsc_core.calls import Call, Hook, Pass, RandomState, behind, flattened, rows_of, tensors_in
from sgsc_core.checks import is_training_pass, refuse_coupled, warn_of_direct_calls
from sgsc_core.fused import fused, is_fusible
from sgsc_core.look import Look, second_look
from sgsc_core.plan import Kept, Way, above, problems_of, ways
from sgsc_core.rules import Rule
from sgsc_core.shared import follow
from sgsc_core.sums import Summing


class Recorder(Backward):
    """`sums` by parameter, over the samples since its gradient was cleared, and `samples(name)`."""

    def __init__(
        self, model: nn.Module, rules: Mapping[type, Rule], *, check: bool, active: bool, on_pass: Callable[[], None]
    ) -> None:
        self.model, self.on_pass, self.hooks = model, on_pass, []  # type: nn.Module, Callable[[], None], list[Any]
        self.rules, self.summing = rules, Summing(total=check, active=active)
        self.current: Pass | None = None  # the forward pass under way, or the last one
        self.running = False  # the model's own forward pass is under way
        self.checks, self.looks = check, {}  # type: bool, dict[Any, Look]
        self.look = Look({}, {})  # what the look at samples like these found
        self.places: dict[tuple[str, int], tuple] = {}  # so where each call's samples lie, by path and number
        self.learnt: dict[str, Way] = {}  # what the first batch has shown of parameters
        self.unchecked = self.names() if check else set()
        self.open: set[int] = set()  # backward passes under way, by autograd's number
        self.forget_calls()
        self.start_statistic()
        self.hook()

    def names(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters()}

    # -- setting the hooks, and planning which calls to keep -----------------------------------------------------------

    def hook(self) -> None:
        """Set all hooks, for the parameters as they are now."""
        self.remove()
        model, found, learnt = self.model, ways(self.model, self.rules).items(), self.learnt
        self.ways = {name: learnt.get(name, way) for name, way in found if way.parameter.requires_grad}
        self.modules, self.parameters = [*model.modules()], [*model.parameters()]
        self.parts = parts_of(self.modules)
        self.trained = [p.requires_grad for p in self.parameters]
        self.hooks = [model.register_forward_pre_hook(Hook(self.on_model, model), prepend=True, with_kwargs=True)]
        self.hooks.append(model.register_forward_hook(Hook(self.on_model_end, model), always_call=True))
        held = {path for way in self.ways.values() for owner in way.owners for path in above(owner.path)}
        for path, module in model.named_modules():
            if path in held:  # prepend=True: another hook may replace the output, and a rule needs the layer's own
                before, after = Hook(self.on_entry, module, path), Hook(self.on_call, module, path)
                self.hooks.append(module.register_forward_pre_hook(before))
                self.hooks.append(module.register_forward_hook(after, prepend=True, with_kwargs=True))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self.hooks.append(module.register_forward_pre_hook(Hook(refuse_coupled, module, path)))
        weakly = weakref.ref(self)  # Python's garbage collector does not see the cycles through a tensor's hooks
        for name, way in self.ways.items():
            before_sum, after_sum = partial(on_gradient, weakly, name), partial(on_accumulated, weakly, name)
            self.hooks.append(way.parameter.register_hook(before_sum))
            self.hooks.append(way.parameter.register_post_accumulate_grad_hook(after_sum))
        self.places.clear()
        self.plan()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def plan(self) -> None:
        self.kept = Kept(self.model, self.ways, self.unchecked, self.rules)
        self.summing.total = not self.unchecked.isdisjoint(self.ways)

    # -- a forward pass ------------------------------------------------------------------------------------------------

    def on_model(self, _: str, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not is_training_pass():
            return
        replaced = False
        if not same(parts_of(self.modules), self.parts):
            replaced = not same([*model.parameters()], self.parameters)
            self.modules = [*model.modules()]
            self.parts = parts_of(self.modules)
        if replaced or [p.requires_grad for p in self.parameters] != self.trained:
            if problems := problems_of(model, self.rules):  # some were frozen, thawed, replaced
                raise ValueError("\n".join(problems))
            if replaced and self.checks:
                self.looks, self.learnt, self.unchecked = {}, {}, self.names()
            self.hook()
        self.forget_calls()
        rows = rows_of(args, kwargs)
        self.current, self.running = None, rows is not None  # else the first layer tells how many samples there are
        if rows is not None:
            self.start_pass(rows)
            if self.checks and rows > 1:
                self.look_at(model, args, kwargs, rows)

    def look_at(self, model: nn.Module, args: tuple, kwargs: dict, rows: int) -> None:
        """Look at two samples, and check again, for each new kind of batch: other shapes, training or evaluation."""
        tensors = [t for t in flattened(args, kwargs)[0] if isinstance(t, Tensor)]
        kind = tuple((t.ndim, t.shape[0] == rows, t.shape[1:]) if t.ndim else () for t in tensors), model.training
        if kind not in self.looks:
            for path, module in model.named_modules():  # named before the look blames what stands around
                refuse_coupled(path, module)
            if self.looks:
                self.unchecked = self.names()
                self.plan()
            self.looks[kind] = second_look(model, args, kwargs, rows)
        if self.look is not self.looks[kind]:
            self.look, self.places = self.looks[kind], {}

    def on_model_end(self, _: str, model: nn.Module, args: tuple, output: Any) -> None:
        """Find in autograd's graph where what all samples share meets them, of parameters that may be served so."""
        self.running, this = False, self.current
        if this is None or this.rows < 2 or not is_training_pass():
            return
        follow(self, this, tensors_in(output))

    def on_entry(self, path: str, module: nn.Module, *_: Any) -> None:
        if is_training_pass() and (path in self.kept.again or path in self.kept.candidates):
            self.random[path] = RandomState(module)

    def start_pass(self, rows: int) -> Pass:
        self.on_pass()
        self.current = Pass(rows)
        return self.current

    def on_call(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        """Keep a layer's call. Returns what the layer should return in place of its output, if that changes."""
        names = self.kept.names.get(path)
        if names is None or not is_training_pass():
            return None
        this = self.pass_of(path, args, kwargs)
        number = this.calls.get(path, 0)
        call = Call(path, module, args, kwargs, output, this, self.random.pop(path, None))
        call.names, call.served, call.rule = names.copy(), bool(names), self.kept.rules.get(path)
        self.place(call, number)
        this.calls[path] = number + 1
        this.autocast |= bool(call.autocast["enabled"])
        if call.rule and call.output_axes == [None] and isinstance(output, Tensor):
            self.lone.append((output.grad_fn, number, call))
        replaced = fused(self, call, output, args[0]) if is_fusible(self, call, args, output) else None
        for k, leaf in enumerate(tensors_in(output if replaced is None else replaced)):
            if leaf.requires_grad:
                hooked = behind(leaf, call)
                view = None if hooked is leaf else (leaf.shape, leaf.stride())
                hooked.register_hook(lambda errors, k=k, view=view: self.on_errors(call, k, errors, view))
        return replaced

    def place(self, call: Call, number: int) -> None:
        """Find a call's samples: as in the last pass, if that had as many of the same shapes."""
        key, kind = (call.path, number), call.kind()
        last, *found = self.places.get(key, (None,))
        if last == kind:
            call.axes, call.output_axes, call.known = found
            return
        looked = self.look.axes.get(call.path) if call.rows > 1 else None  # of one sample is all that there is
        call.place(looked[min(number, len(looked) - 1)] if looked else None)
        self.places[key] = kind, call.axes, call.output_axes, call.known

    def pass_of(self, path: str, args: tuple, kwargs: dict) -> Pass:
        """The pass that a call belongs to: the model's; where layers are called directly, that of other layers."""
        in_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing runs layers again
        if self.current and (self.running or in_backward):
            return self.current
        if self.current is None or self.current.counted or path in self.current.calls:
            if not self.running:
                self.forget_calls()
                if self.checks and None not in self.looks:
                    self.looks[None] = Look({}, {})
                    warn_of_direct_calls()
            return self.start_pass(rows_of(args, kwargs) or 0)
        return self.current


def on_gradient(recorder: Callable[[], Recorder | None], name: str, gradient: Tensor) -> None:
    if (alive := recorder()) is not None:
        alive.on_gradient(name, gradient)


def on_accumulated(recorder: Callable[[], Recorder | None], name: str, p: nn.Parameter) -> None:
    if (alive := recorder()) is not None:
        alive.on_accumulated(name, p)


def parts_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What stands in each of some modules, parameters and modules: where it is the same, so are a model's of both."""
    return [part for m in modules for parts in (m._parameters, m._modules) for part in parts.values()]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
