"""Optimizers of a stack: one step of many runs at once, each with a learning rate and a weight decay of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgsc_study.gates import align_runs

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults, as in torch.optim.Adam
MOMENTUM, MUON_MOMENTUM = 0.9, 0.95  # of Nesterov's; Muon's is torch.optim.Muon's default
# Of Muon's quintic iteration, which brings singular values near 1 in 5 steps (Jordan et al., 2024), as torch has them.
QUINTIC, QUINTIC_STEPS = (3.4445, -4.7750, 2.0315), 5
State = list[dict[str, Tensor]]  # what an optimizer keeps, one dict a parameter


def adam(gradient: Tensor, state: dict[str, Tensor], lr: Tensor, step: int, _hidden: bool) -> Tensor:
    """Kingma & Ba, arXiv 1412.6980, algorithm 1, operation by operation what torch.optim.Adam does to one tensor."""
    if not state:
        state |= {"m": torch.zeros_like(gradient), "v": torch.zeros_like(gradient)}
    m = state["m"].lerp_(gradient, 1 - BETA1)
    v = state["v"].mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    denominator = v.sqrt().div_((1 - BETA2**step) ** 0.5).add_(EPSILON)
    return (m * align_runs(-lr / (1 - BETA1**step), gradient)).div_(denominator)


def sgd(gradient: Tensor, state: dict[str, Tensor], lr: Tensor, _step: int, _hidden: bool) -> Tensor:
    """Gradient descent with Nesterov's momentum, as torch.optim.SGD(momentum=0.9, nesterov=True) has it."""
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
    return gradient.add(momentum, alpha=MOMENTUM).mul_(align_runs(-lr, gradient))


def muon(gradient: Tensor, state: dict[str, Tensor], lr: Tensor, step: int, hidden: bool) -> Tensor:
    """Muon (Jordan et al., 2024) on the weights of all layers but the last, Adam on the last and on biases.

    Its update is scaled to Adam's size (Liu et al., arXiv 2502.16982), so that one learning rate serves both.
    """
    if not hidden:
        return adam(gradient, state, lr, step, hidden)
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum = state["momentum"].lerp_(gradient, 1 - MUON_MOMENTUM)
    update = orthogonalised(gradient.lerp(momentum, MUON_MOMENTUM))
    return update.mul_(align_runs(-lr * 0.2 * max(gradient.shape[1:]) ** 0.5, gradient))


def plain(gradient: Tensor, _state: dict[str, Tensor], lr: Tensor, _step: int, _hidden: bool) -> Tensor:
    """Gradient descent without momentum."""
    return gradient * align_runs(-lr, gradient)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [R, m, n] with their singular values brought near 1 (0.7 to 1.2), by Muon's iteration.

    >>> made = orthogonalised(torch.diag(torch.tensor([3.0, 1.0]))[None])
    >>> bool((made.diagonal(dim1=1, dim2=2) > 0.6).all() and (made < 1.3).all())
    True
    """
    a, b, c = QUINTIC
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.flatten(1).norm(dim=1).clamp_(min=1e-7).view(-1, 1, 1)
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).contiguous()


# An optimizer's update -lr · direction of one tensor [R, ...], from its mean gradient; it changes its own state in
# place. `hidden` says whether the tensor is the weight of a layer that is not the last; lr is float64 [R].
OPTIMIZERS: dict[str, Callable[[Tensor, dict[str, Tensor], Tensor, int, bool], Tensor]] = {
    "adam": adam,
    "sgd": sgd,
    "muon": muon,
}


def step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: State,
    lr: Tensor,
    step: int,
    *,
    optimizer: Callable[..., Tensor] = adam,
    gates: Sequence[Tensor] | None = None,
    weight_decay: Tensor | None = None,
    cautious: bool = False,
) -> list[Tensor]:
    """One step on parameters [R, ...] in place, with a learning rate a run, lr float64 [R]; `step` counts from 1.

    `weight_decay` float64 [R] is decoupled (Loshchilov & Hutter, arXiv 1711.05101) and acts on all of a parameter,
    whatever its gate. `gates` scale the finished update; `cautious` keeps of it only what has the gradient's sign.
    Returns the updates that were added.

    >>> p, rates = torch.zeros(2, 3), torch.tensor([0.1, 0.2], dtype=torch.float64)
    >>> _ = step_([p], [torch.ones(2, 3)], [{}], rates, step=1)
    >>> p[:, 0]  # Adam's first step has the length of the learning rate
    tensor([-0.1000, -0.2000])
    """
    updates = []
    for k, (p, g, own) in enumerate(zip(parameters, gradients, state, strict=True)):
        update = optimizer(g, own, lr, step, g.ndim == 3 and k < len(parameters) - 2)
        if gates is not None:
            update.mul_(gates[k])
        if cautious:
            agrees = (update * g < 0).to(p.dtype)
            update.mul_(agrees / align_runs(agrees.flatten(1).mean(1).clamp_(min=1e-3), p))
        if weight_decay is not None:
            p.mul_(align_runs(1 - lr * weight_decay, p))
        updates.append(update)
        p.add_(update)
    return updates
