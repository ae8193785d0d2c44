"""Gates of the study: SGSC and its relatives, each from sums over the batch that factor as the signs do.

To add one, write a function whose parameters name the sums that it is made of and put it into the table:
`GATES["mine"] = mine`; then `Run(..., gate="mine")` trains with it. `sgsc_study.testing.assert_gate` tries it out.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from sgsc_core.definition import power_gate

# Σ_i f(g_i) for each f; all are multiplicative, so that each is one matrix product. "total" is Σ_i g_i itself.
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "magnitude": torch.abs,
    "square": torch.square,
    "active": lambda g: (g != 0).to(g.dtype),
}


def align_runs(values: Tensor, like: Tensor) -> Tensor:
    """Values [R], one a run, as [R, 1, ...] of the dtype and device of `like` [R, ...], so that they broadcast over it.

    >>> align_runs(torch.tensor([0.5, 2.0], dtype=torch.float64), torch.ones(2, 3)) * torch.ones(2, 3)
    tensor([[0.5000, 0.5000, 0.5000],
            [2.0000, 2.0000, 2.0000]])
    """
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def _share(part: Tensor, whole: Tensor, gamma: Tensor) -> Tensor:
    """(part / whole) ** γ with 0 / 0 = 0, and no more than 1 whatever the rounding; γ [R] for part [R, ...]."""
    share = torch.where(whole > 0, part / whole, 0.0).clamp_(max=1.0)
    return share ** align_runs(gamma, part)


def sign_gate(sign: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """SGSC: (|Σ sign g_i| / B) ** γ."""
    return power_gate(sign, batch_size, gamma)


def active_gate(sign: Tensor, active: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """SGSC over the samples whose gradient is not zero: (|Σ sign g_i| / Σ [g_i ≠ 0]) ** γ. No ReLU caps it."""
    return _share(sign.abs(), active, gamma)


def magnitude_gate(total: Tensor, magnitude: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """(|Σ g_i| / Σ |g_i|) ** γ: the mean of GradDrop's random mask, with an exponent (Chen et al., 2010.06808)."""
    return _share(total.abs(), magnitude, gamma)


def snr_gate(total: Tensor, square: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """(r / (1 + r)) ** γ of the gradient's signal-to-noise ratio r = mean² / variance (GSNR, Liu et al., 2001.07384).

    r / (1 + r) = mean² / mean square, so that it needs no division by a variance that may be zero.
    """
    return _share(total.square(), batch_size * square, gamma)


def and_mask_gate(sign: Tensor, *, batch_size: int, gamma: Tensor) -> Tensor:
    """[|Σ sign g_i| / B ≥ τ], over its mean in each tensor (Parascandolo et al., 2009.00329); the threshold τ is γ."""
    mask = (sign.abs() >= align_runs(gamma * batch_size, sign)).to(sign.dtype)
    return mask / align_runs(mask.flatten(1).mean(1) + 1e-10, mask)


# A gate's parameter names say which sums it is made of ("total" or of `SUMS`), each [R, *shape]; γ is float64 [R].
Gate = Callable[..., Tensor]
GATES: dict[str, Gate] = {
    "sign": sign_gate,
    "active": active_gate,
    "magnitude": magnitude_gate,
    "snr": snr_gate,
    "and-mask": and_mask_gate,
}
# Relatives that are no gate of the batch's sums. "vote": the gradient is replaced by the sign of Σ sign g_i, before
# Adam or, "after", instead of Adam: signSGD with majority vote (Bernstein et al., 1810.05291). "cautious": of Adam's
# update what agrees in sign with the gradient, over the mask's mean (Liang et al., 2411.16085).
RELATIVES = ("vote", "cautious")


def sums_of(gate: Gate) -> list[str]:
    """The names of the sums that a gate is made of."""
    kinds = inspect.signature(gate).parameters.values()
    return [parameter.name for parameter in kinds if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def check_gate(name: str, gate: Gate) -> None:
    """Raise TypeError or ValueError where a gate is not one: by its name, its signature, and the shape, the dtype and
    the finiteness of what it makes of the sums of a small batch, of which one parameter's are all 0.
    """
    if name in RELATIVES:
        raise ValueError(f"The gate {name!r} should have another name: {' and '.join(RELATIVES)} are methods of train.")
    signature = inspect.signature(gate)
    if not {"batch_size", "gamma"} <= {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}:
        raise TypeError(
            f"The gate {name!r} should have, after its sums and a `*`, the keywords `batch_size` and `gamma`, used or "
            f"not, like (sign, *, batch_size, gamma). Found {signature}."
        )
    if unknown := set(sums_of(gate)) - {"total", *SUMS}:
        raise ValueError(f"The sums of the gate {name!r} should be of total, {', '.join(SUMS)}. Found {unknown}.")
    for which, shape in (("a weight's", (2, 3, 4)), ("a bias's", (2, 5))):
        try:
            found = gate(*example_sums(gate, shape), batch_size=8, gamma=torch.tensor([0.5, 0.25], dtype=torch.float64))
        except Exception as error:
            raise ValueError(
                f"The gate {name!r} should take sums [R, *shape], here {which} {shape}, and `gamma` [R]; "
                f"align_runs(gamma, sum) shapes that to broadcast, sum.flatten(1) reduces any shape. Found: {error!r}"
            ) from error
        made = (tuple(found.shape), found.dtype) if isinstance(found, Tensor) else type(found).__name__
        if made != (shape, torch.float32):
            raise ValueError(
                f"The gate {name!r} should return [R, *shape] in the dtype of its sums, here {shape}, torch.float32, "
                f"as gate.expand_as(sum) and gate.to(sum.dtype) make it; `gamma` is float64. Found {made}."
            )
        if not found.isfinite().all():
            raise ValueError(
                f"The gate {name!r} should make finite numbers of its sums. Found NaN or infinity. Where it divides by "
                "a sum that may be 0: torch.where(whole > 0, part / whole, 0). Where it takes a power of `sign` or "
                "`total`, which may be negative: sum.abs()."
            )


def example_sums(gate: Gate, shape: tuple[int, ...]) -> list[Tensor]:
    """The sums [R, *shape] that a gate takes, float32, of 8 samples; no sample moves the last axis's third entry."""
    g = torch.randn(8, *shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))  # [B, R, *shape]
    g[1:, ..., 1], g[..., 2], g[:, 0, ..., 0] = 0.0, 0.0, g[:, 0, ..., 0].abs()
    return [g.sum(0) if kind == "total" else SUMS[kind](g).sum(0) for kind in sums_of(gate)]
