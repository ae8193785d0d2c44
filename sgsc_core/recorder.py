"""The hooks of SGSC: which calls of a model's modules made which parameter's gradient, and from which samples.

A forward hook keeps a module's call; a hook on its output brings the error; a hook on each parameter tells when
autograd has added to its gradient, and only then do the samples count.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgsc_core.calls import Call, Hook, Pass, RandomState, behind, exactly, rows_of, tensors_in
from sgsc_core.checks import (
    is_training_pass,
    named,
    refuse_coupled,
    refuse_place,
    refuse_second_backward,
    warn_of_direct_calls,
)
from sgsc_core.confirm import confirm
from sgsc_core.look import Axes, second_look
from sgsc_core.plan import Kept, above, problems_of, was_cleared, ways
from sgsc_core.rules import Rule
from sgsc_core.shared import Shared, follow
from sgsc_core.sums import Summing, Sums


class Recorder:
    """`sums` by parameter, over the samples since its gradient was cleared, and `samples(name)`."""

    def __init__(
        self, model: nn.Module, rules: Mapping[type, Rule], *, check: bool, active: bool, on_pass: Callable[[], None]
    ) -> None:
        self.model, self.on_pass, self.hooks = model, on_pass, []  # type: nn.Module, Callable[[], None], list[Any]
        self.rules, self.summing = rules, Summing(total=check, active=active)
        self.current: Pass | None = None  # the forward pass under way, or the last one
        self.running = False  # the model's own forward pass is under way
        self.axes: dict[str, list[Axes]] = {}  # what the look at two samples found
        self.looked = not check
        self.unchecked = {name for name, _ in model.named_parameters()} if check else set()
        self.open: set[int] = set()  # backward passes under way, by autograd's number
        self.forget_calls()
        self.start_statistic()
        self.hook()

    def start_statistic(self) -> None:
        self.sums: dict[str, Sums] = {}
        self.total = 0  # samples since
        self.since: dict[str, int] = {}  # of them, those before a parameter's own statistic began
        self.left: dict[str, tuple[Callable, int]] = {}  # each gradient as a backward pass left it, and its version
        self.changed, self.gated = True, False

    def samples(self, name: str) -> int:
        return self.total - self.since.get(name, 0)

    # -- setting the hooks, and planning which calls to keep -----------------------------------------------------------

    def hook(self) -> None:
        """Set all hooks, for the parameters as they are now."""
        self.remove()
        model, found = self.model, ways(self.model, self.rules).items()
        self.ways = {name: way for name, way in found if way.parameter.requires_grad}
        self.parameters = [(p, p.requires_grad) for p in model.parameters()]
        self.hooks = [model.register_forward_pre_hook(Hook(self.on_model, model), prepend=True, with_kwargs=True)]
        self.hooks.append(model.register_forward_hook(Hook(self.on_model_end, model), always_call=True))
        held = {path for way in self.ways.values() for owner in way.owners for path in above(owner.path)}
        for path, module in model.named_modules():
            if path in held:  # prepend=True: another hook may replace the output, and a rule needs the layer's own
                before, after = Hook(self.on_entry, module, path), Hook(self.on_call, module, path)
                self.hooks.append(module.register_forward_pre_hook(before))
                self.hooks.append(module.register_forward_hook(after, prepend=True, with_kwargs=True))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self.hooks.append(module.register_forward_pre_hook(Hook(self.on_batch_norm, module, path)))
        for name, way in self.ways.items():
            before_sum, after_sum = partial(self.on_gradient, name), partial(self.on_accumulated, name)
            self.hooks.append(way.parameter.register_hook(before_sum))
            self.hooks.append(way.parameter.register_post_accumulate_grad_hook(after_sum))
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
        if [(id(p), p.requires_grad) for p in model.parameters()] != [(id(p), own) for p, own in self.parameters]:
            if problems := problems_of(model, self.rules):  # some were frozen, thawed, replaced
                raise ValueError("\n".join(problems))
            self.hook()
        self.forget_calls()
        rows = rows_of(args, kwargs)
        self.current, self.running = None, rows is not None  # else the first layer tells how many samples there are
        if rows is not None:
            self.start_pass(rows)
            if not self.looked and rows > 1:
                self.axes, self.looked = second_look(model, args, kwargs, rows), True

    def on_model_end(self, _: str, model: nn.Module, args: tuple, output: Any) -> None:
        """Find in autograd's graph where what all samples share meets them, of parameters that may be served so."""
        self.running, this = False, self.current
        if this is None or this.rows < 2 or not is_training_pass():
            return
        wanted: dict[Any, Shared] = {node: Shared(call.shapes[0], this, call) for node, call in self.lone}
        self.shared |= {name: shared for shared in wanted.values() for name in shared.names}
        for name, way in self.ways.items():
            if way.again is not None and (way.shared or name in self.unchecked):
                wanted[way.parameter] = self.shared[name] = Shared(way.parameter.shape, this)
        if wanted:
            follow(tensors_in(output), wanted)

    def on_batch_norm(self, path: str, module: nn.Module, *_: Any) -> None:
        refuse_coupled(path, module)

    def on_entry(self, path: str, module: nn.Module, *_: Any) -> None:
        if is_training_pass() and (path in self.kept.again or path in self.kept.candidates):
            self.random[path] = RandomState(module)

    def start_pass(self, rows: int) -> Pass:
        self.on_pass()
        self.current = Pass(rows)
        return self.current

    def forget_calls(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.open.clear()  # of a backward pass that ended in an error
        self.random: dict[str, RandomState] = {}  # before the calls under way
        self.arrived: dict[str, list[Call]] = {}  # calls whose errors are there, by parameter
        self.tried: dict[str, list[Call]] = {}  # the same of candidates, by path
        self.fresh: list[str] = []  # parameters that this backward pass has given a gradient
        self.given: dict[str, Tensor] = {}  # that gradient, of unchecked ones
        self.began: set[int] = set()
        self.made: dict[str, Sums] = {}  # what this backward pass has added
        self.before: dict[str, Sums | None] = {}  # and to what
        self.misplaced: list[str] = []  # layers whose samples were not found
        self.lone: list[tuple[Any, Call]] = []  # calls of layers without them, and autograd's nodes of their outputs
        self.shared: dict[str, Shared] = {}  # what all samples share, by the parameter that it comes from

    def on_call(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        own, again = self.kept.by_rule.get(path, []), self.kept.again.get(path, [])
        if not (own or again or path in self.kept.candidates) or not is_training_pass():
            return
        this = self.pass_of(path, args, kwargs)
        call = Call(path, module, args, kwargs, output, this, self.random.pop(path, None))
        call.names = {*(name for _, name in own), *again}
        call.served, call.rule = bool(call.names), self.kept.rules.get(path)
        if looked := self.axes.get(path):
            call.place(looked[min(this.calls.get(path, 0), len(looked) - 1)])
        this.calls[path] = this.calls.get(path, 0) + 1
        this.autocast |= bool(call.autocast["enabled"])
        if call.rule and call.output_axes == [None] and isinstance(output, Tensor):
            self.lone.append((output.grad_fn, call))
        for k, leaf in enumerate(tensors_in(output)):
            if leaf.requires_grad:
                hooked = behind(leaf, call)
                view = None if hooked is leaf else (leaf.shape, leaf.stride())
                hooked.register_hook(lambda errors, k=k, view=view: self.on_errors(call, k, errors, view))

    def pass_of(self, path: str, args: tuple, kwargs: dict) -> Pass:
        """The pass that a call belongs to: the model's; where layers are called directly, that of other layers."""
        in_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing runs layers again
        if self.current and (self.running or in_backward):
            return self.current
        if self.current is None or self.current.counted or path in self.current.calls:
            if not self.running:
                self.forget_calls()
                if not self.looked:
                    self.looked = True
                    warn_of_direct_calls()
            return self.start_pass(rows_of(args, kwargs) or 0)
        return self.current

    # -- a backward pass: errors arrive at outputs, then autograd adds to the gradients of parameters ------------------

    def on_errors(self, call: Call, k: int, errors: Tensor, view: tuple | None) -> None:
        self.on_backward()
        if call.released and not call.served:  # kept for the check alone
            return
        if k in call.errors or call.released:
            refuse_second_backward(call.path)
        errors = errors.detach()
        call.errors[k] = errors if view is None else errors.contiguous().as_strided(*view)
        if not call.arrived:
            call.arrived = True
            for name in call.names:
                self.arrived.setdefault(name, []).append(call)
            if call.path in self.kept.candidates:
                self.tried.setdefault(call.path, []).append(call)

    def on_backward(self) -> int:
        """Autograd's number of this backward pass, whose end is asked for."""
        task = torch._C._current_graph_task_id()
        if task not in self.open:
            if not self.open:
                self.fresh, self.given, self.made, self.began = [], {}, {}, set()
            self.open.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.on_backward_end(task))
        return task

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        """Before autograd adds to the first parameter's gradient: is there a statistic to add to?"""
        task = self.on_backward()
        if task not in self.began:
            self.began.add(task)
            cleared = [old for old in self.sums if was_cleared(self.ways.get(old), self.left.get(old))]
            if self.gated or len(cleared) == len(self.sums):
                self.start_statistic()
            for old in cleared:
                self.sums.pop(old, None)
                self.since[old] = self.total
        if name in self.unchecked:
            self.given[name] = gradient.detach()

    def on_accumulated(self, name: str, p: nn.Parameter) -> None:
        self.fresh.append(name)
        if p.grad is not None:
            self.left[name] = weakref.ref(p.grad), p.grad._version
        calls, shared = self.arrived.get(name, []), self.shared.get(name)
        with exactly(p):
            if shared and shared.explains(calls):
                self.add(name, [shared], self.of_shared(name, shared))
            elif self.ways[name].again is None and calls:
                self.add(name, calls, self.of_rules(name, calls))
            else:
                return  # a module is run again at the end, or nothing is known of it
            self.arrived.pop(name, None)

    def of_shared(self, name: str, shared: Shared) -> Sums | None:
        shared.used = True
        if shared.call is None:
            return self.summing(shared.errors)
        return self.of_rules(name, [shared.spread()])

    def of_rules(self, name: str, calls: list[Call]) -> Sums | None:
        if not calls[0].rows:
            return None  # an empty shard
        if lost := [call for call in calls if not self.summing.is_placed(call)]:
            where, shape = named(lost[0].path, lost[0].module), tuple(lost[0].shapes[0])
            if name not in self.unchecked:
                refuse_place(where, shape, lost[0].rows)
            self.misplaced.append(f"{where} gives {shape}, where no axis holds the {lost[0].rows} samples")
            return None  # so that the check looks for another way
        uses = [(call, key) for call in calls for key, own in self.kept.by_rule[call.path] if own == name]
        if len(uses) > 1:
            return self.summing.of_uses(uses)
        call, key = uses[0]
        if call.found is None:
            call.found = self.summing.of_layer(call)
        return call.found.pop(key)

    def of_module(self, path: str, calls: list[Call], names: list[str]) -> dict[str, Sums]:
        inside = {p: key for key, p in self.model.get_submodule(path).named_parameters()}
        keys = {inside[self.ways[name].parameter]: name for name in names}
        found = self.summing.of_module(calls, {key: self.ways[name].parameter for key, name in keys.items()})
        return {keys[key]: sums for key, sums in found.items()}

    def add(self, name: str, calls: Sequence[Any], found: Sums | None) -> None:
        if len({id(call.this) for call in calls}) > 1:
            refuse_second_backward(calls[0].path)
        if not (this := calls[0].this).counted:
            this.counted = True
            self.total += this.rows
        self.changed = True
        if found is not None:
            if name not in self.made:  # else another way is taken in this backward pass
                self.before[name] = self.sums.get(name)
            self.made[name], self.sums[name] = found, found + self.before[name]
        for call in calls:
            call.names.discard(name)
            if not call.names and call.path not in self.kept.candidates:
                call.release()

    def on_backward_end(self, task: int) -> None:
        with torch.no_grad(), exactly(*(self.ways[name].parameter for name in self.fresh[:1])):
            for path, names in self.kept.again.items():
                if wanted := [name for name in names if name in self.fresh and name in self.arrived]:
                    calls = self.arrived[wanted[0]]
                    found = self.of_module(path, calls, wanted)
                    for name in wanted:
                        self.add(name, self.arrived.pop(name), found.get(name))
            confirm(self)
        self.open.discard(task)
        if not self.open:
            for call in itertools.chain(*self.tried.values()):
                call.release()
            self.forget_calls()
