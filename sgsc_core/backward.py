"""A backward pass of a hooked model: errors arrive at outputs, then autograd adds to the gradients of parameters.

Only when it has added to a parameter's gradient do the samples count for that parameter.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgsc_core.calls import Call, Pass, RandomState, exactly
from sgsc_core.checks import named, refuse_place, refuse_second_backward
from sgsc_core.confirm import confirm
from sgsc_core.plan import Kept, Way, was_cleared
from sgsc_core.shared import Shared
from sgsc_core.sums import Summing, Sums


class Backward:
    """The sums of each parameter over the samples since its gradient was cleared, and what makes them."""

    model: nn.Module
    summing: Summing
    ways: dict[str, Way]
    kept: Kept
    unchecked: set[str]
    current: Pass | None  # the forward pass under way, or the last one
    open: set[int]  # backward passes under way, by autograd's number

    def start_statistic(self) -> None:
        self.sums: dict[str, Sums] = {}
        self.total = 0  # samples since
        self.since: dict[str, int] = {}  # of them, those before a parameter's own statistic began
        self.left: dict[str, tuple[Callable, int]] = {}  # each gradient as a backward pass left it, and its version
        self.changed, self.gated = True, False

    def samples(self, name: str) -> int:
        return self.total - self.since.get(name, 0)

    def forget_calls(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.open.clear()  # of a backward pass that ended in an error
        self.random: dict[str, RandomState] = {}  # before the calls under way
        self.arrived: dict[str, list[Call]] = {}  # calls whose errors are there, by parameter
        self.tried: dict[str, list[Call]] = {}  # the same of candidates, by path
        self.fresh: dict[str, None] = {}  # parameters that this backward pass has given a gradient, in order
        self.given: dict[str, Tensor] = {}  # that gradient, of unchecked ones
        self.began: set[int] = set()  # of the open ones, those that have reached a parameter
        self.made: dict[str, Sums] = {}  # what this backward pass has added
        self.before: dict[str, Sums | None] = {}  # and to what
        self.misplaced: list[str] = []  # layers whose samples were not found
        self.lone: list[tuple[Any, int, Call]] = []  # calls without such an axis: autograd's node, number, call
        self.shared: dict[str, Shared] = {}  # what all samples share and has its errors, by the parameter's name

    def on_errors(self, call: Call, k: int, errors: Tensor | None, view: tuple | None) -> None:
        if torch._C._current_graph_task_id() not in self.open:
            self.on_backward()
        if errors is None or (call.released and not call.served):  # none arrive; or it was kept for the check alone
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

    def on_shared(self, shared: Shared) -> None:
        self.on_backward()
        self.shared |= dict.fromkeys(shared.names, shared)

    def on_backward(self) -> int:
        """Autograd's number of this backward pass, at whose end more is done."""
        task = torch._C._current_graph_task_id()
        if task not in self.open:
            if not self.open:
                self.fresh, self.given, self.made, self.began = {}, {}, {}, set()
            self.open.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.on_backward_end(task))
        return task

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        """Before autograd adds to the first parameter's gradient: is there a statistic to add to?"""
        if torch._C._current_graph_task_id() not in self.began:
            self.began.add(self.on_backward())
            cleared = [old for old in self.sums if was_cleared(self.ways.get(old), self.left.get(old))]
            if self.gated or len(cleared) == len(self.sums):
                self.start_statistic()
            for old in cleared:
                self.sums.pop(old, None)
                self.since[old] = self.total
        if name in self.unchecked or self.ways[name].again is not None:  # running again may differ in any batch
            self.given[name] = gradient.detach()

    def on_accumulated(self, name: str, p: nn.Parameter) -> None:
        if name in self.fresh:  # a reentrant checkpoint's: the sum over uses is not known before the sign is taken
            refuse_second_backward(name)
        self.fresh[name] = None
        if (grad := p.grad) is not None:
            self.left[name] = weakref.ref(grad), grad._version
        calls, shared = self.arrived.get(name, []), self.shared.get(name)
        if shared and shared.explains(calls):
            self.add(name, [shared], self.of_shared(name, shared))
        elif calls and self.ways[name].again is None:
            self.add(name, calls, self.of_rules(name, calls))
        else:
            return  # a module is run again at the end, or nothing is known of it
        self.arrived.pop(name, None)

    def of_shared(self, name: str, shared: Shared) -> Sums | None:
        shared.used = True
        if shared.call is None:
            with exactly(shared.errors):
                return self.summing(shared.errors)
        return self.of_rules(name, [shared.spread()])

    def of_rules(self, name: str, calls: list[Call]) -> Sums | None:
        if not calls[0].rows:
            return None  # an empty shard
        uses = [(call, key) for call in calls for key, own in self.kept.by_rule[call.path] if own == name]
        call, key = uses[0]
        if len(uses) == 1 and call.found is not None:  # made with the first of the layer's parameters
            return call.found.pop(key)
        if lost := [call for call in calls if not self.summing.is_placed(call)]:
            if name not in self.unchecked:
                refuse_place(lost[0].path, lost[0].module, lost[0].shapes[0], lost[0].rows)
            self.misplaced.append(f"no axis of {named(lost[0].path, lost[0].module)} holds the samples")
            return None  # so that the check looks for another way
        with exactly(self.ways[name].parameter):
            if len(uses) > 1:
                return self.summing.of_uses(uses)
            call.found = self.summing.of_layer(call)
            return call.found.pop(key)

    def of_module(self, path: str, calls: list[Call], names: list[str]) -> dict[str, Sums]:
        inside = {p: key for key, p in self.model.get_submodule(path).named_parameters()}
        keys = {inside[self.ways[name].parameter]: name for name in names}
        found = self.summing.of_module(calls, {key: self.ways[name].parameter for key, name in keys.items()})
        return {keys[key]: sums for key, sums in found.items()}

    def add(self, name: str, calls: Sequence[Any], found: Sums | None) -> None:
        this = calls[0].this
        if len(calls) > 1 and any(call.this is not this for call in calls):
            refuse_second_backward(calls[0].path)
        if not this.counted:
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
        if self.fresh and self.given:  # what is neither run again nor unchecked is done
            with torch.no_grad(), exactly(self.ways[next(iter(self.fresh))].parameter):
                self.run_again()
                confirm(self)
            for found in self.made.values():
                found.total = None  # it is as large as the gradient
        self.open.discard(task)
        if not self.open:
            for call in itertools.chain(*self.tried.values()):
                call.release()
            self.forget_calls()

    def run_again(self) -> None:
        """The sums of what no rule serves, once all errors of the backward pass are there."""
        for path, names in self.kept.again.items():
            if wanted := [name for name in names if name in self.fresh and name in self.arrived]:
                calls = self.arrived[wanted[0]]
                try:
                    found = self.of_module(path, calls, wanted)
                except (RuntimeError, ValueError) as error:
                    if self.unchecked.isdisjoint(wanted):
                        raise
                    self.misplaced.append(str(error))
                    continue  # the check looks for a module that can
                for name in wanted:
                    self.add(name, self.arrived.pop(name), found.get(name))
