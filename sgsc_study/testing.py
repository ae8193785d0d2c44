"""For the tests of a gate or a rule of one's own: what `train` and `SGSC` do not try at every start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgsc_core.checks import refuse_answer
from sgsc_core.rules import Rule, built, per_sample_rule
from sgsc_study.gates import Gate, check_gate, example_sums


def assert_gate(gate: Gate) -> None:
    """AssertionError where a gate mixes runs, is random, changes its sums, or makes a factor below 0.

    >>> assert_gate(lambda sign, *, batch_size, gamma: sign / batch_size)
    Traceback (most recent call last):
    AssertionError: The gate should make factors of 0 or more: a negative one turns the step round. sum.abs()?
    """
    check_gate("mine", gate)
    gamma = torch.tensor([0.5, 0.25], dtype=torch.float64)
    for shape in ((2, 3, 4), (2, 5)):
        sums, kept = example_sums(gate, shape), example_sums(gate, shape)
        made, again = (gate(*sums, batch_size=8, gamma=gamma) for _ in range(2))
        alone = [gate(*(s[r : r + 1] for s in sums), batch_size=8, gamma=gamma[r : r + 1]) for r in range(2)]
        assert all(map(torch.equal, sums, kept)), "The gate should leave its sums as they are."
        assert torch.equal(made, again), "The gate should make the same of the same sums. Is it random?"
        assert torch.allclose(made, torch.cat(alone)), (
            "The gate should not mix runs: reduce over the axes after the first only, with align_runs(gamma, sum)."
        )
        assert (made >= 0).all(), (
            "The gate should make factors of 0 or more: a negative one turns the step round. sum.abs()?"
        )


@torch.no_grad()
def assert_rule(rule: Rule, module: nn.Module, inputs: Tensor) -> None:
    """AssertionError where a rule's gradients are not the module's own per-sample gradients; where they are no such
    gradients at all, what `SGSC` raises in training.

    `inputs` is [B, ...]; use float64.

    >>> from sgsc_core.rules import linear_rule
    >>> assert_rule(linear_rule, nn.Linear(3, 2).double(), torch.randn(5, 3).double())
    """
    output = module(inputs)
    errors = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(output)
    found = rule(module, inputs, errors)
    refuse_answer("", module, found, len(errors))
    for name, gradients in per_sample_rule(module, inputs, errors).items():
        message, expected = f"The gradients of {name!r} are others.", built(gradients)
        torch.testing.assert_close(built(found[name]).to(expected.dtype), expected, msg=message)
