"""`assert_rule` and `assert_gate`, which users try a rule or a gate of their own with: they pass what is right only."""

import math

import pytest
import torch
from torch import nn

from sgsc_core.rules import convolution_rule, embedding_rule, linear_rule
from sgsc_study import align_runs
from sgsc_study.testing import assert_gate, assert_rule


def test_rules_pass_on_sequences_on_images_on_tokens_and_where_a_part_is_frozen():
    partly_frozen = nn.Linear(4, 3)
    partly_frozen.bias.requires_grad_(False)
    assert_rule(linear_rule, partly_frozen.double(), torch.randn(6, 5, 4).double())
    assert_rule(convolution_rule, nn.Conv2d(2, 4, 3, groups=2).double(), torch.randn(6, 2, 5, 5).double())
    assert_rule(embedding_rule, nn.Embedding(5, 4, padding_idx=0).double(), torch.randint(5, (6, 7)))


def by_hand(make):
    """A rule for a Linear layer that makes its gradients of all per-sample gradients [B, *shape]."""
    return lambda _, inputs, errors: {"weight": make(torch.einsum("bo,bi->boi", errors, inputs)), "bias": make(errors)}


@pytest.mark.parametrize("mistaken, error", [
    (lambda g: g.sign(), AssertionError), (lambda g: g.flip(0), AssertionError),
    (lambda g: g * math.nan, AssertionError),
    (lambda g: g.sum(0), ValueError), (lambda g: g[::2], ValueError),  # what SGSC refuses is refused here too
])  # fmt: skip
def test_a_mistaken_rule_fails_where_the_right_one_passes(mistaken, error):
    module, inputs = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    assert_rule(by_hand(lambda g: g), module, inputs)
    with pytest.raises(error):
        assert_rule(by_hand(mistaken), module, inputs)


@pytest.mark.parametrize("gate, error", [
    (lambda sign, *, batch_size, gamma: sign.abs() / (sign.abs().mean() if sign.ndim == 2 else 1), AssertionError),
    (lambda sign, *, batch_size, gamma: (sign.abs() ** gamma[0]).to(sign.dtype), AssertionError),
    (lambda sign, *, batch_size, gamma: sign.abs() * torch.rand_like(sign), AssertionError),
    (lambda sign, *, batch_size, gamma: sign.abs_() / batch_size, AssertionError),
    (lambda sign, *, batch_size, gamma: sign / batch_size, AssertionError),
    (lambda sign: sign.abs(), TypeError),  # what train refuses is refused here too
])  # fmt: skip
def test_a_mistaken_gate_fails_where_the_right_one_passes(gate, error):
    assert_gate(lambda sign, *, batch_size, gamma: sign.abs() ** align_runs(gamma, sign))
    with pytest.raises(error):
        assert_gate(gate)
