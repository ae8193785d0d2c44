"""What is measured of a run's steps, against cases whose answer is known and against the whole Hessian."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from study_inputs import DOUBLE, shortly
from torch.func import functional_call

from sgsc_lib import mlp
from sgsc_study import GATES, Run, anatomy
from sgsc_study.anatomy import sharpness

SHAPE = (3, 40, (40, 6, 10))  # epochs, batch size, widths


def followed(run: Run) -> dict[str, np.ndarray]:
    return anatomy([run], DOUBLE, GATES["sign"] if run.gamma else None, *SHAPE)


def test_sgds_own_update_is_sgds_and_without_a_gate_the_gate_is_1():
    found = followed(Run(0, 0.05, optimizer="sgd"))
    for name in ("cosine_to_sgd", "ungated_cosine_to_sgd", "gate_1", "gate_2"):
        np.testing.assert_allclose(found[name], 1.0, rtol=1e-12)


def test_it_follows_the_run_that_is_trained():
    run = Run(0, 0.05, 0.5, "after", weight_decay=0.1)
    curves = shortly([run], DOUBLE, epochs=3, widths=SHAPE[2])
    for name in ("train_loss", "test_accuracy"):
        np.testing.assert_array_equal(followed(run)[name], getattr(curves, name))


def test_a_gate_of_one_number_a_tensor_keeps_the_direction_within_it_and_an_exponent_lowers_the_gate():
    low, high = (followed(Run(0, 0.01, gamma, "after", optimizer="sgd"))["gate_1"] for gamma in (0.5, 1.0))
    assert (high[:, 0] < low[:, 0]).all() and (high > 0).all()
    means = followed(Run(0, 0.01, 0.5, "after", "layer-mean", optimizer="sgd"))
    assert ((means["cosine_to_sgd"] > 0.5) & (means["cosine_to_sgd"] < 1)).all()  # tensors are scaled apart


def test_the_still_share_counts_what_moved_less_than_a_tenth_of_its_tensor():
    found = followed(Run(0, 1e-12, optimizer="sgd"))
    assert ((found["still_share"] >= 0) & (found["still_share"] < 0.9)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_sharpness_is_the_largest_eigenvalue_of_the_hessian(seed):
    model = mlp((40, 3, 10), seed=seed).double()
    x, y = DOUBLE.x_train, DOUBLE.y_train
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in values]

    def loss(flat):
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), values, strict=True)]
        return F.cross_entropy(functional_call(model, dict(zip(names, parts, strict=True)), x), y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in values]))
    stacked = [p.detach().unsqueeze(0) for p in values]
    found = sharpness([Run(seed, 0.1)], stacked, x, y, iterations=300)
    assert found.item() == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
