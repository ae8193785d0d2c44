"""The gates: each is its paper's definition on per-sample gradients; what is no gate is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgsc_lib import factored_sums, mlp, per_sample_gradients
from sgsc_study import GATES, RELATIVES
from sgsc_study.engine import backward, forward
from sgsc_study.gates import SUMS, check_gate, sums_of
from sgsc_study.testing import assert_gate

# Each gate from per-sample gradients g [B, *shape] as its paper has it: no factors, no sums.
DEFINITIONS = {
    "sign": lambda g, gamma: g.sign().mean(0).abs() ** gamma,
    "active": lambda g, gamma: (g.sign().sum(0).abs() / (g != 0).sum(0)).nan_to_num(0) ** gamma,
    "magnitude": lambda g, gamma: (g.mean(0).abs() / g.abs().mean(0)).nan_to_num(0) ** gamma,
    "snr": lambda g, gamma: (1 / (1 + g.var(0, correction=0) / g.mean(0) ** 2)).nan_to_num(0) ** gamma,
    "and-mask": lambda g, gamma: (mask := (g.sign().mean(0).abs() >= gamma).to(g.dtype)) / (mask.mean() + 1e-10),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.lists(st.integers(1, 7), min_size=2, max_size=4))
@pytest.mark.parametrize("name", GATES)
def test_each_gate_is_its_definition_on_per_sample_gradients(name, seed, batch_size, widths):
    draw = torch.Generator().manual_seed(seed)
    model, gate = mlp(widths, seed=seed).double(), GATES[name]
    x = torch.randn(batch_size, widths[0], generator=draw, dtype=torch.float64)
    y = torch.randint(widths[-1], (batch_size,), generator=draw)
    gamma = 0.25 + torch.rand((), generator=draw, dtype=torch.float64) / 2
    parameters = [p.detach().unsqueeze(0) for p in model.parameters()]
    inputs, logits = forward(parameters, x.unsqueeze(0))
    errors = backward(parameters, inputs, logits.log_softmax(1), y.unsqueeze(0))
    sums, found = {"total": lambda t: t, **SUMS}, []
    for a, delta in zip(inputs, errors, strict=True):
        for tensors in zip(*(factored_sums(a, delta, sums[kind]) for kind in sums_of(gate)), strict=True):
            found.append(gate(*tensors, batch_size=batch_size, gamma=gamma.view(1))[0])
    for made, g in zip(found, per_sample_gradients(model, x, y).values(), strict=True):
        # where the mean gradient is a rounding error of zero, two ways round differently
        settled = (g.mean(0).abs() > 1e-12 * g.abs().mean(0)) | (g.abs().amax(0) == 0) | (name == "and-mask")
        expected = DEFINITIONS[name](g, gamma)
        torch.testing.assert_close(made[settled], expected[settled], rtol=1e-8, atol=1e-12)


NO_GATES = [
    lambda sign, *, batch_size, gamma: {}["nothing there"],
    lambda cube, *, batch_size, gamma: cube,
    lambda sign, *, batch_size, gamma: sign.mean(),
    lambda sign, *, batch_size, gamma: 1.0,
    lambda sign, *, batch_size, gamma: sign.double(),
    lambda sign, *, batch_size, gamma: sign * gamma,
    lambda sign, *, batch_size, gamma: sign.abs() * sign.abs().mean((1, 2), keepdim=True),
    lambda sign, *, batch_size, gamma: sign.abs() ** float(gamma),
    lambda sign, *, batch_size, gamma: sign * math.nan,
    lambda active, *, batch_size, gamma: 1 / active,
    lambda sign, *, batch_size, gamma: (sign / batch_size) ** 0.5,
]


def test_what_is_no_gate_is_refused_by_its_name_and_the_studys_gates_are_not():
    for gate in (lambda sign, *, batch_size: sign, lambda sign, batch_size, gamma: sign):
        with pytest.raises(TypeError, match="'mine'"):
            check_gate("mine", gate)
    for name, gate in [*(("mine", gate) for gate in NO_GATES), *((name, GATES["sign"]) for name in RELATIVES)]:
        with pytest.raises(ValueError, match=f"'{name}'"):
            check_gate(name, gate)
    for name, gate in GATES.items():
        assert_gate(gate)
        check_gate(name, gate)
