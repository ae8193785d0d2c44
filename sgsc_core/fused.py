"""A layer's gradient from its per-sample gradients, which are built once for both, in place of a product of its own.

Where a rule builds the g_i of a layer, their sum is the gradient that autograd takes one more product for. So the
layer's output goes on as it is, but with another node in autograd's graph. Its backward takes the input's gradient by
torch's own operation, and Σ_i g_i and Σ_i sign(g_i) in one pass over the g_i.

That is done for torch's own layers alone, in batches of a kind that was checked already, where nothing unusual is about
(`is_fusible`). Where only the backward pass shows that it is, the node does what torch's own would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sgsc_core.calls import Call, Hook, exactly
from sgsc_core.rules import RULES, convolution_rule, linear_rule, transposed_convolution_rule
from sgsc_core.sums import Summing

WORTHWHILE = 2**21  # multiplications of a product below which Python's cost for such a node is more than that saves
NODES = {  # what autograd's graph has for a layer's forward pass as torch wrote it
    linear_rule: {"AddmmBackward0", "MmBackward0", "ViewBackward0", "UnsafeViewBackward0", "AddBackward0"},
    convolution_rule: {"ConvolutionBackward0"},
    transposed_convolution_rule: {"ConvolutionBackward0"},
}
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of input, weight, bias


class _Fused(torch.autograd.Function):
    """The layer as a function of its input, its weight and its bias, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, active: bool, made: tuple[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call, ctx.active = call, active
        return made[0]  # it came in a tuple, as autograd would make a view of an input

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not _accumulates(ctx):
            return *_by_torch(ctx.call.module, x, weight, errors, needed), None, None, None
        of_input, *_ = _by_torch(ctx.call.module, x, weight, errors, (needed[0], False, False))
        ctx.call.errors[0] = errors
        with exactly(weight):
            found = Summing(total=True, active=ctx.active).of_layer(ctx.call)
        ctx.call.found = {key: replace(sums, total=None) for key, sums in found.items()}
        of_bias = found["bias"].total if needed[2] else None
        return of_input, found["weight"].total, of_bias, None, None, None


def _accumulates(ctx: Any) -> bool:
    """Whether this backward pass adds to the gradients of the parameters; autograd.grad does not."""
    try:
        return all(torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[1:])
    except RuntimeError:  # autograd.grad, with respect to the parameters
        return False


def _by_torch(module: Any, x: Tensor, weight: Tensor, errors: Tensor, needed: Sequence[bool]) -> Gradients:
    """What torch's own node gives, where it can be differentiated again: a gradient or, where none is needed, None."""
    if isinstance(module, nn.Linear):
        a, delta = x.flatten(0, -2), errors.flatten(0, -2)  # [B · T, in], [B · T, out]
        of_input = errors @ weight if needed[0] else None
        return of_input, delta.mT @ a if needed[1] else None, delta.sum(0) if needed[2] else None
    bias, where = [module.out_channels] if needed[2] else None, (module.stride, module.padding, module.dilation)
    how = (*where, module.transposed, module.output_padding, module.groups, [*needed])
    return torch.ops.aten.convolution_backward(errors, x, weight, bias, *how)


def fused(recorder: Any, call: Call, output: Tensor, x: Tensor) -> Tensor:
    """A layer's output with this node behind it."""
    own = call.module._parameters
    return _Fused.apply(x, own["weight"], own["bias"], call, recorder.summing.active, (output.detach(),))


# -- where nothing unusual is about ------------------------------------------------------------------------------------


def is_fusible(recorder: Any, call: Call, args: tuple, output: Any) -> bool:
    """Whether a `Recorder`'s call of a layer is torch's own forward pass, checked before and used once, and no more."""
    return (
        call.rule in NODES
        and len(args) == len(call.leaves) == 1
        and _is_plain(args[0], output)
        and output.grad_fn is not None
        and output.grad_fn.name() in NODES[call.rule]
        and _builds(call, args[0])
        and _multiplications(call.module, args[0], output) >= WORTHWHILE
        and _is_torchs_own(call.module)
        and _is_checked(recorder, call)
        and not call.autocast["enabled"]
        and _is_undisturbed()
    )


def _is_plain(x: Any, output: Any) -> bool:
    same = type(x) in (Tensor, nn.Parameter) and type(output) is Tensor and x.dtype == output.dtype
    return same and x.dtype in (torch.float32, torch.float64) and x.layout is torch.strided and not x.is_nested


def _builds(call: Call, x: Tensor) -> bool:
    """Whether the rule builds per-sample gradients, from the input as the layer was given it."""
    module: Any = call.module
    if isinstance(module, nn.Linear):
        return x.shape[:-1].numel() > call.rows  # several positions a sample
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _multiplications(module: Any, x: Tensor, output: Tensor) -> int:
    """Of the product that gives the weight's gradient."""
    return (x if getattr(module, "transposed", False) else output).numel() * module.weight.shape[1:].numel()


def _is_torchs_own(module: nn.Module) -> bool:
    """Neither a subclass nor changed by hand: parametrised, with another forward, or hooked by others."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    others = module._backward_hooks or module._backward_pre_hooks or torch.nn.modules.module._has_any_global_hook()
    parameters = [p for p in module._parameters.values() if p is not None]
    return (
        RULES.get(type(module)) in NODES
        and "forward" not in vars(module)
        and all(isinstance(hook, Hook) for hook in hooks)
        and not others
        and all(type(p) is nn.Parameter and p.requires_grad for p in parameters)
        and module._parameters.keys() == {"weight", "bias"}
    )


def _is_checked(recorder: Any, call: Call) -> bool:
    """Whether a batch of this kind has shown that the layer's calls make its parameters' gradients, by one call."""
    names = [name for _, name in recorder.kept.by_rule.get(call.path, ())]
    owned = sum(p is not None for p in call.module._parameters.values())
    looked = recorder.look.axes.get(call.path, ())
    return (
        call.rule is RULES[type(call.module)]
        and call.this.rows > 1
        and len(looked) == 1
        and len(names) == owned
        and all(name in recorder.learnt and name not in recorder.unchecked for name in names)
        and all(len(recorder.ways[name].owners) == 1 for name in names)
        and recorder.summing.is_placed(call)
    )


def _is_undisturbed() -> bool:
    """Whether autograd records as it does by itself: not to run it again, nor to trace it, nor forward."""
    return (
        torch._C._current_graph_task_id() == -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
    )
