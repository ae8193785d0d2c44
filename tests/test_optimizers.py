"""The optimizers of a stack are torch's: Adam bit for bit, SGD and Muon up to rounding."""

import pytest
import torch

from sgsc_study.optimizers import OPTIMIZERS, orthogonalised, step_

THEIRS = {
    "adam": lambda p, decay: torch.optim.AdamW([p], lr=0.0123, weight_decay=decay),
    "sgd": lambda p, _: torch.optim.SGD([p], lr=0.0123, momentum=0.9, nesterov=True),
    "muon": lambda p, decay: torch.optim.Muon([p], lr=0.0123, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
}


@pytest.mark.parametrize("name, decay", [("adam", 0.0), ("adam", 0.3), ("sgd", 0.0), ("muon", 0.0), ("muon", 0.3)])
def test_a_step_is_torchs(name, decay):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 7, 5, generator=generator)
    theirs, state = p[0].clone().requires_grad_(), [{}, {}, {}]
    optimizer, others = THEIRS[name](theirs, decay), [torch.zeros(1, 2), torch.zeros(1, 2, 7)]  # a bias, the last layer
    rate, decays = torch.tensor([[0.0123], [decay]], dtype=torch.float64)
    for step in range(1, 51):
        g = torch.randn(1, 7, 5, generator=generator) * 10.0 ** (step % 7 - 5)
        theirs.grad = g[0].clone()
        optimizer.step()
        step_(
            [p, *others], [g, *map(torch.ones_like, others)], state, rate, step,
            optimizer=OPTIMIZERS[name], weight_decay=decays if decay else None,
        )  # fmt: skip
        if name == "adam":
            assert torch.equal(p[0], theirs)
        torch.testing.assert_close(p[0], theirs.detach(), rtol=1e-5, atol=2e-2 if name == "muon" else 1e-6)  # bfloat16


def test_muon_brings_singular_values_near_1_and_keeps_the_directions():
    matrices = torch.randn(3, 12, 7, generator=torch.Generator().manual_seed(0))
    made, (u, _, v) = orthogonalised(matrices), torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ made @ v.mT
    assert ((values.diagonal(dim1=1, dim2=2) - 1).abs() < 0.4).all()
    torch.testing.assert_close(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(orthogonalised(matrices.mT), made.mT)
